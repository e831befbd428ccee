"""One training step, forward, backward, AdamW and moving average, at 32 x 32 x 3 in float32 on the CPU.

The same U-Net as far as each peer allows: 64 base channels, multipliers 1, 2, 2, 2, two blocks a resolution,
self-attention at 16 px and in the middle, heads of 64; batch 16. MONAI has no scale-and-shift norm and adds the
embedding instead: fewer parameters, the same convolutions. guided-diffusion-sdk is OpenAI's code as others put it on
PyPI. Everything around the network is one and the same
code (bench/worker.py). `train_step` compares with the fastest peer: it must take at most 1.05 of that peer's time.
`train_step_whole` is the pipeline's complete step, with its random draws, noising, flips and clipping, against our
bare step. `train_step_sgemm_share` holds the rate of floating-point operations of our step against that of a large
matrix product: the share of what the machine gives, though not a ceiling (some convolutions beat it).
"""

from __future__ import annotations

import statistics
import sys

from bench.peers import PEERS, python_for
from bench.report import Row, num_cores, run
from bench.sides import Side

ROUNDS = 12
TARGET = 0.95  # within 1.05 of the best peer's step time


class Network(Side):
    """A side's network in a process, waiting to do a step."""

    def __init__(self, name: str, python: str = sys.executable) -> None:
        super().__init__(name, "bench.worker", name, num_cores(), python=python)
        self.seconds: list[float] = []

    def step(self) -> None:
        """One timed step."""
        self.seconds.append(self.take_turn()["seconds"])

    @property
    def median(self) -> float:
        """Seconds a step."""
        return statistics.median(self.seconds)

    def rate(self, what: str) -> float:
        """`images` or `flop` a second, by the median step."""
        return self.about[what] / self.median

    def describe(self) -> str:
        """Work and spread, for the notes."""
        work = f"{self.about['parameters'] / 1e6:.2f} M parameters, {self.about['flop'] / 1e9:.1f} GFLOP a step"
        return f"{work}, {self.median:.3f} s (fastest {min(self.seconds):.3f}, slowest {max(self.seconds):.3f})"


def start_sides() -> tuple[list[Network], list[str]]:
    """Every side that starts, and for the others a line that says why not."""
    sides, left_out = [Network("ours"), Network("whole"), Network("sgemm")], []
    for peer in PEERS:
        try:
            sides.append(Network(peer, python_for(peer)))
        except RuntimeError as error:
            left_out.append(f"left out: {peer} ({error})")
            print(f"bench: {left_out[-1]}", file=sys.stderr)
    return sides, left_out


def compare(bar: str, ours: Network, peer: Network, name: str, target: float | None, notes: list[str]) -> Row:
    """Images a second of two sides by the median, with the ratio by the fastest step in the note."""
    fastest = f"ratio by the fastest step {min(peer.seconds) / min(ours.seconds):.3f}"
    note = "; ".join([f"ours {ours.describe()}; peer {peer.describe()}; {fastest}; {ROUNDS} rounds", *notes])
    return Row(bar, ours.rate("images"), peer.rate("images"), name, "images/s", target, note)


def measure() -> list[Row]:
    """Rounds in which every side does one step, in turning order."""
    sides, left_out = start_sides()
    for round_ in range(ROUNDS):
        for place in range(len(sides)):
            sides[(round_ + place) % len(sides)].step()
    for side in sides:
        side.close()
    ours, whole, sgemm, *peers = sides
    if not peers:
        raise SystemExit(f"bench: no peer runs: {'; '.join(left_out)}")
    best = min(peers, key=lambda side: side.median)
    rows = [compare("train_step", ours, best, f"the fastest peer, {best.about['title']}", TARGET, left_out)]
    rows += [compare(f"train_step_{p.name.replace('-', '_')}", ours, p, p.about["title"], None, []) for p in peers]
    rows.append(compare("train_step_whole", whole, ours, "our bare step", None, []))
    rate, limit = (side.rate("flop") / 1e9 for side in (ours, sgemm))
    rows.append(Row("train_step_sgemm_share", rate, limit, sgemm.about["title"], "GFLOP/s"))
    return rows


if __name__ == "__main__":
    run(__file__, measure)
