"""A folder to run the stage `shard` in."""

from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.lineage import ROOT


@pytest.fixture
def set_shard(tmp_path: Path) -> Callable[..., None]:
    """Changes keys of the section `shard` in the folder's params.yaml."""

    def change(**keys: object) -> None:
        yaml, path = YAML(), tmp_path / "params.yaml"
        params = yaml.load(path.read_text())
        assert set(keys) <= set(params["shard"])
        params["shard"].update(keys)
        with open(path, "w") as file:
            yaml.dump(params, file)

    return change


@pytest.fixture
def workspace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, set_shard: Callable[..., None]) -> Path:
    """The working folder, empty but for a params.yaml whose `data.raw` is `images`."""
    (tmp_path / "params.yaml").write_text(
        (ROOT / "params.yaml").read_text().replace("raw: data/fetched", "raw: images")
    )
    set_shard(max_broken_share=0.5, shard_images=4)
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path
