"""What a restoration undoes, by its name on the command line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import ddpm_core
from ddpm_core import LinearOperator
from pipeline.errors import UserError


def build_operator(
    task: str, shape: tuple[int, int, int], *, seen: Tensor | None, factor: int | None, kernel: str | None
) -> LinearOperator:
    """What a restoration undoes, on images of `shape` (c, h, w).

    Args:
        task: denoise, inpaint, super_resolve, deblur or colourise.
        shape: of the restored image.
        seen: inpaint: (h, w) bool.
        factor: super_resolve: pixels a side of a block.
        kernel: deblur: as :func:`build_kernel` takes it.

    Raises:
        UserError: what the task needs is missing or does not fit the images.
    """
    try:
        match task:
            case "denoise":
                return ddpm_core.Denoise(shape)
            case "inpaint" if seen is not None:
                return ddpm_core.Inpaint(seen.expand(shape))
            case "super_resolve" if factor is not None:
                return ddpm_core.SuperResolve(shape, factor)
            case "deblur" if kernel is not None:
                return ddpm_core.Deblur(shape, build_kernel(kernel))
            case "colourise":
                if shape[0] != 3:
                    raise UserError("--task colourise needs a model of colour images; this one has 1 channel")
                return ddpm_core.Colourise(shape)
    except ValueError as error:
        raise UserError(f"--task {task}: {error}") from None
    needs = {"inpaint": "--mask FILE", "super_resolve": "--factor F", "deblur": "--kernel KERNEL"}
    raise UserError(f"--task {task} needs {needs[task]}")


def build_kernel(text: str) -> Tensor:
    """(k,) float64 weights of sum 1: `gaussian:DEVIATION_PX`, `box:WIDTH_PX` or the weights themselves, as `1,2,1`.

    Raises:
        UserError: the text is none of these.

    Example:
        >>> build_kernel("1,2,1").tolist()
        [0.25, 0.5, 0.25]
    """
    name, _, number = text.rpartition(":")
    try:
        match name:
            case "gaussian" if 0 < float(number) < math.inf:
                return ddpm_core.gaussian_kernel(float(number))
            case "box" if int(number) > 0:
                return torch.full((int(number),), 1 / int(number), dtype=torch.float64)
            case "":
                weights = torch.tensor([float(weight) for weight in number.split(",")], dtype=torch.float64)
                if 0 < float(weights.sum()) < math.inf:
                    return weights / weights.sum()
    except ValueError:
        pass  # no number where one belongs
    raise UserError(f"--kernel {text}: expected gaussian:DEVIATION, box:WIDTH or weights such as 1,2,1")
