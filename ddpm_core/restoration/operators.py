"""Linear degradations with their singular value decompositions, applied axis by axis: no matrix of the whole image."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class LinearOperator(nn.Module, ABC):
    """y = H x on each sample of a batch, as H = U S V^T.

    The spectrum of x, V^T x, is laid out in the shape of x; U^T y in the same shape, zero where H has no row for it.
    Both transforms are orthogonal, so white noise stays white. All numbers are buffers in float64, cast to the dtype of
    what they meet; `.to(device)` moves them.

    Args:
        shape: of one x, without the batch.
        observed_shape: of one y.
        singular_values: `shape`; 0 for what H does not see.
    """

    singular_values: Tensor

    def __init__(self, shape: Sequence[int], observed_shape: Sequence[int], singular_values: Tensor) -> None:
        super().__init__()
        self.shape, self.observed_shape = tuple(shape), tuple(observed_shape)
        self.register_buffer("singular_values", singular_values, persistent=False)

    @abstractmethod
    def to_spectrum(self, x: Tensor) -> Tensor:
        """V^T x: (b, *shape) -> the same."""

    @abstractmethod
    def from_spectrum(self, spectrum: Tensor) -> Tensor:
        """V times a spectrum: (b, *shape) -> the same; undoes :meth:`to_spectrum`."""

    @abstractmethod
    def observation_to_spectrum(self, y: Tensor) -> Tensor:
        """U^T y: (b, *observed_shape) -> (b, *shape), which is S V^T x where y = H x."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """H x: (b, *shape) -> (b, *observed_shape)."""

    def pseudo_inverse(self, y: Tensor) -> Tensor:
        """V S^+ U^T y, the smallest x that explains y: (b, *observed_shape) -> (b, *shape)."""
        s = self.singular_values.to(y.dtype)
        return self.from_spectrum(torch.where(s > 0, self.observation_to_spectrum(y) / s, 0))

    def check(self, tensor: Tensor, shape: tuple[int, ...], name: str) -> None:
        """Raise where one sample of `tensor` is not of `shape`.

        Raises:
            ValueError: so it is.
        """
        if tensor.shape[1:] != shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected (b, {', '.join(map(str, shape))})")


class Inpaint(LinearOperator):
    """Some values are seen, the others are 0 in y. H is the mask itself, and so are its singular values.

    Args:
        mask: one sample's shape; true or 1 where x is seen.
    """

    def __init__(self, mask: Tensor) -> None:
        super().__init__(mask.shape, mask.shape, mask.bool().double())

    def to_spectrum(self, x: Tensor) -> Tensor:
        """x itself."""
        self.check(x, self.shape, "x")
        return x

    def from_spectrum(self, spectrum: Tensor) -> Tensor:
        """The spectrum itself."""
        return spectrum

    def observation_to_spectrum(self, y: Tensor) -> Tensor:
        """y, and 0 where nothing is seen, whatever y holds there."""
        self.check(y, self.observed_shape, "y")
        return torch.where(self.singular_values > 0, y, 0)

    def forward(self, x: Tensor) -> Tensor:
        """x where it is seen, 0 elsewhere."""
        return self.observation_to_spectrum(x)


class Separable(LinearOperator):
    """A small matrix on each axis. The decomposition of a product of such is the product of theirs.

    Args:
        axes: one an axis of x: a matrix (m, n) with m <= n, or the size n of an axis that is left as it is.

    Raises:
        ValueError: a matrix has more rows than columns.

    Example:
        >>> operator = Separable([3, torch.tensor([[0.5, 0.5]])])
        >>> operator.shape, operator.observed_shape
        ((3, 2), (3, 1))
        >>> operator(torch.tensor([[[0.0, 4.0]] * 3])).flatten().tolist()
        [2.0, 2.0, 2.0]
    """

    def __init__(self, axes: Sequence[Tensor | int]) -> None:
        singular_values = torch.ones((), dtype=torch.float64)
        shape, observed_shape = [], []
        decomposed: list[tuple[Tensor, Tensor] | None] = []
        for axis in axes:
            values, factors = (torch.ones(axis).double(), None) if isinstance(axis, int) else _decompose(axis)
            decomposed.append(factors)
            shape.append(len(values))
            observed_shape.append(len(values) if factors is None else len(factors[0]))
            singular_values = singular_values[..., None] * values
        super().__init__(shape, observed_shape, singular_values)
        for number, factors in enumerate(decomposed):
            u, v, h = (None, None, None) if factors is None else (*factors, axes[number].double())  # type: ignore[union-attr]
            for name, matrix in (("u", u), ("v", v), ("h", h)):
                self.register_buffer(f"{name}{number}", matrix, persistent=False)

    def to_spectrum(self, x: Tensor) -> Tensor:
        """V^T x."""
        self.check(x, self.shape, "x")
        return self._along("v", x, transposed=True)

    def from_spectrum(self, spectrum: Tensor) -> Tensor:
        """V times a spectrum."""
        return self._along("v", spectrum)

    def observation_to_spectrum(self, y: Tensor) -> Tensor:
        """U^T y, with zeros put after it."""
        self.check(y, self.observed_shape, "y")
        lacking = [n - m for n, m in zip(self.shape, self.observed_shape, strict=True)]
        return functional.pad(self._along("u", y, transposed=True), [p for n in reversed(lacking) for p in (0, n)])

    def forward(self, x: Tensor) -> Tensor:
        """H x."""
        self.check(x, self.shape, "x")
        return self._along("h", x)

    def _along(self, name: str, x: Tensor, *, transposed: bool = False) -> Tensor:
        for number in range(len(self.shape)):
            matrix: Tensor | None = getattr(self, f"{name}{number}")
            if matrix is not None:
                matrix = matrix.to(x.dtype)
                x = (x.movedim(number + 1, -1) @ (matrix if transposed else matrix.T)).movedim(-1, number + 1)
        return x


def _decompose(matrix: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Singular values (n,), zeros where they are rounding or there is no row; U (m, m) and V (n, n)."""
    rows, columns = matrix.shape
    if rows > columns:
        raise ValueError(f"a matrix of an axis has shape {(rows, columns)}, expected no more rows than columns")
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=True)
    s = torch.where(s > s[0] * columns * torch.finfo(torch.float64).eps, s, 0)
    return functional.pad(s, (0, columns - rows)), (u, vh.T.contiguous())


class Denoise(Separable):
    """H is the identity: y is x and noise.

    Args:
        shape: of one x.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        super().__init__(list(shape))


class SuperResolve(Separable):
    """Each block of factor x factor pixels is seen as its mean. Singular values: 1 / factor, one a block.

    Args:
        shape: (c, h, w) of the large image.
        factor: at least 1; divides h and w.

    Raises:
        ValueError: it does not.
    """

    def __init__(self, shape: Sequence[int], factor: int) -> None:
        channels, *sides = shape
        if factor < 1 or any(side % factor for side in sides):
            raise ValueError(
                f"factor is {factor}, expected a whole number that divides {' and '.join(map(str, sides))}"
            )
        means = [torch.eye(side // factor).repeat_interleave(factor, dim=1) / factor for side in sides]
        super().__init__([channels, *means])


class Deblur(Separable):
    """A blur along rows and columns; beyond its edge an image goes on as its last pixel.

    Args:
        shape: (c, h, w).
        kernel: (k,) with k odd: weights along both axes, their sum is left as it is.

    Raises:
        ValueError: the kernel has another shape.
    """

    def __init__(self, shape: Sequence[int], kernel: Tensor) -> None:
        if kernel.ndim != 1 or len(kernel) % 2 == 0:
            raise ValueError(f"kernel has shape {tuple(kernel.shape)}, expected (k,) with k odd")
        channels, *sides = shape
        super().__init__([channels, *(_blur(side, kernel.double()) for side in sides)])


def _blur(size: int, kernel: Tensor) -> Tensor:
    """(size, size): row i holds the kernel about place i, what lies outside added to the first or last place."""
    reach = len(kernel) // 2
    places = torch.arange(size)[:, None] + torch.arange(-reach, reach + 1)
    weights = kernel.expand(size, -1).contiguous()
    return torch.zeros(size, size, dtype=kernel.dtype).scatter_add_(1, places.clamp(0, size - 1), weights)


def gaussian_kernel(deviation: float) -> Tensor:
    """(k,) float64 weights of a Gaussian blur of this many pixels, of sum 1, reaching three deviations to each side.

    Example:
        >>> gaussian_kernel(0.5).round(decimals=3).tolist()
        [0.0, 0.106, 0.787, 0.106, 0.0]
    """
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
    return weights / weights.sum()


class Colourise(Separable):
    """Only the mean of the channels is seen. Singular values: 1 / sqrt(c), one a pixel.

    Args:
        shape: (c, h, w) of the image in colour.
    """

    def __init__(self, shape: Sequence[int]) -> None:
        channels, *sides = shape
        super().__init__([torch.full((1, channels), 1 / channels), *sides])
