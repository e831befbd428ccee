"""Small projects in a folder of their own: the code copied, the parameters cut down, digits as the user's images."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from pipeline.lineage import ROOT

TINY = {
    "data.raw": "images",
    "shard.shard_images": 50,
    "model.base_channels": 8,
    "model.channel_multipliers": [1],
    "model.num_blocks": 1,
    "train.total_images": 320,
    "train.batch_size": 16,
    "train.warmup_images": 32,
    "train.log_every_images": 32,
    "train.checkpoint_every_images": 64,
    "train.preview_every_images": 160,
    "train.ema_half_life_images": 100,
    "sample.num_samples": 60,
    "sample.steps": 4,
}

TINY_LATENT = {
    "shard.image_size": 16,
    "reference.floor_images": 20,
    "model.base_channels": 16,
    "autoencoder.factor": 2,
    "autoencoder.base_channels": 8,
    "autoencoder.total_images": 320,
    "autoencoder.batch_size": 16,
    "autoencoder.warmup_images": 32,
    "autoencoder.log_every_images": 32,
    "autoencoder.checkpoint_every_images": 64,
    "autoencoder.preview_every_images": 160,
    "autoencoder.ema_half_life_images": 50,
    "autoencoder.discriminator_channels": 8,
    "autoencoder.discriminator_layers": 1,
    "encode.shard_images": 50,
}


def make_latent_project(folder: Path, **changes: Any) -> Path:
    """As :func:`make_project`, with the sections of recipes/latent that make it one of latents."""
    sections = YAML(typ="safe").load((ROOT / "recipes/latent/params.yaml").read_text())
    optional = {name: sections[name] for name in ("autoencoder", "encode")}
    return make_project(
        folder, optional=optional, **{k.replace(".", "__"): v for k, v in TINY_LATENT.items()}, **changes
    )


def make_project(
    folder: Path,
    *,
    num_images: int = 120,
    num_classes: int = 3,
    recipe: str = "",
    optional: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """A copy of the pipeline in `folder` with `num_images` digits in `images/`; `optional` sections are added to
    params.yaml; `changes` like train__seed=1.

    With a `recipe` such as recipes/guided the parameters and dvc.yaml are that recipe's; it is not moved there.
    """
    for name in ("pipeline", "ddpm_core"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / recipe / "dvc.yaml", folder)
    shutil.copy(ROOT / ".dvcignore", folder)
    yaml = YAML()
    params = yaml.load((ROOT / recipe / "params.yaml").read_text())
    params.update(optional or {})
    for key, value in {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        section, name = key.split(".")
        assert name in params[section], key
        params[section][name] = value
    with open(folder / "params.yaml", "w") as file:
        yaml.dump(params, file)
    _write_digits(folder / "images", num_images, num_classes)
    return folder


def _write_digits(folder: Path, num_images: int, num_classes: int) -> None:
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    for i, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / (str(label % num_classes) if num_classes else "")
        place.mkdir(parents=True, exist_ok=True)
        if i < num_images:
            Image.fromarray((pixels * 255 / 16).round().astype("uint8")).save(place / f"digit {i:04d}.png")


def environment(**extra: str) -> dict[str, str]:
    """The caller's environment without what would leak in; one thread, no tracking unless asked for."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PIPELINE_", "MLFLOW_", "DVC_", "PYTEST_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    return {**kept, "PATH": path, "PIPELINE_THREADS": "1", "PIPELINE_TRACKING": "0", **extra}


def run(folder: Path, *command: str, timeout: float = 300, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a project, `python` and `dvc` being those of this environment; its output is text."""
    return subprocess.run(
        command, cwd=folder, env=environment(**extra), capture_output=True, text=True, timeout=timeout, check=False
    )


def stage(folder: Path, name: str, *, processes: int = 1, **extra: str) -> str:
    """Run one stage, under torchrun for several processes; returns what it printed, fails if it failed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    done = run(folder, "python", *launcher, "-m", f"pipeline.{name}", **extra)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stderr
