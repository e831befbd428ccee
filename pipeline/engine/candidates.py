"""Weights that can be scored: models, checkpoints of a training that runs or ran, models in MLflow; found by name."""

from __future__ import annotations

import glob
import pickle
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from pipeline import paths
from pipeline.engine.checkpoint import GUIDE_NAME, WEIGHTS_NAME, load_model_spec
from pipeline.errors import UserError
from pipeline.runtime.files import load_json, sha256_file
from pipeline.runtime.registry import fetch_model, is_model_uri

AVERAGE, NETWORK = "average", "network"  # what EMA may be, beside a width
_CHECKPOINTS = "images-*"
_MOST_LISTED = 8


@dataclass(frozen=True)
class Candidate:
    """One set of weights.

    Args:
        name: in tables: what the user called it, a path, or `KEY@IMAGES` for a checkpoint.
        place: how to ask for it again.
        folder: a model's, with weights.safetensors, or a checkpoint's, with average.safetensors and resume.pt.
        spec: as model.json says it, lineage included.
        images_seen: None where nothing says so.
    """

    name: str
    place: str
    folder: Path
    spec: dict[str, Any]
    images_seen: int | None

    @property
    def is_checkpoint(self) -> bool:
        return (self.folder / "state.json").is_file()

    @property
    def train_key(self) -> str | None:
        """Of the training, whose MLflow run has it as a tag."""
        key = self.spec.get("lineage", {}).get("train_key")
        return None if key is None else str(key)

    def file(self, ema: str) -> Path:
        """The file that holds the weights of an average, as :func:`load_average` takes it.

        Raises:
            UserError: these are not kept here.
        """
        if is_average(self, ema):
            return self.folder / ("average.safetensors" if self.is_checkpoint else WEIGHTS_NAME)
        if ema == NETWORK and self.is_checkpoint:
            return self.folder / "resume.pt"
        kept = f"{AVERAGE} and {NETWORK}" if self.is_checkpoint else f"{AVERAGE} alone; its checkpoints have {NETWORK}"
        raise UserError(f"EMA is {ema}, but {self.name} holds {kept}")

    def guide_file(self) -> Path | None:
        """The file that holds the weights of its guide, if there is such a file."""
        path = self.folder / ("resume.pt" if self.is_checkpoint else GUIDE_NAME)
        return path if path.is_file() else None

    def sha256(self, ema: str) -> str:
        """Of that file.

        Raises:
            UserError: it is missing, or is not what the checkpoint says it wrote.
        """
        path = self.file(ema)
        if not path.is_file():
            raise UserError(f"{path} is missing: {self.name} is not whole")
        found = sha256_file(path)
        if self.is_checkpoint and load_json(self.folder / "state.json")["sha256"].get(path.name) != found:
            raise UserError(f"{path} is damaged: take another checkpoint")
        return found


def is_average(candidate: Candidate, ema: str) -> bool:
    """Whether `ema` means the average that training keeps: by its name, or by its half-life in images."""
    half_life = candidate.spec.get("lineage", {}).get("train", {}).get("ema_half_life_images")
    return ema == AVERAGE or (half_life is not None and ema == str(half_life))


def load_average(candidate: Candidate, ema: str) -> dict[str, Tensor]:
    """The weights of one average over the training: the one place that knows what EMA may be.

    Args:
        candidate: whose.
        ema: `average`, what training publishes; `network`, the weights as they were trained, of checkpoints only; or a
            width: the half-life in images where it is 1 or more (the training's own is `average`), the relative width
            sigma_rel of a power-law average (Karras et al. 2024) where it is below 1.

    Raises:
        UserError: they are not there, or the file can't be read.
    """
    path = candidate.file(ema)
    weights: dict[str, Tensor] = _read_resume(path)["network"] if path.name == "resume.pt" else _read(path, load_file)
    return weights


def load_guide_weights(candidate: Candidate) -> dict[str, Tensor] | None:
    """The average as it was at `train.guide_images`, for autoguidance; None where none was kept."""
    path = candidate.guide_file()
    if path is None:
        return None
    guide: dict[str, Tensor] | None = _read_resume(path)["guide"] if candidate.is_checkpoint else _read(path, load_file)
    return guide


def find_candidates(text: str, state: Path) -> list[Candidate]:
    """What CKPT asks for, in its order, each once.

    Args:
        text: one or more, by comma: a model's folder, a checkpoint's (`images-000006400`), the folder of a training
            (all its checkpoints), a pattern such as `.state/train/*/images-*`, or an address in MLflow
            (`models:/NAME@best`, with `=FOLDER` where it has been fetched). `NAME=PLACE` gives one a name of its own.
        state: PIPELINE_STATE, to say what there is.

    Raises:
        UserError: there is no such thing, or nothing says what network it is of.
    """
    found: dict[Path, Candidate] = {}
    for item in text.split(","):
        name, equals, place = item.partition("=")
        if not equals or is_model_uri(item) or Path(item).exists():
            name, place = "", item
        if is_model_uri(place):
            uri, _, fetched = place.partition("=")
            folder = Path(fetched) if fetched else fetch_model(uri)
            found[folder] = _open(folder, name or uri, uri)
            continue
        folders = list(_folders(place))
        if not folders:
            raise UserError(f"CKPT: {place or 'an empty name'} is not there; {_listed(state)}")
        for folder in folders:
            found.setdefault(folder, _open(folder, name if len(folders) == 1 else "", folder.as_posix()))
    return list(found.values())


def as_fetched(candidates: Iterable[Candidate]) -> str:
    """What CKPT must be so that other processes of this machine find the same without fetching it again."""
    parts = []
    for one in candidates:
        place = f"{one.place}={one.folder}" if is_model_uri(one.place) else one.place
        parts.append(place if one.name in (one.place, _checkpoint_name(one)) else f"{one.name}={place}")
    return ",".join(parts)


def _checkpoint_name(candidate: Candidate) -> str:
    return f"{candidate.folder.resolve().parent.name[:6]}@{candidate.images_seen}"


def _folders(place: str) -> Iterator[Path]:
    """Models and checkpoints that a path or pattern names, checkpoints by images seen."""
    named = sorted(glob.glob(place)) if glob.has_magic(place) else [place] if place else []
    for path in map(Path, named):
        if (path / WEIGHTS_NAME).is_file() or (path / "state.json").is_file():
            yield path
        else:
            yield from (one for one in sorted(path.glob(_CHECKPOINTS)) if (one / "state.json").is_file())


def _open(folder: Path, name: str, place: str) -> Candidate:
    if not (folder / "state.json").is_file():
        spec = load_model_spec(folder)
        return Candidate(name or place, place, folder, spec, spec.get("lineage", {}).get("images_seen"))
    spec = _checkpoint_spec(folder.resolve().parent)
    try:
        images_seen = int(load_json(folder / "state.json")["images_seen"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}/state.json can't be read ({error}): take another checkpoint") from None
    found = Candidate(name, place, folder, spec, images_seen)
    return found if name else replace(found, name=_checkpoint_name(found))


def _checkpoint_spec(root: Path) -> dict[str, Any]:
    """model.json of the training, or, of one by an earlier version, of the model that came of it."""
    if (root / "model.json").is_file():
        return load_model_spec(root)
    if (paths.MODEL / "model.json").is_file():
        spec = load_model_spec(paths.MODEL)
        if spec.get("lineage", {}).get("train_key") == root.name:
            return spec
    raise UserError(f"{root} has no model.json, so nothing says of what network its checkpoints are: train on once")


def _listed(state: Path) -> str:
    """What could be asked for instead."""
    models = [paths.MODEL.as_posix()] if (paths.MODEL / WEIGHTS_NAME).is_file() else []
    checkpoints = [path.as_posix() for path in sorted(state.glob(f"train/*/{_CHECKPOINTS}"))]
    there = [*models, *checkpoints[-_MOST_LISTED:]]
    more = len(checkpoints) - _MOST_LISTED
    text = f"there are {', '.join(there)}" if there else f"there is no {paths.MODEL} and no checkpoint in {state}/train"
    return text + (f" and {more} more" if more > 0 else "") + "; models:/NAME@best takes one from MLflow"


def _read_resume(path: Path) -> dict[str, Any]:
    """What is asked for is read when it is used: the optimizer's part stays on the disk."""
    return _read(path, lambda path: torch.load(path, "cpu", weights_only=True, mmap=True))


def _read(path: Path, load: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    try:
        return load(path)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} can't be read as weights ({reason})") from None
