"""Checkpoints that are complete or invisible, and the finished model.

A checkpoint is a folder `images-000006400/` with `average.safetensors` (the EMA weights), `resume.pt` (network,
optimizer, running sums; read with `weights_only=True`) and `state.json` (images seen, loss curve, sha256 of the other
two). It is written aside and renamed, so a folder under that name is whole. `model.json` beside the checkpoints says
what network their weights are of.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipeline.engine.state import TrainState
from pipeline.errors import UserError
from pipeline.runtime.files import load_json, save_json, sha256_file, whole_folder
from pipeline.runtime.topology import Topology

log = logging.getLogger(__name__)
MODEL_FORMAT = 2
WEIGHTS_NAME, GUIDE_NAME = "weights.safetensors", "guide.safetensors"


class CheckpointFolder:
    """The checkpoints of one training, named by the key of what determines its result.

    The caller holds the folder's lock while it writes, so that an orphan of an earlier start and its successor can't
    both.

    Args:
        root: the folder.
        keep: newest checkpoints kept.
    """

    def __init__(self, root: Path, keep: int = 2) -> None:
        self.root = root
        self.keep = keep

    def save(self, state: TrainState) -> Path:
        """Write the state under its images seen, then drop all but the newest `keep` up to there.

        Later ones can only be damaged, or this state would have begun with them.
        """
        path = self.root / f"images-{state.images_seen:012d}"
        with whole_folder(path) as aside:
            save_file(_contiguous(state.ema.network.state_dict()), aside / "average.safetensors")
            torch.save(state.tensors(), aside / "resume.pt")
            hashes = {name: sha256_file(aside / name) for name in ("average.safetensors", "resume.pt")}
            content = {"images_seen": state.images_seen, "history": state.history, "sha256": hashes}
            save_json(aside / "state.json", content)
        kept = [other for other in self._all() if other.name <= path.name][-self.keep :]
        for other in self._all():
            if other not in kept:
                shutil.rmtree(other)
        return path

    def newest(self) -> int | None:
        """Images seen of the newest checkpoint that is whole; None if there is none. Damaged ones are named and
        skipped."""
        for path in reversed(self._all()):
            try:
                content = load_json(path / "state.json")
                damaged = [n for n, sha in content["sha256"].items() if sha256_file(path / n) != sha]
            except (OSError, ValueError, KeyError) as error:
                log.warning("warning: checkpoint %s can't be read (%s); trying the one before", path, error)
                continue
            if not damaged:
                return int(content["images_seen"])
            log.warning("warning: checkpoint %s: %s is damaged; trying the one before", path, ", ".join(damaged))
        return None

    def load(self, state: TrainState, images_seen: int, device: torch.device) -> None:
        """Put the checkpoint at `images_seen` into `state`.

        Raises:
            UserError: this rank can't see it.
        """
        path = self.root / f"images-{images_seen:012d}"
        if not path.is_dir():
            raise UserError(f"{path} is not visible on this node: PIPELINE_STATE must be a folder shared by all nodes")
        content = load_json(path / "state.json")
        tensors = torch.load(path / "resume.pt", map_location=device, weights_only=True)
        state.load(tensors, load_file(path / "average.safetensors"), content["images_seen"], content["history"])

    def resume(self, state: TrainState, topology: Topology, section: str) -> None:
        """Load the newest whole checkpoint, the same on every rank; `section` names the training in the log."""
        newest = topology.from_main((self.newest() or 0) if topology.is_main else 0)
        if newest:
            self.load(state, newest, topology.device)
            if topology.is_main:
                log.info("%s: going on at %s images, from %s", section, f"{newest:,}", self.root)
            else:
                state.sums.zero_()  # the main rank carries the sums of all

    def _all(self) -> list[Path]:
        return sorted(path for path in self.root.glob("images-*") if path.is_dir())


def _contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def save_model(
    folder: Path,
    network: nn.Module,
    spec: dict[str, Any],
    lineage: dict[str, Any],
    *,
    guide: dict[str, Tensor] | None = None,
    files: Mapping[str, Path] | None = None,
) -> None:
    """The finished model: `weights.safetensors` and `model.json`, byte-equal for equal training.

    Args:
        folder: replaced if it exists.
        network: whose weights.
        spec, lineage: what model.json says.
        guide: weights of a guide, for `guide.safetensors`.
        files: name -> what else to copy, so that the folder needs no other.
    """
    with whole_folder(folder) as aside:
        for name, path in (files or {}).items():
            shutil.copyfile(path, aside / name)
        save_file(_contiguous(network.state_dict()), aside / WEIGHTS_NAME)
        if guide is not None:
            save_file(_contiguous(guide), aside / GUIDE_NAME)
        save_model_spec(aside, spec, lineage)


def save_model_spec(folder: Path, spec: dict[str, Any], lineage: dict[str, Any]) -> None:
    """Write model.json: all that is needed to build the network of the weights beside or below it, and their origin."""
    save_json(folder / "model.json", {"format": MODEL_FORMAT, **spec, "lineage": lineage})


def load_model_spec(folder: Path, *, stage: str = "train") -> dict[str, Any]:
    """Read model.json; `stage` is the one that writes it.

    Raises:
        UserError: there is none, or it is of another format.
    """
    path = folder / "model.json"
    try:
        spec: dict[str, Any] = load_json(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no readable model ({error}); train one with `dvc repro {stage}`") from None
    if spec.get("format") != MODEL_FORMAT:
        raise UserError(f"{path}: format {spec.get('format')}, this version reads {MODEL_FORMAT}: train it again")
    return spec


def image_form(spec: Mapping[str, Any]) -> tuple[int, int]:
    """Channels and size in pixels of the images that a model draws."""
    if "first_stage" in spec:
        return spec["first_stage"]["network"]["channels"], spec["first_stage"]["image_size"]
    return spec["network"]["channels"], spec["network"]["image_size"]


def load_weights(folder: Path, network: nn.Module, name: str = WEIGHTS_NAME) -> None:
    """Put `weights.safetensors` of a model folder, or another file of it, into a network of the same shape."""
    network.load_state_dict(load_file(folder / name))
