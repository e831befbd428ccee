"""Grids of settings to score: what may be asked for, and what each point is called."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import get_args

from pydantic import ValidationError

from pipeline.engine.candidates import AVERAGE, NETWORK, Candidate
from pipeline.engine.tables import Row, Value, to_text
from pipeline.errors import UserError
from pipeline.sections import SampleParams

AXES = {  # as they are asked for -> the key of params.yaml's `sample`
    "SAMPLER": "sampler",
    "STEPS": "steps",
    "SPACING": "spacing",
    "ETA": "eta",
    "GUIDANCE": "guidance",
    "N": "num_samples",
    "SEED": "seed",
}
SETTINGS = ("checkpoint", "ema", *AXES.values())  # columns that say what a row is of
COST = ("network_calls", "images_per_second")
SHOWN = ("fd_low", "fd_high", "fd_ratio", "kid", "precision", "recall", "class_accuracy", "memorised_share")


@dataclass(frozen=True)
class GridPoint:
    """One combination.

    Args:
        candidate: whose weights.
        ema: which average of them.
        sample: how to draw, and how many.
    """

    candidate: Candidate
    ema: str
    sample: SampleParams

    def settings(self) -> Row:
        """The columns that name it in a table."""
        chosen = {name: getattr(self.sample, name) for name in AXES.values()}
        return {"checkpoint": self.candidate.name, "images_seen": self.candidate.images_seen, "ema": self.ema, **chosen}

    def command(self) -> str:
        """What scores this point again, in a folder with the same params.yaml."""
        asked = {name: str(getattr(self.sample, key)) for name, key in AXES.items()}
        asked = {"CKPT": self.candidate.place, "EMA": self.ema, **asked}
        return " ".join(["make eval", *(f"{name}={shlex.quote(value)}" for name, value in asked.items())])


def parse_axis(name: str, text: str) -> list[Value]:
    """The values of one of :data:`AXES`, by comma, each once.

    Raises:
        UserError: one can't be understood or is not allowed.

    Example:
        >>> parse_axis("STEPS", "5,10,5"), parse_axis("GUIDANCE", "1.5")
        ([5, 10], [1.5])
    """
    read: Callable[[str], Value] = _READERS[name]
    values: dict[Value, None] = {}
    for item in text.split(","):
        try:
            values[read(item.strip())] = None
        except ValueError:
            raise UserError(f"{name}: {item.strip()!r} is {_EXPECTED[name]}") from None
    return list(values)


def _choice(key: str) -> Callable[[str], Value]:
    def read(text: str) -> Value:
        if text not in get_args(SampleParams.model_fields[key].annotation):
            raise ValueError(text)
        return text

    return read


def _known(key: str) -> str:
    return f"unknown; known: {', '.join(get_args(SampleParams.model_fields[key].annotation))}"


def _number(low: float, high: float = math.inf) -> Callable[[str], Value]:
    def read(text: str) -> Value:
        value = float(text)
        if not (math.isfinite(value) and low <= value <= high):
            raise ValueError(text)
        return value

    return read


def _whole(low: int, high: float = math.inf) -> Callable[[str], Value]:
    def read(text: str) -> Value:
        if not (text.isascii() and text.isdecimal() and low <= int(text) <= high):
            raise ValueError(text)
        return int(text)

    return read


_READERS = {
    "SAMPLER": _choice("sampler"),
    "STEPS": _whole(1),
    "SPACING": _choice("spacing"),
    "ETA": _number(0, 1),
    "GUIDANCE": _number(-math.inf),
    "N": _whole(2),
    "SEED": _whole(0, 2**32 - 1),
}
_EXPECTED = {
    "SAMPLER": _known("sampler"),
    "STEPS": "no whole number of at least 1",
    "SPACING": _known("spacing"),
    "ETA": "no number from 0 to 1",
    "GUIDANCE": "no number",
    "N": "no whole number of at least 2, which scores need",
    "SEED": "no whole number from 0 to 2^32 - 1",
}


def parse_ema(text: str) -> list[str]:
    """The values of EMA: `average`, `network`, or widths as numbers above 0.

    Raises:
        UserError: it is none of these.
    """
    values: dict[str, None] = {}
    for item in (item.strip() for item in text.split(",")):
        if item not in (AVERAGE, NETWORK):
            try:
                value = _number(0)(item)
            except ValueError:
                value = 0
            if not value:
                raise UserError(
                    f"EMA: {item!r} is unknown; known: {AVERAGE}, {NETWORK}, a half-life in images such as 4000, or a "
                    "relative width below 1"
                )
        values[item] = None
    return list(values)


def make_grid(
    candidates: Sequence[Candidate], emas: Sequence[str], base: SampleParams, axes: Mapping[str, Sequence[Value]]
) -> list[GridPoint]:
    """All combinations, weights outermost, so that each is loaded once.

    Args:
        candidates, emas: of weights.
        base: params.yaml's `sample`, for what no axis says.
        axes: of :data:`AXES`, those asked for, with their values.

    Raises:
        UserError: settings exclude each other, there are more steps than the model has, guidance by classes is asked
            for a model without, or weights are not kept.
    """
    points = []
    names = [AXES[name] for name in axes]
    for (candidate, ema), values in product(product(candidates, emas), product(*axes.values())):
        try:
            sample = SampleParams.model_validate({**base.model_dump(), **dict(zip(names, values, strict=True))})
        except ValidationError as error:
            raise UserError(f"params.yaml, with what was asked for: sample: {error.errors()[0]['msg']}") from None
        candidate.file(ema)
        _check(candidate, sample)
        points.append(GridPoint(candidate, ema, sample))
    return points


def _check(candidate: Candidate, sample: SampleParams) -> None:
    steps = candidate.spec["schedule"]["timesteps"]
    if sample.steps > steps:
        raise UserError(f"STEPS is {sample.steps}, more than the {steps} of {candidate.name}")
    if sample.guidance != 1 and not candidate.spec["classes"]:
        raise UserError(f"GUIDANCE is {sample.guidance:g}, but {candidate.name} has no classes: use 1")


def varying(rows: Sequence[Row]) -> list[str]:
    """The settings in which rows differ."""
    return [name for name in SETTINGS if len({row[name] for row in rows}) > 1]


def shown_columns(rows: Sequence[Row], headline: str) -> list[str]:
    """Of a table for people: what differs, the cost, the headline score and, of :data:`SHOWN`, those with a value."""
    others = [name for name in SHOWN if any(row.get(name) is not None for row in rows)]
    return [*varying(rows), *COST, headline, *others]


def describe_fixed(rows: Sequence[Row]) -> str:
    """The settings that all rows share, in one line."""
    fixed = [name for name in SETTINGS if name not in varying(rows)]
    return ", ".join(f"{name} {to_text(rows[0][name])}" for name in fixed)
