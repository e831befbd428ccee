"""One side of `train_step` in a process of its own: `python -m bench.worker SIDE THREADS`.

Protocol, one JSON object a line: it says what it is, then answers every line on standard input by doing one step and
saying how many seconds it took. Between steps it waits, so that the sides can take turns on one machine.

Every side but `whole` and `sgemm` runs the same step around its network: forward at given x_t and t, mean squared
error, backward, fused AdamW, one foreach lerp for the moving average. float32, NCHW, eager.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bench.peers import PEERS

BATCH, SIZE, CHANNELS = 16, 32, 3
BASE, MULTIPLIERS, BLOCKS, ATTENTION_SIZE, HEAD = 64, (1, 2, 2, 2), 2, 16, 64
SGEMM, SGEMM_REPEATS = 2048, 8
WARM_UP = 2
Network = Callable[[Tensor, Tensor], Tensor]
WIDTHS = [BASE * m for m in MULTIPLIERS]
ATTEND = [SIZE // 2**level == ATTENTION_SIZE for level in range(len(MULTIPLIERS))]


def build_ours() -> tuple[nn.Module, Network]:
    """ddpm_core's U-Net."""
    from ddpm_core import UNet

    network = UNet(
        image_size=SIZE, channels=CHANNELS, base_channels=BASE, channel_multipliers=MULTIPLIERS, num_blocks=BLOCKS,
        attention_resolutions=(ATTENTION_SIZE,),
    )  # fmt: skip
    return network, network


def build_diffusers() -> tuple[nn.Module, Network]:
    """Its U-Net with the same blocks, scale-and-shift norms and heads."""
    from diffusers import UNet2DModel

    network = UNet2DModel(
        sample_size=SIZE, in_channels=CHANNELS, out_channels=CHANNELS, layers_per_block=BLOCKS,
        block_out_channels=WIDTHS,
        down_block_types=["AttnDownBlock2D" if attend else "DownBlock2D" for attend in ATTEND],
        up_block_types=["AttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(ATTEND)],
        attention_head_dim=HEAD, norm_num_groups=32, resnet_time_scale_shift="scale_shift",
    )  # fmt: skip
    return network, lambda x_t, t: network(x_t, t, return_dict=False)[0]


def build_guided_diffusion() -> tuple[nn.Module, Network]:
    """OpenAI's U-Net, the reference that ours follows. It counts attention in downsampling factors."""
    from guided_diffusion.unet import UNetModel

    network = UNetModel(
        image_size=SIZE, in_channels=CHANNELS, model_channels=BASE, out_channels=CHANNELS, num_res_blocks=BLOCKS,
        attention_resolutions=(SIZE // ATTENTION_SIZE,), channel_mult=MULTIPLIERS, num_head_channels=HEAD,
        use_scale_shift_norm=True,
    )  # fmt: skip
    return network, network


def build_monai() -> tuple[nn.Module, Network]:
    """Its U-Net; it has no scale-and-shift norm, so it adds the embedding: the same convolutions."""
    from monai.networks.nets import DiffusionModelUNet

    network = DiffusionModelUNet(
        spatial_dims=2, in_channels=CHANNELS, out_channels=CHANNELS, num_res_blocks=BLOCKS, channels=WIDTHS,
        attention_levels=ATTEND, num_head_channels=HEAD, use_flash_attention=True,
    )  # fmt: skip
    return network, network


BUILDERS = {
    "ours": build_ours,
    "diffusers": build_diffusers,
    "guided-diffusion": build_guided_diffusion,
    "monai": build_monai,
}


def make_shared_step(network: nn.Module, call: Network) -> Callable[[], None]:
    """The step that is the same for every network."""
    x_t, noise = torch.randn(2, BATCH, CHANNELS, SIZE, SIZE).unbind()
    t = torch.arange(BATCH) * 60
    parameters = list(network.train().parameters())
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)

    def step() -> None:
        functional.mse_loss(call(x_t, t), noise).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1e-3)

    return step


def make_whole_step() -> tuple[nn.Module, Callable[[], None]]:
    """The pipeline's own step on the same network: position-keyed draws, noising, flips and clipping included."""
    from ddpm_core import EMA, p_losses, register_schedule
    from pipeline.data.loader import Batch
    from pipeline.engine.state import TrainState
    from pipeline.engine.step import StepPlan, TrainStep
    from pipeline.runtime.topology import Topology

    network = build_ours()[0]
    state = TrainState(network, EMA(network, 4000), torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True))
    plan = StepPlan(
        seed=0, batch_size=BATCH, micro_batch=BATCH, null_label=None, label_dropout=0.0, horizontal_flip=True,
        max_grad_norm=1.0, dtype=torch.float32, learning_rate=lambda images: 1e-4, loss=p_losses,
    )  # fmt: skip
    train = TrainStep(plan, state, register_schedule(), Topology(0, 1, 0, 1, torch.device("cpu")))
    images = torch.randint(0, 256, (BATCH, CHANNELS, SIZE, SIZE), dtype=torch.uint8)
    labels = torch.full((BATCH,), -1)
    return network, lambda: train(Batch(images, labels, torch.arange(BATCH) + state.images_seen))


def count_flop(network: nn.Module, call: Network) -> int:
    """Floating-point operations of forward and backward for a batch.

    Counted on one image, as every operation is per image, and with attention spelled out: the counter has no formula
    for the CPU flash kernel and would miss it.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(torch.randn(1, CHANNELS, SIZE, SIZE), torch.tensor([1])).sum().backward()
    network.zero_grad(set_to_none=True)
    return BATCH * counter.get_total_flops()


def prepare(side: str) -> tuple[dict[str, Any], Callable[[], None]]:
    """What a side says of itself, and its step."""
    torch.manual_seed(0)
    if side == "sgemm":
        left, right = torch.randn(2, SGEMM, SGEMM).unbind()
        out = torch.empty(SGEMM, SGEMM)

        def multiply() -> None:
            for _ in range(SGEMM_REPEATS):
                torch.mm(left, right, out=out)

        return {"title": f"sgemm {SGEMM}", "flop": SGEMM_REPEATS * 2 * SGEMM**3}, multiply
    title = f"{PEERS[side][1]} {version(PEERS[side][1])}" if side in PEERS else side
    if side == "whole":
        network, step = make_whole_step()
        flop = count_flop(network, network)
    else:
        network, call = BUILDERS[side]()
        flop = count_flop(network, call)
        step = make_shared_step(network, call)
    return {
        "title": title,
        "images": BATCH,
        "flop": flop,
        "parameters": sum(p.numel() for p in network.parameters()),
    }, step


def main() -> None:
    """Answer until standard input ends. Whatever a library prints goes to standard error."""
    side, threads = sys.argv[1], int(sys.argv[2])
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    about, step = prepare(side)
    for _ in range(WARM_UP):
        step()
    print(json.dumps(about), file=out, flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(json.dumps({"seconds": time.perf_counter() - start}), file=out, flush=True)


if __name__ == "__main__":
    main()
