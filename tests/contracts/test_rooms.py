"""The rules of the house: which way imports point, and that DVC knows every file a stage imports."""

import ast
import subprocess
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.lineage import ROOT, source_files
from pipeline.sections import Params

STAGES = ("fetch", "shard", "reference", "train", "sample", "evaluate", "likelihood")
ALL_STAGES = [path.stem for path in (ROOT / "pipeline").glob("*.py") if "run_stage(main)" in path.read_text()]
PIPELINE = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


MODULES = {path.relative_to(ROOT).as_posix(): imports(path) for path in (ROOT / "pipeline").rglob("*.py")}


def importers(prefix: str) -> set[str]:
    return {
        path
        for path, names in MODULES.items()
        if any(name == prefix or name.startswith(prefix + ".") for name in names)
    }


@pytest.mark.parametrize(
    ("library", "rooms"),
    [
        ("torch.distributed", {"pipeline/runtime/topology.py"}),
        ("torch.nn.parallel", {"pipeline/runtime/topology.py"}),
        ("mlflow", {"pipeline/runtime/sender.py", "pipeline/runtime/registry.py", "pipeline/serving.py"}),
        ("ruamel", {"pipeline/config.py"}),
        ("sklearn", {"pipeline/engine/score.py", "pipeline/fetch.py"}),
    ],
)
def test_each_library_has_one_room(library: str, rooms: set[str]) -> None:
    assert importers(library) <= rooms
    assert importers(library)


def test_webdataset_is_a_reader_of_the_shards_and_no_part_of_their_making() -> None:
    """Tests and benchmarks hold our tars against it; in between its import alone would cost seconds."""
    assert not importers("webdataset")


def test_stages_never_import_stages() -> None:
    assert {*STAGES, "classifier", "autoencoder", "encode"} <= set(ALL_STAGES)
    for stage in ALL_STAGES:
        assert importers(f"pipeline.{stage}") <= set(), stage


def test_imports_point_one_way() -> None:
    below = {
        "pipeline/runtime/": {"data", "engine", "build", "lineage"},
        "pipeline/data/": {"engine", "build"},
        "pipeline/engine/": {"build"},
    }
    for path, names in MODULES.items():
        for room, above in below.items():
            if path.startswith(room) and not path.endswith("__main__.py"):  # a program over the room, as stages are
                assert not {
                    n
                    for n in names
                    if n.split(".")[:1] == ["pipeline"] and n.split(".")[1:2] and n.split(".")[1] in above
                }, path


@pytest.mark.parametrize("stage", STAGES)
def test_dvc_knows_exactly_the_code_that_a_stage_imports(stage: str) -> None:
    needed = {path.as_posix() for path in source_files(f"pipeline.{stage}")}
    code = [dep for dep in PIPELINE["stages"][stage]["deps"] if dep.startswith(("pipeline/", "ddpm_core"))]
    folders = tuple(dep + "/" for dep in code if not dep.endswith(".py"))
    missing = {path for path in needed if path not in code and not path.startswith(folders)}
    surplus = {dep for dep in code if dep.endswith(".py") and dep not in needed}
    assert (missing, surplus) == (set(), set()), f"dvc.yaml, stage {stage}: add {missing}, remove {surplus}"


def test_the_walk_finds_lazy_and_package_imports() -> None:
    found = {path.as_posix() for path in source_files("pipeline.train")}
    assert {
        "pipeline/__init__.py",
        "pipeline/train.py",
        "ddpm_core/nn/unet.py",
        "pipeline/runtime/tracking.py",
    } <= found
    assert "pipeline/evaluate.py" not in found


def test_stages_are_sections_and_their_params_exist() -> None:
    assert set(STAGES) == set(PIPELINE["stages"])
    for stage, content in PIPELINE["stages"].items():
        assert content["cmd"] == f"python -m pipeline.{stage}"
        assert stage in content["params"]
        assert set(content["params"]) <= set(Params.model_fields)


def test_every_stage_runs_in_a_fresh_clone() -> None:
    """Outputs in git are there in a clone: a stage with no other would be skipped, and its part of the run lost."""
    for stage, content in PIPELINE["stages"].items():
        assert any(isinstance(out, str) for out in content.get("outs", [])), stage


def test_sampling_and_evaluation_settings_never_retrain() -> None:
    assert not {"sample", "evaluate", "reference", "likelihood"} & set(PIPELINE["stages"]["train"]["params"])


def test_git_ignores_no_code_of_ours() -> None:
    """A package named like a build folder was once ignored: it ran here and was missing in every clone."""
    folders = ("ddpm_core", "pipeline", "bench", "tests", "recipes", "docs")
    code = [path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).rglob("*.py")]
    code = [path for path in code if not any(part.startswith(".") for part in path.split("/"))]
    answer = subprocess.run(
        ["git", "check-ignore", "--no-index", *code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if answer.returncode == 128:
        pytest.skip(f"not a git checkout: {answer.stderr.strip()}")
    assert "pipeline/build/networks.py" in code
    assert answer.stdout.split() == []
