"""Bits per dimension of a set of images under a trained model, over all ranks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddpm_core import Denoiser, NoiseSchedule, bits_per_dim
from pipeline.data.index import ShardIndex
from pipeline.data.pixels import to_unit_range
from pipeline.data.store import ShardStore
from pipeline.runtime.rng import Stream, draw_normal
from pipeline.runtime.topology import Topology

_SET_STRIDE = 2**40  # no set has so many images: sets never share noise


@dataclass(frozen=True)
class Likelihood:
    """What :func:`measure_likelihood` found, in bits per dimension.

    Args:
        ids: (n,) which images.
        total, prior: (n,) float64, of each image: the bound, and its part from the end of the chain.
        terms: (T,) float64, of each step: the mean over the images.
    """

    ids: NDArray[np.int64]
    total: NDArray[np.float64]
    prior: NDArray[np.float64]
    terms: NDArray[np.float64]

    @property
    def bits_per_dim(self) -> float:
        """The mean over the images."""
        return float(self.total.mean())

    @property
    def standard_error(self) -> float | None:
        """Of that mean, from the spread between images; None for one image."""
        n = len(self.total)
        return float(self.total.std(ddof=1) / n**0.5) if n > 1 else None


def spread_ids(num_images: int, most: int) -> NDArray[np.int64]:
    """At most `most` image numbers, evenly spread over the set, the same each time.

    Example:
        >>> spread_ids(10, 4).tolist(), spread_ids(3, 100).tolist()
        ([0, 3, 6, 9], [0, 1, 2])
    """
    return np.unique(np.linspace(0, num_images - 1, min(most, num_images)).astype(np.int64))


def measure_likelihood(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    index: ShardIndex,
    ids: NDArray[np.int64],
    topology: Topology,
    *,
    seed: int,
    set_number: int,
    batch_size: int,
    parameterization: str,
    learned_variance: bool = False,
    label: str = "likelihood",
) -> Likelihood:
    """All T terms of the bound for some images of a set; T network calls a batch.

    Batches of `batch_size` are dealt to the ranks in turn, so a batch is the same one for any number of ranks, and only
    the order of float64 sums differs. Noise is keyed by the image's number in its set and the step.

    Args:
        denoiser, schedule: on the rank's device; the denoiser is given the labels where the set has classes.
        index: the set.
        ids: (n,) which images of it.
        topology: the world.
        seed: of the noise, in [0, 2**32).
        set_number: of the set; sets of different numbers are given different noise.
        batch_size: images a forward pass.
        parameterization, learned_variance: as in `bits_per_dim`.
        label: of the progress bar, which counts network calls.

    Returns:
        the result, complete on every rank.
    """
    store, device, num_steps = ShardStore(index), topology.device, schedule.num_timesteps
    total, prior, terms = (torch.zeros(n, dtype=torch.float64) for n in (len(ids), len(ids), num_steps))
    starts = range(0, len(ids), batch_size)[topology.rank :: topology.world_size]
    bar = tqdm(total=len(starts) * num_steps, unit="call", disable=None if topology.is_main else True, desc=label)
    with bar:
        for start in starts:
            part = slice(start, start + batch_size)
            images, labels = store.read(ids[part])
            x0 = to_unit_range(torch.from_numpy(images).to(device))
            positions = torch.from_numpy(ids[part]).to(device) + set_number * _SET_STRIDE

            def noise(step: int, positions: Tensor = positions, shape: torch.Size = x0.shape[1:]) -> Tensor:
                bar.update()
                return draw_normal(seed, Stream.LIKELIHOOD, positions, shape, draw=step)

            bits = bits_per_dim(
                denoiser, schedule, x0, noise, torch.from_numpy(labels).to(device) if index.num_classes else None,
                parameterization=parameterization, learned_variance=learned_variance,
            )  # fmt: skip
            total[part], prior[part] = bits.total.cpu().double(), bits.prior.cpu().double()
            terms += bits.terms.cpu().double().sum(dim=1)
    for values in (total, prior, terms):
        topology.sum_(values)
    return Likelihood(ids, total.numpy(), prior.numpy(), (terms / len(ids)).numpy())
