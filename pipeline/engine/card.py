"""A model card: what a stranger must know of a model, taken from its lineage and its measured scores alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.engine.checkpoint import image_form


def make_card(
    spec: Mapping[str, Any], scores: Mapping[str, Any] | None, data: Mapping[str, Any] | None, origin: Mapping[str, str]
) -> str:
    """Markdown with the metadata block that model hubs read.

    Args:
        spec: what model.json says, lineage included.
        scores: metrics/evaluate.json of this very model, or None.
        data: metrics/shard.json of the shards it was trained on, or None.
        origin: git commit and the like of the repository the card is made in.
    """
    network, lineage, classes = spec["network"], spec["lineage"], spec["classes"]
    channels, pixels = image_form(spec)
    size = f"{channels} x {pixels} x {pixels}"
    task = "class-conditional-image-generation" if classes else "unconditional-image-generation"
    knows = f"Classes: {_listed(classes)}." if classes else "It knows no classes."
    example = json.dumps(classes[:3]) if classes else "num_images=4"
    unknown = "unknown where this card was made"
    training = {
        "network": ", ".join(f"{name} {_plain(value)}" for name, value in network.items()),
        "predicts": spec["parameterization"],
        "schedule": ", ".join(f"{name} {_plain(value)}" for name, value in spec["schedule"].items()),
        "images seen": f"{lineage['images_seen']:,}",
        "precision": lineage["precision"],
        **{name.replace("_", " "): _plain(value) for name, value in lineage["train"].items()},
    }
    blocks = [
        f"---\nlibrary_name: ddpm-pipeline\ntags: [diffusion, ddpm, {task}]\n---",
        f"# Diffusion model, {size}" + (f", {len(classes)} classes" if classes else ""),
        f"Generates images from noise. {knows} It draws what its training images showed, in the shares they had.",
        "## Use",
        "```python\nfrom pipeline.models import load_model\n\n"
        f"images = load_model(FOLDER).sample({example}, seed=0)  # uint8 (n, c, h, w)\n```",
        "Image i depends on the seed, on i and on its label alone.",
        "## Scores",
        *_scores(scores),
        "## Training",
        _table(training),
        "The weights are their exponential moving average over the training.",
        "## Data",
        _table({
            "images": f"{data['num_images']:,}" if data else unknown,
            "refused files": f"{data['num_refused']:,}" if data else unknown,
            "sha256 of the shard index": lineage["shard_index_sha256"],
        }),
        "## Where it comes from",
        _table({"train key": lineage["train_key"], "sha256 of the code": lineage["code_sha256"], **origin}),
        "The train key is a hash of parameters, data and code: where it is the same, on the same kind of machine, so "
        "are the weights.",
    ]  # fmt: skip
    return "\n\n".join(blocks) + "\n"


def _scores(scores: Mapping[str, Any] | None) -> list[str]:
    if scores is None:
        return ["None: no evaluation of these weights was at hand when this card was made."]
    numbers = {
        name: f"{value:.4g}" if isinstance(value, float) else f"{value:,}"
        for name, value in scores.items()
        if isinstance(value, int | float)
    }
    return [_table(numbers), f"Protocol: {scores['protocol']}. Scores of another protocol do not compare."]


def _table(rows: Mapping[str, str]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
