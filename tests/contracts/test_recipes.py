"""Each recipe is a pipeline of its own: its parameters parse, and DVC reads its stages."""

import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipeline.config import load_params
from pipeline.lineage import ROOT
from pipeline.sections import Params

RECIPES = sorted(path.parent for path in (ROOT / "recipes").glob("*/dvc.yaml"))
each_recipe = pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.name)


def stages_of(recipe: Path) -> dict[str, dict]:
    return YAML(typ="safe").load((recipe / "dvc.yaml").read_text())["stages"]


def test_there_are_recipes_and_each_folder_is_one() -> None:
    assert ROOT / "recipes/guided" in RECIPES
    assert [path for path in (ROOT / "recipes").iterdir() if path.is_dir()] == [
        path for path in (ROOT / "recipes").iterdir() if path in RECIPES
    ]


@each_recipe
def test_its_parameters_are_valid_and_it_is_described(recipe: Path) -> None:
    load_params(recipe / "params.yaml")
    assert "dvc repro" in (recipe / "README.md").read_text()


@each_recipe
def test_dvc_reads_its_stages(recipe: Path) -> None:
    command = [sys.executable, "-m", "dvc", "stage", "list", "--name-only"]
    done = subprocess.run(command, cwd=recipe, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(stages_of(recipe))


@each_recipe
def test_each_stage_runs_a_module_knows_its_code_and_runs_in_a_fresh_clone(recipe: Path) -> None:
    for name, stage in stages_of(recipe).items():
        python, _, module = stage["cmd"].split()[:3]
        assert python == "python"
        source = ROOT.joinpath(*module.split(".")).with_suffix(".py")
        assert "run_stage(main)" in source.read_text(), name
        assert any(dep.startswith("../../pipeline") for dep in stage["deps"]), name
        assert set(stage["params"]) <= set(Params.model_fields), name
        assert any(isinstance(out, str) for out in stage["outs"]), name  # outputs in git are there in a clone


@each_recipe
def test_folders_that_stages_write_are_not_in_git(recipe: Path) -> None:
    folders = [out for stage in stages_of(recipe).values() for out in stage["outs"] if isinstance(out, str)]
    for name in [*folders, ".state/train/x", "mlflow.db"]:
        done = subprocess.run(["git", "check-ignore", "-q", str(recipe / name)], cwd=ROOT, check=False, timeout=60)
        assert done.returncode == 0, name
