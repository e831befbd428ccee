"""Models with a context, stage by stage as a user runs them: what is known stays, whoever draws the samples."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest

from pipeline.data.index import load_index
from pipeline.data.store import ShardStore, read_meta
from pipeline.runtime.files import load_json
from tests.projects import make_project, run, stage

pytestmark = pytest.mark.slow


def pixels(folder: Path) -> np.ndarray:
    index = load_index(folder)
    return ShardStore(index).read(np.arange(index.num_images))[0]


@pytest.mark.distributed
def test_inpainting_with_classes_from_images_to_scores(tmp_path: Path) -> None:
    folder = make_project(tmp_path, model__context="inpaint")
    for name in ("shard", "reference", "train", "sample", "evaluate"):
        stage(folder, name)
    scores = load_json(folder / "metrics/evaluate.json")
    assert scores["context_psnr"] > 0
    assert scores["fd_ratio"] > 0
    index, notes = load_index(folder / "samples"), read_meta(load_index(folder / "samples"))
    made, real = pixels(folder / "samples"), pixels(folder / "shards")
    assert sorted(note["image"] for note in notes) == sorted(set(range(120)) & {n["image"] for n in notes})
    errors = []
    for sample, note, row in zip(made, notes, index.samples, strict=True):
        top, left, height, width = note["hole"]
        inside = np.zeros((1, 8, 8), dtype=bool)
        inside[:, top : top + height, left : left + width] = True
        original = real[note["image"]]
        assert np.array_equal(sample[~inside], original[~inside])
        errors.append((sample[inside].astype(float) - original[inside]) ** 2)
        assert row["label"] == load_index(folder / "shards").samples["label"][note["image"]]
    mean = np.concatenate(errors).mean()
    assert scores["context_psnr"] == pytest.approx(10 * np.log10(255**2 / mean))
    # Two ranks draw the same bits; the records are whole for stock tools.
    stage(folder, "sample", processes=2)
    assert np.array_equal(pixels(folder / "samples"), made)
    with tarfile.open(folder / "samples/00000.tar") as tar:
        assert json.load(tar.extractfile("00000003.json")) == notes[3]
    # Other shards than the model's are refused before a network is run.
    (folder / "params.yaml").write_text(
        (folder / "params.yaml").read_text().replace("image_size: auto", "image_size: 16")
    )
    stage(folder, "shard")
    done = run(folder, "python", "-m", "pipeline.sample")
    assert done.returncode == 2
    assert "holds other images than the model was trained on" in done.stderr


def test_super_resolution_without_classes_trains_and_samples(tmp_path: Path) -> None:
    folder = make_project(tmp_path, num_classes=0, model__context="super_resolution", model__context_factor=2)
    for name in ("shard", "reference", "train", "sample", "evaluate"):
        stage(folder, name, PIPELINE_MICRO_BATCH="5")
    scores = load_json(folder / "metrics/evaluate.json")
    assert scores["context_psnr"] is not None
    assert scores["context_psnr_other"] is not None
    assert set(read_meta(load_index(folder / "samples"))[0]) == {"seed", "sample_seed", "image"}
    assert load_json(folder / "model/model.json")["context"] == {"name": "super_resolution", "factor": 2}
