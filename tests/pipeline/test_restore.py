"""Restoring image files: what comes out, and what is said of what can't."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import restore
from pipeline.build.operators import build_kernel, build_operator
from pipeline.engine.checkpoint import save_model
from pipeline.errors import UserError
from pipeline.runtime.files import load_json, save_json
from tests.pipeline.test_models import make_model
from tests.projects import run


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of classes a and b, two 8 px images, one of 4 px, a mask, in the current folder."""
    monkeypatch.chdir(tmp_path)
    model = make_model(tmp_path / "model", ("a", "b"))
    generator = torch.Generator().manual_seed(0)  # blocks that begin as zeros would hide the label
    for parameter in model.network.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    save_model(tmp_path / "model", model.network, model.spec, {})
    rng = np.random.default_rng(0)
    for name, size in (("one", 8), ("two", 8), ("small", 4)):
        Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8)).save(f"{name}.png")
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:5, 3:7] = 255
    Image.fromarray(mask).save("mask.png")
    (tmp_path / "text.png").write_text("no image")
    return tmp_path


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["restore", "--steps", "3", *arguments])
    restore.main()


def pixels(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_what_is_seen_without_noise_stays_and_what_is_missing_is_made(place, monkeypatch) -> None:
    call(monkeypatch, "--task", "inpaint", "--mask", "mask.png", "--out", "out", "one.png", "two.png")
    missing = pixels("mask.png") > 0
    for name in ("one", "two"):
        before, after = pixels(f"{name}.png"), pixels(f"out/{name}.png")
        assert np.array_equal(before[~missing], after[~missing])
        assert not np.array_equal(before[missing], after[missing])
    assert pixels("out/side_by_side.png").shape == (2 * 34 + 2, 2 * 34 + 2, 3)
    # What lies under the mask is not used.
    hidden = pixels("one.png")
    hidden[missing] = 7
    Image.fromarray(hidden.astype(np.uint8)).save("one.png")
    call(monkeypatch, "--task", "inpaint", "--mask", "mask.png", "--out", "again", "one.png", "two.png")
    assert np.array_equal(pixels("out/one.png"), pixels("again/one.png"))


def test_a_larger_image_explains_the_small_one(place, monkeypatch) -> None:
    call(monkeypatch, "--task", "super_resolve", "--factor", "2", "--out", "out", "small.png")
    blocks = pixels("out/small.png").reshape(4, 2, 4, 2)
    inside = (blocks.min(axis=(1, 3)) > 0) & (blocks.max(axis=(1, 3)) < 255)  # not clipped by 8 bits
    assert inside.any()
    assert np.abs(blocks.mean(axis=(1, 3)) - pixels("small.png"))[inside].max() <= 0.5


@pytest.mark.parametrize("task", [("denoise", "--sigma", "20"), ("deblur", "--kernel", "gaussian:0.8")])
def test_an_image_depends_on_its_seed_and_place_not_on_its_batch(place, monkeypatch, task) -> None:
    def outcome(out: str, *arguments: str) -> list[np.ndarray]:
        call(monkeypatch, "--task", *task, "--out", out, "one.png", "two.png", *arguments)
        return [pixels(f"{out}/{name}.png") for name in ("one", "two")]

    whole = outcome("a")
    monkeypatch.setenv("PIPELINE_SAMPLE_BATCH", "1")
    for one, other in zip(whole, outcome("b"), strict=True):
        assert np.abs(one - other).max() <= 1
    assert not np.array_equal(whole[0], outcome("c", "--seed", "1")[0])
    assert not np.array_equal(whole[0], outcome("d", "--label", "b")[0])
    assert not np.array_equal(whole[0], outcome("e", "--steps", "7")[0])


def test_degrading_first_says_how_far_it_came_back(place, monkeypatch, caplog) -> None:
    caplog.set_level("INFO")
    task = ("--task", "super_resolve", "--factor", "4", "--sigma", "5", "--degrade")
    call(monkeypatch, *task, "--out", "out", "one.png", "two.png")
    assert pixels("out/side_by_side.png").shape == (3 * 34 + 2, 2 * 34 + 2, 3)  # whole, observed, restored
    assert "dB as observed" in caplog.text
    shown = pixels("out/side_by_side.png")[2:34:4, 2:34:4, 0]
    assert np.array_equal(shown, pixels("one.png"))


WRONG = [
    (("--task", "denoise"), "needs --sigma"),
    (("--task", "sharpen"), "invalid choice: 'sharpen'"),
    (("--task", "inpaint"), "--task inpaint needs --mask FILE"),
    (("--task", "super_resolve"), "needs --factor F"),
    (("--task", "deblur"), "needs --kernel KERNEL"),
    (("--task", "colourise"), "needs a model of colour images"),
    (("--task", "super_resolve", "--factor", "3"), "factor is 3, expected a whole number that divides 8 and 8"),
    (("--task", "super_resolve", "--factor", "2"), "one.png: 8 x 8 px, but this model and task take 4 x 4 px"),
    (("--task", "deblur", "--kernel", "box:2"), "k odd"),
    (("--task", "deblur", "--kernel", "disc:2"), "expected gaussian:DEVIATION"),
    (("--task", "deblur", "--kernel", "1,x,1"), "expected gaussian:DEVIATION"),
    (("--task", "deblur", "--kernel", "gaussian:nan"), "expected gaussian:DEVIATION"),
    (("--task", "deblur", "--kernel", "1,-2,1"), "expected gaussian:DEVIATION"),
    (("--task", "inpaint", "--mask", "nowhere.png"), "nowhere.png: no such file"),
    (("--task", "inpaint", "--mask", "small.png"), "small.png: 4 x 4 px, but"),
    (("--task", "inpaint", "--mask", "black.png"), "no pixel is white"),
    (("--task", "denoise", "--sigma", "-3"), "--sigma is -3.0, expected a number from 0 to 255"),
    (("--task", "denoise", "--sigma", "nan"), "--sigma is nan"),
    (("--task", "denoise", "--sigma", "9", "--eta", "2"), "--eta is 2.0"),
    (("--task", "denoise", "--sigma", "9", "--steps", "0"), "--steps is 0, expected 1 to the model's 1000"),
    (("--task", "denoise", "--sigma", "9", "--label", "c"), "--label c is unknown; classes of this model: a, b"),
    (("--task", "denoise", "--sigma", "9", "--model", "."), "no readable model"),
    (("--task", "denoise", "--sigma", "9", "text.png"), "text.png: not a PNG"),
    (("--task", "denoise", "--sigma", "9", "model"), "model: no such file; give image files, not folders"),
    (("--task", "denoise", "--sigma", "9", "./one.png"), "would both be written to out/one.png"),
    (("--task", "denoise", "--sigma", "9", "--out", "."), "one.png is an input, which would be overwritten"),
    (("--task", "denoise", "--sigma", "9", "--out", "one.png"), "one.png"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_is_wrong_is_said_before_anything_is_written(place, monkeypatch, arguments, message) -> None:
    Image.fromarray(np.zeros((8, 8), np.uint8)).save("black.png")
    before = sorted(place.rglob("*"))
    with pytest.raises(UserError) as error:
        call(monkeypatch, "--out", "out", "one.png", *arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(place.rglob("*")) == before


def test_a_model_that_always_saw_its_class_is_not_asked_without_one(place, monkeypatch) -> None:
    spec = load_json(Path("model/model.json"))
    save_json(Path("model/model.json"), {**spec, "lineage": {"train": {"label_dropout": 0.0}}})
    command = ("--task", "denoise", "--sigma", "9", "--out", "out", "one.png")
    with pytest.raises(UserError, match="give --label"):
        call(monkeypatch, *command)
    call(monkeypatch, *command, "--label", "a")
    network = {**spec["network"], "context_channels": 1}
    with pytest.raises(UserError, match="model needs context channels"):
        restore.check_model(SimpleNamespace(spec={"network": network}), SimpleNamespace(model="model"))
    latent = SimpleNamespace(spec={"network": spec["network"]}, first_stage=SimpleNamespace())
    with pytest.raises(UserError, match="model is a model of latents"):
        restore.check_model(latent, SimpleNamespace(model="model"))


def test_each_task_is_its_operator() -> None:
    shape, seen = (3, 4, 4), torch.zeros(4, 4, dtype=torch.bool)
    seen[0] = True
    settings = {"seen": seen, "factor": 2, "kernel": "box:3"}
    found = {task: build_operator(task, shape, **settings) for task in restore.TASKS}
    assert {task: operator.observed_shape for task, operator in found.items()} == {
        "denoise": (3, 4, 4), "inpaint": (3, 4, 4), "super_resolve": (3, 2, 2), "deblur": (3, 4, 4),
        "colourise": (1, 4, 4),
    }  # fmt: skip
    image = torch.ones(1, *shape)
    assert [float(operator(image).sum()) for operator in found.values()] == pytest.approx([48, 12, 12, 48, 16])
    assert build_kernel("box:3").tolist() == pytest.approx([1 / 3] * 3)


def test_the_command_ends_with_one_line_and_code_two(place) -> None:
    root = Path(__file__).parents[2]
    done = run(place, "python", "-m", "pipeline.restore", "--task", "blur", "--out", "x", "one.png",
               PYTHONPATH=str(root))  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: argument --task: invalid choice")
