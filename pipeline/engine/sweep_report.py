"""What is left of a sweep: a folder with table and picture, and the same in MLflow."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.engine.candidates import AVERAGE
from pipeline.engine.curves import choose_x, draw_sweep, make_series
from pipeline.engine.sweeps import AXES, GridPoint, describe_fixed, shown_columns
from pipeline.engine.tables import Row, make_csv, make_markdown, make_table, to_text
from pipeline.lineage import provenance
from pipeline.runtime.files import save_json, save_text, whole_folder
from pipeline.runtime.tracking import Tracker


@dataclass(frozen=True)
class Scored:
    """A point and what came of it.

    Args:
        key: of all that determines the scores.
        point: settings and weights.
        network_calls: for one image.
        images_per_second: over all ranks, sampling and features; None where that was not measured.
        scores: by name, the headline among them; None where there is no such score.
        protocol: what two scores must share to be compared.
        hashes: of the weights.
    """

    key: str
    point: GridPoint
    network_calls: float
    images_per_second: float | None
    scores: dict[str, float | None]
    protocol: str
    hashes: dict[str, str]

    def row(self) -> Row:
        """Of the table."""
        cost: Row = {"network_calls": self.network_calls, "images_per_second": self.images_per_second}
        return {**self.point.settings(), **cost, **self.scores, "protocol": self.protocol, "key": self.key}

    def summary(self, headline: str) -> str:
        """One line for the log."""
        s, speed = self.point.settings(), self.images_per_second
        told = [f"{s['checkpoint']} {s['ema']}, {s['sampler']} {s['steps']} steps, guidance {s['guidance']:g}"]
        told += [f"{headline} {to_text(self.scores.get(headline))}", f"{self.network_calls:g} calls"]
        return ", ".join([*told, f"{speed:.0f} images/s"] if speed else told)

    def record(self) -> dict[str, Any]:
        """Of sweep.json: how to make the row again, and what it was made of."""
        candidate = self.point.candidate
        return {
            **self.row(),
            "reproduce": self.point.command(),
            "path": candidate.place,
            "train_key": candidate.train_key,
            "sample": self.point.sample.model_dump(mode="json"),
            "sha256": self.hashes,
        }


def write_report(
    folder: Path, results: Sequence[Scored], headline: str, reference: Mapping[str, Any], command: str
) -> str:
    """Write table.csv, table.md, plot.png and sweep.json.

    Args:
        folder: replaced if it exists.
        results: in the order of the table.
        headline: the score on the picture's vertical axis, the lower the better.
        reference: of reference.json: what the scores are measured against.
        command: that made all of it.

    Returns:
        the table for a terminal, what all rows share above it.
    """
    rows = [one.row() for one in results]
    columns = shown_columns(rows, headline)
    fixed, protocols = describe_fixed(rows), list(dict.fromkeys(one.protocol for one in results))
    with whole_folder(folder) as aside:
        save_text(aside / "table.csv", make_csv(rows))
        x = draw_sweep(aside / "plot.png", rows, headline, "; ".join([*protocols[:2], fixed]))
        picture = "![](plot.png)\n\n" if x else ""
        shared = f"All rows: {fixed}.\n\n" if fixed else ""
        text = f"# {folder.name}\n\n{shared}{make_markdown(rows, columns)}\n\n{picture}"
        listed = "\n".join(f"- {one}" for one in protocols)
        again = "\n".join(one.point.command() for one in results)
        text += f"Protocol:\n{listed}\n\nEach row again:\n```\n{again}\n```\n"
        save_text(aside / "table.md", text)
        content = {
            "name": folder.name,
            "command": command,
            "headline": headline,
            "protocols": protocols,
            "reference": dict(reference),
            **provenance(),
            "rows": [one.record() for one in results],
        }
        save_json(aside / "sweep.json", content)
    return (f"{fixed}\n" if fixed else "") + make_table(rows, columns)


def log_point(tracker: Tracker, one: Scored) -> None:
    """A run of its own for one point, below the sweep's."""
    settings = one.point.settings()
    step = int(settings.pop("images_seen") or 0)
    numbers = {"network_calls": one.network_calls, "images_per_second": one.images_per_second, **one.scores}
    candidate, origin = one.point.candidate, provenance()
    ema = "" if one.point.ema == AVERAGE else f"-{one.point.ema}"
    tracker.log_child(
        one.key,
        run_name=f"{settings['sampler']}-{settings['steps']}-g{settings['guidance']:g}-{candidate.name}{ema}",
        params={**settings, "path": candidate.place},
        metrics={f"eval/{name}": value for name, value in numbers.items() if value is not None},
        step=step,
        tags={
            "protocol": one.protocol,
            "model.train_key": candidate.train_key or "",  # not train_key: by that the training's own run is found
            "weights_sha256": one.hashes["weights"],
            "reproduce": one.point.command(),
            "mlflow.source.name": "pipeline.sweep",
            **{name: origin[name] for name in ("git_commit", "mlflow.source.git.commit") if name in origin},
        },
    )


def log_sweep(tracker: Tracker, folder: Path, results: Sequence[Scored], headline: str) -> None:
    """Curves, settings and files of the whole: the score over network calls or over images seen, a curve a line."""
    rows = [one.row() for one in results]
    x = choose_x(rows)
    if x != "guidance":  # MLflow's steps are whole numbers
        for name, points in make_series(rows, x, headline).items():
            curve = re.sub("[^0-9A-Za-z_. /-]", "-", "/".join(["sweep", headline, *([name] if name else [])]))
            for at, values in points:
                tracker.log_metrics({curve: sum(values) / len(values)}, round(at), replace=False)
    axes = {
        key: ",".join(dict.fromkeys(str(row[key]) for row in rows)) for key in ("checkpoint", "ema", *AXES.values())
    }
    tracker.log_params(axes)
    found = {float(value): one for one in results if (value := one.scores[headline]) is not None}
    tracker.set_tags({"best": found[min(found)].point.command(), "protocol": results[0].protocol})
    tracker.log_metrics({f"eval/{headline}": min(found), "eval/points": len(results)}, 0)
    for path in sorted(folder.iterdir()):
        tracker.log_artifact(path, "sweep")
