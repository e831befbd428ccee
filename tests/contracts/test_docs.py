"""What the README says is true: its example runs, its files and commands exist."""

import re
import subprocess
import sys

from pipeline.lineage import ROOT
from pipeline.machine import VARIABLES
from pipeline.runtime.files import load_json

README = (ROOT / "README.md").read_text()


def test_the_notebook_example_runs_and_is_as_short_as_promised() -> None:
    (code,) = (c for c in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL) if "ddpm_core" in c)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    check = "\nassert samples.shape == (4, 1, 8, 8) and samples.abs().max() <= 1"
    subprocess.run([sys.executable, "-W", "error", "-c", code + check], check=True, cwd=ROOT, timeout=120)


def test_every_linked_file_exists() -> None:
    for document in (README, (ROOT / "docs/architecture.md").read_text()):
        for target in re.findall(r"\]\(([^)#]+)\)", document):
            assert target.startswith("http") or (ROOT / target).exists(), target


def test_the_scores_in_the_readme_are_those_of_the_committed_run() -> None:
    scores = load_json(ROOT / "metrics/evaluate.json")
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", README, flags=re.MULTILINE)
    assert {name for name, _ in rows} >= {"class_accuracy", "fd_efficientnet_lite0", "fd_floor", "fd_ratio"}
    for name, shown in rows:
        assert float(shown) == round(scores[name], len(shown.partition(".")[2])), name


def test_every_make_target_in_the_readme_exists_and_help_lists_all() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z]+):.*##", makefile, flags=re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", README)) <= targets
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, flags=re.MULTILINE)
    assert set(phony.split()) == targets


def test_variables_and_stages_in_the_documents_exist() -> None:
    text = README + (ROOT / "docs/architecture.md").read_text() + (ROOT / "params.yaml").read_text()
    assert set(re.findall(r"PIPELINE_[A-Z_]*[A-Z]", text)) <= set(VARIABLES)
    for module in set(re.findall(r"-m (pipeline\.\w+)", text)):
        place = ROOT.joinpath(*module.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__main__.py").is_file(), module


def test_nothing_committed_names_this_machine() -> None:
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT).stdout.split()
    for name in files:
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".json", ".lock", ".csv"} and path.is_file():
            assert str(ROOT) not in path.read_text(), name
