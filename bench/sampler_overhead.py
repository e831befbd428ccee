"""What a sampler costs beside its network, a batch of 16 images of 3 x 32 x 32 in float32 on the CPU.

`ddim_overhead`: time a step of a DDIM chain of 50 steps whose network returns a stored tensor, set-up of the chain
included, against diffusers' `DDIMScheduler` doing the same (`set_timesteps`, then `step`; eps, x0 clipped, eta 0, its
defaults). Ours must take at most a third. `ddpm_overhead`: the same for ancestral sampling with `torch.randn` for
noise, against one bare `torch.randn` of that shape: at most 1.4 times as long. `cfg_cost`: one call of a U-Net (32 base
channels, multipliers 1, 2, 2) on the batch under classifier-free guidance, which on a CPU calls it twice, against one
plain call: at most 2.05 times as long. As one call of twice the batch, which is right for a GPU, it hung on the C
library's allocator here and took 2.0 to 2.2: the larger activations' pages went back to the system between calls.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable

import torch
from torch import Tensor

from bench.peers import python_for
from bench.report import ROOT, Row, num_cores, run
from ddpm_core import ClassifierFreeGuidance, UNet, register_schedule, sample_ddim, sample_ddpm

SHAPE = (16, 3, 32, 32)
STEPS, CHAINS = 50, 10
ROUNDS, CFG_ROUNDS = 30, 40
REST_SECONDS = 0.1
PEER = f"""
import json, os, sys, time
import torch
import diffusers
out = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)
torch.set_num_threads({num_cores()})
x_noisy, stored = torch.randn(2, *{SHAPE}).unbind()
scheduler = diffusers.DDIMScheduler()
network = lambda x, t: stored
def chain():
    x = x_noisy
    scheduler.set_timesteps({STEPS})
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
with torch.no_grad():
    print(json.dumps(f"diffusers {{diffusers.__version__}}"), file=out)
    for _ in sys.stdin:
        start = time.perf_counter()
        for _ in range({CHAINS}):
            chain()
        print(json.dumps((time.perf_counter() - start) / {CHAINS * STEPS}), file=out)
"""


def seconds_of(work: Callable[[], object], repeats: int) -> float:
    """Seconds a repeat."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def take_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """What each side measured, one after another in turning order, after two rounds that warm up. Before each turn a
    rest, in which the threads of the side before stop to wait for work: OpenMP's keep a core busy for a while."""
    names = list(sides)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(-2, rounds):
        for place in range(len(names)):
            name = names[(round_ + place) % len(names)]
            time.sleep(REST_SECONDS)
            taken = sides[name]()
            if round_ >= 0:
                seconds[name].append(taken)
    return seconds


def start_peer() -> tuple[str, Callable[[], float], Callable[[], None]]:
    """diffusers in a process of its own: its name, a turn, and the end."""
    process = subprocess.Popen(
        [python_for("diffusers"), "-W", "ignore", "-c", PEER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        text=True, bufsize=1, env=dict(os.environ),
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    requests, answers = process.stdin, process.stdout
    name = json.loads(answers.readline())

    def turn() -> float:
        requests.write("go\n")
        return float(json.loads(answers.readline()))

    def close() -> None:
        requests.close()
        process.wait()

    return name, turn, close


def compare(bar: str, ours: list[float], peer: list[float], peer_name: str, target: float, what: str) -> Row:
    """Medians in seconds, with the spread of both in the note."""
    us = [f"{min(s) * 1e6:.1f} to {max(s) * 1e6:.1f} us" for s in (ours, peer)]
    note = (
        f"{what}: ours {us[0]}, peer {us[1]}; ratio by the fastest turn {min(peer) / min(ours):.3f}; {len(ours)} turns"
    )
    return Row(bar, statistics.median(ours), statistics.median(peer), peer_name, "s", target, note)


def measure_steps() -> list[Row]:
    """The time outside the network, DDIM and ancestral."""
    schedule = register_schedule()
    x_noisy, stored = torch.randn(2, *SHAPE).unbind()

    def network(x_t: Tensor, t: Tensor, condition: Tensor | None) -> Tensor:
        return stored

    def ddim() -> Tensor:
        return sample_ddim(network, schedule, x_noisy, num_steps=STEPS)

    def ddpm() -> Tensor:
        return sample_ddpm(network, schedule, x_noisy, lambda k: torch.randn(SHAPE), num_steps=STEPS)

    peer_name, peer, close = start_peer()
    seconds = take_turns(
        {
            "ddim": lambda: seconds_of(ddim, CHAINS) / STEPS,
            "peer": peer,
            "ddpm": lambda: seconds_of(ddpm, CHAINS) / STEPS,
            "randn": lambda: seconds_of(lambda: torch.randn(SHAPE), CHAINS * STEPS),
        },
        ROUNDS,
    )
    close()
    return [
        compare("ddim_overhead", seconds["ddim"], seconds["peer"], f"{peer_name} DDIMScheduler", 3.0, "a step"),
        compare("ddpm_overhead", seconds["ddpm"], seconds["randn"], "bare torch.randn", round(1 / 1.4, 3), "a step"),
    ]


@torch.no_grad()
def measure_guidance() -> Row:
    """A guided call against a plain one."""
    network = UNet(image_size=SHAPE[-1], channels=SHAPE[1], num_classes=10, base_channels=32,
                   channel_multipliers=(1, 2, 2), num_blocks=1, attention_resolutions=(8,)).eval()  # fmt: skip
    guided = ClassifierFreeGuidance(network, 3.0, null=10)
    x_t, t, labels = torch.randn(SHAPE), torch.full((SHAPE[0],), 500), torch.arange(SHAPE[0]) % 10
    seconds = take_turns(
        {
            "guided": lambda: seconds_of(lambda: guided(x_t, t, labels), 2),
            "plain": lambda: seconds_of(lambda: network(x_t, t, labels), 2),
        },
        CFG_ROUNDS,
    )
    return compare("cfg_cost", seconds["guided"], seconds["plain"], "one plain call", round(1 / 2.05, 3), "a call")


def measure() -> list[Row]:
    """All rows."""
    torch.manual_seed(0)
    torch.set_num_threads(num_cores())
    return [*measure_steps(), measure_guidance()]


if __name__ == "__main__":
    run(__file__, measure)
