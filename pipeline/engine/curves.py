"""The picture of a sweep: quality against what it costs, or against what was varied."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.engine.sweeps import varying
from pipeline.engine.tables import Row, to_text
from pipeline.runtime.files import whole_file

X_LABELS = {
    "network_calls": "network calls an image",
    "images_seen": "images seen in training",
    "guidance": "guidance scale",
}
_LOG = ("network_calls", "images_seen")
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
_MARKERS = "osD^vP*X"
_WIDE_RANGE = 8  # from here on a logarithmic axis shows more than a linear one
_MOST_IN_LEGEND = 16


def choose_x(rows: Sequence[Row]) -> str:
    """What the horizontal axis is: network calls where steps differ, else the training, else guidance, else calls."""
    names = varying(rows)
    if "steps" in names or "sampler" in names:
        return "network_calls"
    if len({row["images_seen"] for row in rows} - {None}) > 1:
        return "images_seen"
    return "guidance" if "guidance" in names else "network_calls"


def make_series(rows: Sequence[Row], x: str, score: str) -> dict[str, list[tuple[float, list[float]]]]:
    """Lines by name: (x, values there) in rising order of x; several values are those of several seeds.

    A line is what rows share but for x and the seed.
    """
    along = {"network_calls": {"steps"}, "images_seen": {"checkpoint"}, "guidance": {"guidance"}}[x] | {"seed"}
    names = [name for name in varying(rows) if name not in along]
    points: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        place, value = row.get(x), row.get(score)
        if isinstance(place, int | float) and isinstance(value, int | float):
            points[", ".join(_part(name, row) for name in names)][float(place)].append(float(value))
    return {name: sorted(line.items()) for name, line in points.items()}


def _part(name: str, row: Row) -> str:
    text = to_text(row[name])
    return text if isinstance(row[name], str) else f"{name.replace('num_samples', 'N')} {text}"


def draw_sweep(path: Path, rows: Sequence[Row], score: str, note: str) -> str | None:
    """Write the picture as PNG: a line for each sampler, guidance and whatever else differs, a point for each row.

    Args:
        path: of the file.
        rows: with the columns of a table, the score among them.
        score: on the vertical axis, the lower the better.
        note: small print below: what the score is of.

    Returns:
        the column on the horizontal axis; None, and no file, where no row has both numbers.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import; no display, no global state
    from matplotlib.figure import Figure

    x = choose_x(rows)
    lines = make_series(rows, x, score)
    if not lines:
        return None
    figure = Figure(figsize=(6.4, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, (name, points) in enumerate(lines.items()):
        _draw_line(axes, place, name, points)
    places = sorted({at for points in lines.values() for at, _ in points})
    values = [value for points in lines.values() for _, several in points for value in several]
    _scale(axes, x, places, values)
    axes.set_xlabel(X_LABELS[x])
    axes.set_ylabel(f"{score} (lower is better)")
    axes.grid(alpha=0.25, which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    if 1 < len(lines) <= _MOST_IN_LEGEND:
        axes.legend(frameon=False, fontsize=9)
    figure.text(0.01, -0.02, note, fontsize=6.5, color="0.35", ha="left", va="top", wrap=True)
    with whole_file(path) as aside:
        figure.savefig(aside, format="png", dpi=180, bbox_inches="tight", metadata={"Software": None})
    return x


def _draw_line(axes: Any, place: int, name: str, points: Sequence[tuple[float, list[float]]]) -> None:
    """The mean over seeds; bars from the lowest to the highest where there are several."""
    at = [where for where, _ in points]
    means = [sum(values) / len(values) for _, values in points]
    spread = [[m - min(v) for m, (_, v) in zip(means, points, strict=True)],
              [max(v) - m for m, (_, v) in zip(means, points, strict=True)]]  # fmt: skip
    several = any(len(values) > 1 for _, values in points)
    axes.errorbar(
        at, means, yerr=spread if several else None, label=name, capsize=2.5, linewidth=1.4, markersize=5,
        color=_COLOURS[place % len(_COLOURS)], marker=_MARKERS[place % len(_MARKERS)],
        linestyle=("-", "--", ":")[place // len(_COLOURS) % 3],
    )  # fmt: skip


def _scale(axes: Any, x: str, places: Sequence[float], values: Sequence[float]) -> None:
    """Logarithmic axes, labelled with plain numbers: of cost always, of the score where it covers a wide range."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

    plain = FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
    if x in _LOG and places[0] > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_apart(places)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(plain)
    if min(values) > 0 and max(values) / min(values) > _WIDE_RANGE:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(plain)
        axes.yaxis.set_minor_formatter(NullFormatter())


def _apart(places: Sequence[float], ratio: float = 1.25) -> list[float]:
    """Of rising numbers those that lie far enough apart to be written side by side; the last is kept.

    Example:
        >>> _apart([5, 9, 10, 19, 20, 50])
        [5, 10, 20, 50]
    """
    kept = [places[-1]]
    for place in reversed(places[:-1]):
        if kept[-1] / place >= ratio:
            kept.append(place)
    return kept[::-1]
