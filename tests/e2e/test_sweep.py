"""`make eval` on a trained model: killed and started again, on one rank and on two, and the command that make runs."""

import csv
import random
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from pipeline.lineage import ROOT
from pipeline.runtime.files import load_json
from tests.projects import environment, make_project, run, stage

WORDS = ("SAMPLER=ddim,heun", "STEPS=2,4", "GUIDANCE=1,2", "N=30", "NAME=s")
COMMAND = ("python", "-m", "pipeline.sweep", *WORDS)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    quick = {"evaluate__bootstrap": 0, "evaluate__extrapolation": 0, "evaluate__kid_subsets": 2}
    folder = make_project(tmp_path_factory.mktemp("sweep"), num_images=60, **quick)
    for name in ("shard", "reference", "train"):
        stage(folder, name)
    return folder


def scores(folder: Path) -> dict[str, float]:
    with open(folder / "sweeps/s/table.csv", newline="") as file:
        return {row["key"]: float(row["fd_efficientnet_lite0"]) for row in csv.DictReader(file)}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_kill_at_any_moment_loses_one_point_and_two_ranks_find_the_same(project: Path) -> None:
    process = subprocess.Popen(COMMAND, cwd=project, env=environment(), stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (kept := list(project.glob(".state/sweep/*.json"))):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(random.random())  # anywhere in a later point
    process.send_signal(signal.SIGKILL)
    process.wait()
    children = [p for p in psutil.process_iter(["cmdline"]) if str(project) in " ".join(p.info["cmdline"] or [])]
    assert not children
    kept = sorted(project.glob(".state/sweep/*.json"))
    assert 1 <= len(kept) < 8
    before = {path.name: path.read_bytes() for path in kept}
    assert all(load_json(path)["scores"] for path in kept)  # each is whole
    done = run(project, *COMMAND)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("(kept)") == len(kept)
    assert {name: (project / ".state/sweep" / name).read_bytes() for name in before} == before
    one = scores(project)
    assert len(one) == 8

    again = run(project, *COMMAND, "--again", PIPELINE_PROCESSES="2")
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("sweep: done") == 1
    assert "(kept)" not in again.stderr
    assert scores(project) == pytest.approx(one, rel=1e-6)

    wrong = run(project, "python", "-m", "pipeline.sweep", "CKPT=nowhere", PIPELINE_PROCESSES="2")
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: CKPT: nowhere is not there; there are model, .state/train/")
    assert wrong.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "dvc repro evaluate"),
        (["STEPS=5,10", "SAMPLER=ddim"], "python -m pipeline.sweep 'SAMPLER=ddim' 'STEPS=5,10'"),
        (["CKPT=it's/images-*", "AGAIN=1"], "python -m pipeline.sweep 'CKPT=it'\\''s/images-*' --again"),
    ],
)
def test_make_eval_passes_on_what_was_asked_for(arguments: list[str], expected: str) -> None:
    done = run(ROOT, "make", "--dry-run", "eval", *arguments, N="7")  # of the environment: about something else
    (command,) = [line for line in done.stdout.splitlines() if "evaluate" in line or "pipeline.sweep" in line]
    assert command.strip().removeprefix(".venv/bin/").rstrip() == expected
