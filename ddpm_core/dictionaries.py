"""Conditions as look-ups in a dictionary: an exact key, the nearest key, a continuous query against a learned codebook.

Each is an embedder as `ddpm_core.conditioning` describes them, with a row for "nothing", so that classifier-free
guidance works with any.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddpm_core.conditioning import ClassEmbedding

Key = int | str
_SHOWN = 3


class ExactEmbedding(ClassEmbedding):
    """Countable keys, each with a row of its own. A key that is not among them is an error, never a guess.

    Keys become labels where they come in, by :meth:`rows`; the network then works on labels.

    Args:
        keys: all different; their order is that of the rows.
        dim: size of a row.

    Raises:
        ValueError: no keys, or a key twice.

    Example:
        >>> embedding = ExactEmbedding(["circle", "square"], dim=8)
        >>> embedding.rows(["square", None]).tolist()
        [1, 2]
        >>> embedding(embedding.rows(["square"]), 1).shape
        torch.Size([1, 8])
        >>> embedding.rows(["squre"])
        Traceback (most recent call last):
        LookupError: key 'squre' is unknown; nearest of 2 known: 'square', 'circle'
    """

    def __init__(self, keys: Sequence[Key], dim: int) -> None:
        if not keys or len(set(keys)) != len(keys):
            raise ValueError(f"{len(keys)} keys, {len(set(keys))} of them different: expected at least one, none twice")
        super().__init__(len(keys), dim)
        self.keys = tuple(keys)
        self._row = {key: row for row, key in enumerate(self.keys)}

    def rows(self, keys: Sequence[Key | None]) -> Tensor:
        """The labels of keys, None being "nothing".

        Returns:
            (b,) int64 on the CPU.

        Raises:
            LookupError: a key is unknown; the message names it and the nearest known ones, by spelling or by distance
                between numbers.
        """
        if unknown := [key for key in keys if key is not None and key not in self._row]:
            near = ", ".join(map(repr, self._nearest(unknown[0])))
            raise LookupError(f"key {unknown[0]!r} is unknown; nearest of {len(self.keys)} known: {near}")
        return torch.tensor([self.null if key is None else self._row[key] for key in keys], dtype=torch.int64)

    def _nearest(self, key: Key) -> list[Key]:
        if isinstance(key, int):
            numbers = sorted((abs(known - key), known) for known in self.keys if isinstance(known, int))
            if numbers:
                return [known for _, known in numbers[:_SHOWN]]
        by_name = {str(known): known for known in self.keys}
        return [by_name[name] for name in difflib.get_close_matches(str(key), by_name, _SHOWN, cutoff=0.0)]


class NearestEmbedding(nn.Module):
    """Dense countable keys in R^d: a query gets the row of the key nearest to it by Euclidean distance.

    The keys are saved with the weights, as each row belongs to its key. Nothing teaches them or whatever made the
    query: the choice of a row has no gradient.

    Args:
        keys: (n, d) float, finite.
        dim: size of a row.

    Raises:
        ValueError: `keys` has another shape or is not finite.

    Example:
        >>> embedding = NearestEmbedding(torch.tensor([[0.0], [1.0], [4.0]]), dim=8)
        >>> embedding.rows(torch.tensor([[0.4], [0.5], [9.0], [torch.nan]])).tolist()  # a tie takes the first
        [0, 0, 2, 3]
    """

    keys: Tensor

    def __init__(self, keys: Tensor, dim: int) -> None:
        super().__init__()
        if keys.ndim != 2 or not len(keys) or not bool(keys.isfinite().all()):
            raise ValueError(f"keys have shape {tuple(keys.shape)}, expected finite numbers (n, d)")
        self.register_buffer("keys", keys.detach().float().clone())
        self.table = nn.Embedding(len(keys) + 1, dim)

    @property
    def null(self) -> Tensor:
        """NaN: a query with any is "nothing"."""
        return torch.tensor(torch.nan)

    def rows(self, query: Tensor) -> Tensor:
        """(b, d) queries -> (b,) int64 rows; the last row for a query of NaN."""
        return torch.where(is_null(query), len(self.keys), nearest(query, self.keys))

    def forward(self, query: Tensor | None, batch_size: int) -> Tensor:
        """(b, dim) rows for (b, d) queries; the null row for all when `query` is None."""
        if query is None:
            return self.table.weight[len(self.keys)].expand(batch_size, -1)
        return self.table(self.rows(query))  # type: ignore[no-any-return]


class QuantizedEmbedding(nn.Module):
    """A continuous query, replaced by the nearest of learned codes, then embedded by a small network.

    The gradient passes the choice straight through to the query, hence to `encoder`, if that makes it. The codes
    themselves learn from :attr:`auxiliary_loss`, |sg(z) - e|^2 + commitment_weight |z - sg(e)|^2 (sg stops the
    gradient): by gradient and not by moving averages, so that DDP averages it over ranks and micro-batches add up as
    for any other weight. :func:`ddpm_core.losses.p_losses` takes it from the network and adds it to the loss.

    In training under DDP pass queries, dropped ones as NaN, never None: only so every weight gets a gradient.

    **Source**: van den Oord et al. 2017, "Neural discrete representation learning", equations 1 to 3, their beta being
    `commitment_weight`; resets of dead codes as in Dhariwal et al. 2020 (Jukebox), section 3.1.

    Args:
        num_codes: size of the codebook.
        code_dim: size of a code, and of a query where there is no encoder.
        dim: size of an embedding.
        encoder: (b, ...) query -> (b, code_dim), deterministic; None for queries that are such already.
        commitment_weight: at least 0.

    Example:
        >>> embedding = QuantizedEmbedding(num_codes=16, code_dim=2, dim=8)
        >>> embedding(torch.rand(4, 2), 4).shape, embedding.auxiliary_loss.shape
        (torch.Size([4, 8]), torch.Size([4]))
    """

    def __init__(
        self, num_codes: int, code_dim: int, dim: int, *, encoder: nn.Module | None = None,
        commitment_weight: float = 0.25,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder = nn.Identity() if encoder is None else encoder
        self.codebook = nn.Parameter(torch.randn(num_codes, code_dim))
        self.embed = nn.Sequential(nn.Linear(code_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.null_row = nn.Parameter(torch.randn(dim))
        self.commitment_weight = commitment_weight
        self.auxiliary_loss: Tensor | None = None
        """(b,) of the last forward pass in training, until it is taken."""

    @property
    def null(self) -> Tensor:
        """NaN: a query with any is "nothing"."""
        return torch.tensor(torch.nan)

    def rows(self, query: Tensor) -> Tensor:
        """(b, ...) queries without NaN -> (b,) int64 codes nearest to what the encoder makes of them."""
        return nearest(self.encoder(query), self.codebook)

    def forward(self, query: Tensor | None, batch_size: int) -> Tensor:
        """(b, dim) embeddings of (b, ...) queries; the null row for all when `query` is None."""
        if query is None:
            return self.null_row.expand(batch_size, -1)
        null = is_null(query)
        z = self.encoder(torch.where(query.isnan(), 0.0, query)).float()  # NaN would spread through the gradient
        code = self.codebook[nearest(z, self.codebook)]
        if self.training and torch.is_grad_enabled():
            loss = (z.detach() - code).square().sum(1)
            loss = loss + self.commitment_weight * (z - code.detach()).square().sum(1)
            self.auxiliary_loss = torch.where(null, 0.0, loss)
        passed_through = code.detach() + (z - z.detach())  # the value of the code to the last bit, the gradient of z
        return torch.where(null[:, None], self.null_row, self.embed(passed_through))

    @torch.no_grad()
    def reset_dead_codes(self, queries: Tensor, u: Tensor, *, least_uses: int = 1) -> Tensor:
        """Move codes that recent queries don't use onto some of these queries, so that they are used again.

        A function of its arguments and the weights alone. With several ranks the codes stay equal if each rank passes
        equal arguments: the queries of the last global batches (gathered, or read again by their place in the order),
        and `u` drawn by a common seed. Call it between optimizer steps; once before the first it places all codes.

        Args:
            queries: (n, ...) recent queries; those with NaN don't count.
            u: (n,) numbers in [0, 1): the queries with the smallest are taken, so each is as likely as any other.
            least_uses: a code nearest to fewer of the queries than this is dead.

        Returns:
            (num_codes,) bool, where a code was moved: there an optimizer's running moments are out of date. Fewer than
            were dead if the queries run out.
        """
        kept = ~is_null(queries)
        z = self.encoder(queries[kept]).float()
        uses = torch.bincount(nearest(z, self.codebook), minlength=len(self.codebook))
        chosen = z[torch.argsort(u[kept], stable=True)]
        dead = (uses < least_uses).nonzero()[: len(chosen), 0]
        self.codebook[dead] = chosen[: len(dead)].to(self.codebook.dtype)
        moved = torch.zeros_like(uses, dtype=torch.bool)
        moved[dead] = True
        return moved


def nearest(query: Tensor, keys: Tensor) -> Tensor:
    """(b, d) queries, (n, d) keys -> (b,) int64 places of the nearest key; of equally near ones the first."""
    distances = torch.cdist(query.float(), keys.float(), compute_mode="donot_use_mm_for_euclid_dist")
    return distances.detach().argmin(1)


def is_null(query: Tensor) -> Tensor:
    """(b, ...) float queries -> (b,) bool: whether a query has a NaN."""
    return query.isnan().flatten(1).any(1)


def take_auxiliary_loss(network: nn.Module) -> Tensor | None:
    """What parts of a network want to be minimised beside its output, and forget it, so that none counts twice.

    Args:
        network: bare, or wrapped by DDP or torch.compile; each of its modules may leave an `auxiliary_loss`.

    Returns:
        (b,) sum over the modules of the last forward pass in training; None where none has left any.
    """
    total: Tensor | None = None
    for module in network.modules():
        loss = getattr(module, "auxiliary_loss", None)
        if isinstance(loss, Tensor):
            total = loss if total is None else total + loss
            module.auxiliary_loss = None  # type: ignore[assignment]
    return total
