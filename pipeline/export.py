"""A trained model for other programs: `python -m pipeline.export [torch] [onnx]`. Weights and a model card always."""

from __future__ import annotations

import argparse
import logging
import shutil
from pathlib import Path
from typing import Any

from pipeline import paths
from pipeline.engine.card import make_card
from pipeline.engine.export import FORMATS, export_denoiser
from pipeline.errors import UserError
from pipeline.lineage import provenance
from pipeline.models import load_model, resolve_model
from pipeline.runtime.files import load_json, save_text, sha256_file, whole_folder
from pipeline.runtime.process import run_stage

log = logging.getLogger(__name__)


def main() -> None:
    """Write everything into one folder, which appears when each file has been compared with the model."""
    arguments = parse()
    source = resolve_model(arguments.model)
    model = load_model(source)
    spec = model.spec
    with whole_folder(arguments.out) as aside:
        for path in (*source.glob("*.safetensors"), source / "model.json"):
            shutil.copyfile(path, aside / path.name)
        scores = find_scores(spec["lineage"])
        save_text(aside / "README.md", make_card(spec, scores, find_data(spec["lineage"]), provenance()))
        if scores is not None and paths.SAMPLE_GRID.exists():
            shutil.copyfile(paths.SAMPLE_GRID, aside / "samples.png")
        for name in dict.fromkeys(arguments.formats):
            path, difference = export_denoiser(model.network, spec, model.schedule.num_timesteps, name, aside)
            log.info("export: %s, at most %.1e from the model (of its largest output)", path.name, difference)
    log.info("export: done, %s", ", ".join(sorted(str(path) for path in arguments.out.iterdir())))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.export", description=__doc__)
    parser.add_argument("formats", nargs="*", metavar="torch|onnx", help="the denoiser as a file")
    parser.add_argument("--model", default=paths.MODEL, help="folder, or models:/NAME@ALIAS of MLflow (default: model)")
    parser.add_argument("--out", type=Path, default=Path("export"), help="folder to write (default: export)")
    arguments = parser.parse_args()
    if unknown := set(arguments.formats) - set(FORMATS):
        raise UserError(f"export: format {', '.join(sorted(unknown))} is unknown; known: {', '.join(FORMATS)}")
    return arguments


def find_scores(lineage: dict[str, Any]) -> dict[str, Any] | None:
    """metrics/evaluate.json, if it speaks of this very training."""
    try:
        scores: dict[str, Any] = load_json(paths.EVALUATE_METRICS)
    except (OSError, ValueError):
        return None
    return scores if scores.get("train_key") == lineage["train_key"] else None


def find_data(lineage: dict[str, Any]) -> dict[str, Any] | None:
    """metrics/shard.json, if the shards beside it are those of the training."""
    try:
        report: dict[str, Any] = load_json(paths.SHARD_REPORT)
        return report if sha256_file(paths.SHARD_INDEX) == lineage["shard_index_sha256"] else None
    except (OSError, ValueError):
        return None


if __name__ == "__main__":
    run_stage(main)
