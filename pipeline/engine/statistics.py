"""Feature statistics as other programs keep them: `.npz` files with `mu` and `sigma`."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm_core.frechet import Moments
from pipeline.errors import UserError
from pipeline.runtime.files import whole_file

_ASSUMED_N = 50_000


def write_statistics(path: Path, moments: Moments) -> None:
    """Write `mu` (d,), `sigma` (d, d), both float64 and unbiased, and `n`, which other programs leave alone.

    Raises:
        ValueError: fewer than 2 features.
    """
    mean, covariance = moments.mean().numpy(), moments.covariance().numpy()
    with whole_file(path) as aside, open(aside, "wb") as file:
        np.savez(file, mu=mean, sigma=covariance, n=np.int64(moments.n))


def read_statistics(path: Path, dim: int) -> Moments:
    """The moments of a set of which only `mu` and `sigma` are known.

    Args:
        path: an .npz with `mu`, `sigma`, and `n` where we wrote it.
        dim: of the extractor that the statistics shall be compared with.

    Returns:
        moments with this mean and covariance. Without `n` they count as 50,000 features, as most published ones are of;
        the number changes nothing in a Frechet distance but the rounding that is allowed for.

    Raises:
        UserError: unreadable, of another dimension, not finite, or `sigma` is no covariance.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: not a readable .npz of mu and sigma ({error.strerror})") from None
    return parse_statistics(content, str(path), dim)


def parse_statistics(content: bytes, name: str, dim: int) -> Moments:
    """As :func:`read_statistics`, of a file's bytes; `name` says in errors what they are."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            if missing := [key for key in ("mu", "sigma") if key not in arrays.files]:
                raise UserError(f"{name}: no {' and no '.join(missing)} in it; expected the arrays mu and sigma")
            mean, covariance = (torch.from_numpy(arrays[key].astype(np.float64)) for key in ("mu", "sigma"))
            n = int(arrays["n"]) if "n" in arrays.files else _ASSUMED_N
    except (OSError, ValueError, TypeError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{name}: not a readable .npz of mu and sigma ({str(error).splitlines()[0]})") from None
    if mean.shape != (dim,) or covariance.shape != (dim, dim):
        raise UserError(
            f"{name}: mu is {tuple(mean.shape)} and sigma {tuple(covariance.shape)}, but the extractor gives {dim} "
            "features: use statistics of the same extractor"
        )
    return _moments(name, n, mean, covariance)


def _moments(name: str, n: int, mean: Tensor, covariance: Tensor) -> Moments:
    largest = float(covariance.abs().max())
    if n < 2 or float((covariance - covariance.T).abs().max()) > 1e-6 * largest or not largest < float("inf"):
        raise UserError(f"{name}: sigma is not finite and symmetric, or n is below 2: it is no covariance of a set")
    outer = (n - 1) * (covariance + covariance.T) / 2 + n * torch.outer(mean, mean)
    try:
        return Moments.from_tensors(torch.tensor(n), n * mean, outer)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from None
