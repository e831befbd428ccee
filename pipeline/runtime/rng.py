"""Random numbers as a pure function of (seed, stream, position): the same on any machine, rank, worker or batch size.

Philox4x32-10, the counter-based generator of Salmon et al. 2011, written in integer tensor operations so that it runs
on the device where the numbers are used. There is no state to save: a position is an
image's place in the training order, or a sample's seed.

**Source**: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3.
"""

from __future__ import annotations

import math
from enum import IntEnum, unique

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


@unique
class Stream(IntEnum):
    """What a number is for. Two purposes never share numbers."""

    TIMESTEP = 1
    NOISE = 2
    LABEL_DROPOUT = 3
    FLIP = 4
    SAMPLE = 5
    ORDER = 6
    HALVES = 7
    DROPOUT = 8
    CONTEXT = 9
    SAMPLE_CONTEXT = 10
    SAMPLE_IMAGE = 11
    SHARDS = 16
    WINDOW = 17
    BALANCE = 18
    MIX = 19
    HELD_OUT = 20
    POSTERIOR = 24  # of the autoencoder, in its own training
    LATENT = 25  # of the autoencoder, in the training on its latents
    LIKELIHOOD = 28
    RESTORE = 29
    DEGRADE = 30
    SCORES = 31


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 tensors of one shape with values in [0, 2**32).
        key: two numbers in [0, 2**32).

    Returns:
        four int64 tensors of that shape with values in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of the product of two unsigned 32-bit numbers, without leaving signed 64 bits."""
    low_part = a * (b & 0xFFFF)
    middle = (low_part >> 16) + a * (b >> 16)  # both terms below 2**48
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low_part & 0xFFFF)


def _words(seed: int, stream: Stream, positions: Tensor, num_words: int, draw: int) -> Tensor:
    """int64 words in [0, 2**32) of shape (len(positions), num_words rounded up to a multiple of 4)."""
    blocks = torch.arange(math.ceil(num_words / 4), device=positions.device)
    place = positions.to(torch.int64)[:, None]
    shape = (len(positions), len(blocks))
    counter = (
        blocks[None].expand(shape),
        torch.full(shape, draw, device=positions.device, dtype=torch.int64),
        (place & _MASK).expand(shape),
        ((place >> 32) & _MASK).expand(shape),
    )
    return torch.stack(philox(counter, (seed & _MASK, int(stream))), dim=-1).flatten(1)


def draw_uniform(seed: int, stream: Stream, positions: Tensor, *, draw: int = 0) -> Tensor:
    """One number in [0, 1) for each position.

    Args:
        seed: in [0, 2**32).
        stream: what the numbers are for.
        positions: (b,) integers in [0, 2**62).
        draw: which of several independent draws of one position, in [0, 2**32).

    Returns:
        (b,) float64 on the device of `positions`, a multiple of 2**-32.

    Example:
        >>> places = torch.tensor([5, 6, 7])
        >>> torch.equal(draw_uniform(0, Stream.FLIP, places)[1:], draw_uniform(0, Stream.FLIP, places[1:]))
        True
    """
    return _words(seed, stream, positions, 1, draw)[:, 0].double() * 2.0**-32


def draw_normal(seed: int, stream: Stream, positions: Tensor, shape: tuple[int, ...], *, draw: int = 0) -> Tensor:
    """Standard normal numbers by the Box-Muller transform.

    Args:
        seed: in [0, 2**32).
        stream: what the numbers are for.
        positions: (b,) integers in [0, 2**62).
        shape: the shape of one position's numbers; their count must stay below 2**34.
        draw: which of several independent draws of one position, in [0, 2**32): a sampler's step.

    Returns:
        (b, *shape) float32 on the device of `positions`; at most 6.77 in absolute value. The underlying integers are
        the same on every device, the logarithm and cosine only to the last bits.
    """
    count = math.prod(shape)
    half = math.ceil(count / 2)
    words = _words(seed, stream, positions, 2 * half, draw)
    radius = ((words[:, :half] + 0.5) * 2.0**-32).float().log_().mul_(-2.0).sqrt_()
    angle = words[:, half : 2 * half].float() * (2.0**-32 * 2.0 * math.pi)
    normal = torch.cat((radius * torch.cos(angle), radius * torch.sin(angle)), dim=1)
    return normal[:, :count].reshape(len(positions), *shape)


def draw_permutation(seed: int, stream: Stream, count: int, *, draw: int = 0) -> Tensor:
    """A random order of the numbers 0..count-1, by sorting one 63-bit key each.

    Args:
        seed: in [0, 2**32).
        stream: what the order is for.
        count: at least 1.
        draw: which of several independent orders, in [0, 2**32): an epoch.

    Returns:
        (count,) int64 on the CPU.
    """
    keys = torch.empty(count, dtype=torch.int64)
    for start in range(0, count, 1 << 18):  # bounds the memory of the generator's words
        positions = torch.arange(start, min(start + (1 << 18), count))
        words = _words(seed, stream, positions, 2, draw)
        keys[positions] = (words[:, 0] << 31) ^ words[:, 1]
    return torch.argsort(keys, stable=True)


def draw_integer(seed: int, stream: Stream, position: int) -> int:
    """One number in [0, 2**32) for one position, to seed a generator that can't be keyed otherwise."""
    return int(_words(seed, stream, torch.tensor([position]), 1, 0)[0, 0])
