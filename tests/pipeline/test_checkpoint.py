"""Checkpoints: complete or invisible, one writer, the one before a damaged one."""

import logging
from pathlib import Path

import pytest
import torch
from torch import nn

from ddpm_core import EMA
from pipeline.engine.checkpoint import GUIDE_NAME, CheckpointFolder, load_model_spec, load_weights, save_model
from pipeline.engine.state import NUM_SUMS, TrainState
from pipeline.errors import UserError
from pipeline.runtime.files import locked_folder


def make_state(seed: int = 0) -> TrainState:
    torch.manual_seed(seed)
    network = nn.Linear(3, 2)
    return TrainState(network, EMA(network, 10), torch.optim.AdamW(network.parameters(), lr=0.1, fused=True))


def advance(state: TrainState) -> None:
    state.network(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.ema.update(state.network, 1)
    state.sums += 1
    state.images_seen += 10
    state.history.append({"images": state.images_seen, "loss": 0.5})


def test_what_is_saved_comes_back_in_full(tmp_path: Path) -> None:
    folder, state, other = CheckpointFolder(tmp_path / "s"), make_state(), make_state(1)
    advance(state)
    folder.save(state)
    assert folder.newest() == 10
    folder.load(other, 10, torch.device("cpu"))
    for mine, theirs in ((state.network, other.network), (state.ema.network, other.ema.network)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))
    assert (other.images_seen, other.history, other.sums.tolist()) == (10, state.history, [1.0] * NUM_SUMS)
    advance(state)
    advance(other)  # the optimizer's moments came along
    assert torch.equal(state.network.weight, other.network.weight)


def test_an_earlier_average_is_kept_through_a_checkpoint_and_beside_the_model(tmp_path: Path) -> None:
    folder, state, other = CheckpointFolder(tmp_path / "s"), make_state(), make_state(1)
    state.guide = {name: value.clone() for name, value in state.ema.network.state_dict().items()}
    advance(state)
    folder.save(state)
    folder.load(other, 10, torch.device("cpu"))
    assert other.guide.keys() == state.guide.keys()
    assert all(torch.equal(other.guide[name], state.guide[name]) for name in state.guide)
    assert not torch.equal(state.guide["weight"], state.ema.network.weight)
    save_model(tmp_path / "model", state.ema.network, {}, {}, guide=state.guide)
    guide = nn.Linear(3, 2)
    load_weights(tmp_path / "model", guide, GUIDE_NAME)
    assert torch.equal(guide.weight, state.guide["weight"])
    save_model(tmp_path / "model", state.ema.network, {}, {})
    assert not (tmp_path / "model" / GUIDE_NAME).exists()


def test_the_newest_are_kept_and_a_damaged_one_is_named_and_skipped(tmp_path: Path, caplog) -> None:
    folder, state = CheckpointFolder(tmp_path, keep=2), make_state()
    assert folder.newest() is None
    for _ in range(3):
        advance(state)
        folder.save(state)
    assert sorted(p.name for p in tmp_path.glob("images-*")) == ["images-000000000020", "images-000000000030"]
    (tmp_path / "images-000000000030" / "resume.pt").write_bytes(b"cut")
    with caplog.at_level(logging.WARNING):
        assert folder.newest() == 20
    assert "images-000000000030: resume.pt is damaged" in caplog.text
    (tmp_path / "images-000000000020" / "state.json").unlink()
    assert folder.newest() is None


def test_a_crash_while_writing_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, state = CheckpointFolder(tmp_path), make_state()
    folder.save(state)
    advance(state)
    monkeypatch.setattr("torch.save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        folder.save(state)
    assert [p.name for p in tmp_path.iterdir()] == ["images-000000000000"]
    assert folder.newest() == 0


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    with locked_folder(tmp_path), pytest.raises(UserError, match="in use by process"), locked_folder(tmp_path):
        pass
    with locked_folder(tmp_path):  # free again
        pass


def test_a_good_checkpoint_is_not_pushed_out_by_damaged_ones_ahead_of_it(tmp_path: Path) -> None:
    folder, state = CheckpointFolder(tmp_path, keep=2), make_state()
    for images in (100, 200):
        (tmp_path / f"images-{images:012d}").mkdir()
    assert folder.newest() is None
    advance(state)
    folder.save(state)
    assert folder.newest() == 10


def test_a_resume_file_with_code_in_it_is_not_executed(tmp_path: Path) -> None:
    folder, state = CheckpointFolder(tmp_path), make_state()
    path = folder.save(state)
    torch.save({"network": Path}, path / "resume.pt")  # pickled by reference: code, not data
    with pytest.raises(Exception, match=r"weights_only|Unsupported|WeightsUnpickler"):
        folder.load(state, 0, torch.device("cpu"))


def test_a_model_is_weights_and_a_description(tmp_path: Path) -> None:
    network = nn.Linear(3, 2)
    save_model(tmp_path / "model", network, {"classes": ["a"]}, {"train_key": "k"})
    spec = load_model_spec(tmp_path / "model")
    assert (spec["classes"], spec["lineage"]) == (["a"], {"train_key": "k"})
    other = nn.Linear(3, 2)
    load_weights(tmp_path / "model", other)
    assert torch.equal(other.weight, network.weight)
    with pytest.raises(UserError, match="dvc repro train"):
        load_model_spec(tmp_path / "elsewhere")
    (tmp_path / "model/model.json").write_text('{"format": 99}')
    with pytest.raises(UserError, match="format 99"):
        load_model_spec(tmp_path / "model")
