"""How good a classifier of noisy images is, on images that it was not trained on."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddpm_core import NoiseSchedule, q_sample
from pipeline.data.index import ShardIndex
from pipeline.data.pixels import to_unit_range
from pipeline.data.store import ShardStore
from pipeline.runtime.rng import Stream, draw_normal, draw_permutation
from pipeline.runtime.topology import Topology

NUM_QUARTERS = 4


def split_held_out(num_images: int, share: float, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids of the images to train on, and of the others, drawn from all.

    Example:
        >>> train, held_out = split_held_out(10, 0.2, seed=0)
        >>> len(train), len(held_out), len({*train, *held_out})
        (8, 2, 10)
    """
    order = draw_permutation(seed, Stream.HELD_OUT, num_images).numpy()
    count = int(num_images * share)
    return order[count:], order[:count]


@torch.no_grad()
def accuracy_by_quarter(
    classifier: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    index: ShardIndex,
    ids: NDArray[np.int64],
    topology: Topology,
    *,
    seed: int,
    batch_size: int,
) -> dict[str, float]:
    """Share of images whose class is found under noise, by quarter of the chain, cleanest first.

    Each image is noised once in each quarter, at steps that spread evenly over it.

    Args:
        classifier, schedule: on the rank's device.
        ids: of the images, at least one; they are dealt to the ranks.
        seed: of the noise, which is keyed by the image.
        batch_size: images a forward pass.

    Returns:
        `accuracy_q0` to `accuracy_q3`, and `accuracy`, their mean; the same on every rank.
    """
    share, device, store = topology.slice_of(len(ids)), topology.device, ShardStore(index)
    right = torch.zeros(NUM_QUARTERS, dtype=torch.float64, device=device)
    for start in range(share.start, share.stop, batch_size):
        places = torch.arange(start, min(start + batch_size, share.stop), device=device)
        chosen = ids[start : start + len(places)]
        pixels, labels = (torch.from_numpy(part).to(device) for part in store.read(chosen))
        x0, keys = to_unit_range(pixels), torch.from_numpy(chosen).to(device)
        for quarter in range(NUM_QUARTERS):
            inside = (2 * places + 1) / (2 * len(ids))
            t = ((quarter + inside) / NUM_QUARTERS * schedule.num_timesteps).long()
            noise = draw_normal(seed, Stream.HELD_OUT, keys, tuple(x0.shape[1:]), draw=1 + quarter)
            found = classifier(q_sample(schedule, x0, t, noise), t).argmax(1)
            right[quarter] += (found == labels).sum()
    shares = (topology.sum_(right) / len(ids)).tolist()
    by_quarter = {f"accuracy_q{quarter}": value for quarter, value in enumerate(shares)}
    return {"accuracy": sum(shares) / NUM_QUARTERS, **by_quarter}
