"""How near the first stage of latent diffusion comes to the images it encodes: the best that samples can be."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from ddpm_core.frechet import Moments
from pipeline.data.index import ShardIndex
from pipeline.data.store import ShardStore
from pipeline.engine.collect import over_ranks
from pipeline.engine.features import Extractor
from pipeline.runtime.topology import Topology


def score_reconstructions(
    index: ShardIndex,
    ids: NDArray[np.int64],
    reconstruct: Callable[[Tensor], Tensor],
    extractor: Extractor,
    topology: Topology,
    *,
    batch_size: int,
) -> tuple[Moments, float]:
    """Feature moments of some images' reconstructions, and their mean PSNR.

    Args:
        index: the images.
        ids: (n,) which of them.
        reconstruct: uint8 (b, c, h, w) -> the same.
        extractor: the feature network.
        topology: each rank takes a contiguous share.
        batch_size: images at once.

    Returns:
        moments and dB over all ranks. An image without any error counts 10 log10(255^2 / (1 / 12)) = 58.9 dB, the error
        of rounding, for a mean that stays finite.
    """
    moments, decibels, store = Moments(extractor.dim), 0.0, ShardStore(index)
    mine = ids[topology.slice_of(len(ids))]
    with tqdm(total=len(mine), unit="img", disable=None if topology.is_main else True, desc="reconstruct") as bar:
        for start in range(0, len(mine), batch_size):
            images = torch.from_numpy(store.read(mine[start : start + batch_size])[0]).to(topology.device)
            made = reconstruct(images)
            moments.add(extractor(made).cpu())
            errors = (made.double() - images.double()).square().flatten(1).mean(1).clamp(min=1 / 12)
            decibels += float((10 * torch.log10(255**2 / errors)).sum())
            bar.update(len(images))
    total = topology.sum_(torch.tensor([decibels], dtype=torch.float64))
    return over_ranks(moments, topology), float(total) / len(ids)
