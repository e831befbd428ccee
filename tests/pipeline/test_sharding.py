"""The stage `shard` over processes, machines, kills and changes of the folder: always the same bytes, little work."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipeline import paths
from pipeline.data import work
from pipeline.data.catalogue import Catalogue
from pipeline.data.examine import RESULT_DTYPE
from pipeline.errors import UserError
from pipeline.lineage import ROOT
from pipeline.runtime.pool import run_tasks
from pipeline.shard import main
from tests.image_files import tree

OUTPUTS = (Path("shards"), Path("metrics"), Path("plots"))


def write(folder: Path, *numbers: int, side: int = 9) -> None:
    """A grey image a number, some equal, in three classes; every 40th file is broken."""
    for number in numbers:
        path = folder / f"class {number % 3}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(number % 97)
        Image.fromarray(rng.integers(0, 256, (side, side), dtype=np.uint8)).save(path)
        if number % 40 == 0:
            path.write_bytes(path.read_bytes()[:-30])


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    code = "import pipeline.data.work as w; w.FEW = 30; from pipeline.shard import main; from pipeline.runtime.process "
    command = [sys.executable, "-W", "error", "-c", code + "import run_stage; run_stage(main)"]
    return subprocess.Popen(
        command, cwd=folder, env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def looked_at(output: str) -> int:
    """How many files the stage says it decoded."""
    (number,) = re.findall(r"^check: ([\d,]+) of", output, flags=re.MULTILINE)
    return int(number.replace(",", ""))


@pytest.fixture
def project(workspace: Path, set_shard: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of 240 images, as a task of 64 files each sees it."""
    set_shard(shard_images=50, held_out_share=0.2, image_size=8, channels=1)
    write(workspace / "images", *range(240))
    monkeypatch.setenv("PIPELINE_SHARD_PROCESSES", "1")
    monkeypatch.setattr(work, "FEW", 30)
    return workspace


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg", "original"])
def test_one_two_and_three_processes_write_the_same_bytes(
    project: Path, set_shard: Callable[..., None], encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_shard(encoding=encoding)
    results = []
    for processes in (1, 2, 3):
        monkeypatch.setenv("PIPELINE_SHARD_PROCESSES", str(processes))
        monkeypatch.setenv("PIPELINE_STATE", f"state {processes}")
        main()
        results.append(tree(*OUTPUTS))
    assert results[0] == results[1] == results[2]
    assert len(results[0]) >= 10
    assert "shards/held_out/index.json" in results[0]


@pytest.mark.slow
def test_what_a_kill_leaves_is_used_and_changes_nothing(project: Path) -> None:
    write(project / "images", *range(240, 1500), side=200)
    process = start(project, PIPELINE_SHARD_PROCESSES="2")
    deadline = time.monotonic() + 60
    while len(list(project.glob(".state/shard/*/results/*.npz"))) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()  # returns only when the workers have closed the pipe too: they end with the stage
    assert not paths.SHARDS.exists()
    output, errors = start(project, PIPELINE_SHARD_PROCESSES="2").communicate(timeout=120)
    assert 0 < looked_at(output) <= 1500 - 3 * 64, errors
    resumed = tree(*OUTPUTS)
    output, _ = start(project, PIPELINE_SHARD_PROCESSES="1", PIPELINE_STATE="fresh").communicate(timeout=120)
    assert looked_at(output) == 1500
    assert tree(*OUTPUTS) == resumed
    assert not list(project.glob("shards.*")) and not list(project.glob(".shards*"))  # noqa: PT018


def test_finished_tars_outlive_a_kill(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipeline.shard.publish", fail)
        with pytest.raises(KeyboardInterrupt):
            main()
    (damaged, *whole) = sorted(project.glob(".state/shard/*/tars-*/*.tar"))
    damaged.write_bytes(b"\0" * damaged.stat().st_size)
    main()
    assert f"pack: 1 of {1 + len(whole)} tars written" in capsys.readouterr().out
    first = tree(*OUTPUTS)
    monkeypatch.setenv("PIPELINE_STATE", "fresh")
    main()
    assert tree(*OUTPUTS) == first


def test_new_changed_and_removed_files_cost_their_own_work_only(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main()
    images = project / "images"
    write(images, 240, 241, 242)  # one of each class, so that the keys of most others move
    (images / "class 1/00001.png").unlink()
    same_size = images / "class 2/00002.png"
    before = same_size.stat()
    data = bytearray(same_size.read_bytes())
    data[-20] ^= 1  # now broken, with the old size and time of change
    same_size.write_bytes(data)
    os.utime(same_size, ns=(before.st_atime_ns, before.st_mtime_ns))
    (images / "class 0/00003.png").rename(images / "class 0/renamed.png")
    capsys.readouterr()
    main()
    assert looked_at(capsys.readouterr().out) == 5
    after = tree(*OUTPUTS)
    monkeypatch.setenv("PIPELINE_STATE", "fresh")
    main()
    assert looked_at(capsys.readouterr().out) == 242
    assert tree(*OUTPUTS) == after
    assert "00002.png" in paths.REFUSED.read_text()


def test_parameters_that_leave_the_payload_do_no_new_decoding(
    project: Path, set_shard: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    main()
    capsys.readouterr()
    set_shard(shard_images=30, held_out_share=0.5, near_duplicate_bits=None)
    main()
    assert looked_at(capsys.readouterr().out) == 0
    set_shard(resize_filter="box")
    main()
    assert looked_at(capsys.readouterr().out) == 240


def test_workers_share_the_files_and_the_tars_and_the_merger_does_the_rest(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main()
    alone = tree(*OUTPUTS)
    for folder in OUTPUTS:
        subprocess.run(["rm", "-r", folder], check=True)
    monkeypatch.setenv("PIPELINE_STATE", "shared")
    counts = []
    for turn in range(2):
        for worker in ("0/3", "1/3", "2/3") if turn else ("2/3", "0/3"):
            monkeypatch.setenv("PIPELINE_SHARD_WORKER", worker)
            capsys.readouterr()
            main()
            output = capsys.readouterr().out
            counts.append(looked_at(output))
            assert ("files are with others" in output) == (turn == 0 or worker == "0/3")
            assert not paths.SHARDS.exists()
    assert all(40 < count < 120 for count in counts[:2])
    assert sum(counts) == 240
    monkeypatch.delenv("PIPELINE_SHARD_WORKER")
    main()
    output = capsys.readouterr().out
    assert looked_at(output) == 0
    assert 0 < int(re.findall(r"pack: (\d+) of", output)[0]) < 5  # those that 0/3 could not know yet
    assert tree(*OUTPUTS) == alone


def test_a_worker_is_refused_where_it_makes_no_sense(
    project: Path, set_shard: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPELINE_SHARD_WORKER", "3/3")
    with pytest.raises(UserError, match="expected K/N with K from 0 to N - 1"):
        main()
    monkeypatch.setenv("PIPELINE_SHARD_WORKER", "2/3")
    set_shard(image_size="auto")
    with pytest.raises(UserError, match=r"give shard\.image_size and shard\.channels"):
        main()
    monkeypatch.setenv("DVC_STAGE", "shard")
    with pytest.raises(UserError, match="start `dvc repro` without it"):
        main()


def test_damaged_results_are_done_again_and_damaged_payloads_are_named(project: Path) -> None:
    main()
    before = tree(*OUTPUTS)
    (folder,) = project.glob(".state/shard/*/results")
    rows = sorted(folder.glob("*.npz"))
    rows[0].write_bytes(rows[0].read_bytes()[:-40])
    rows[1].write_bytes(b"")
    assert len(Catalogue(folder, RESULT_DTYPE)) < 240
    main()
    assert tree(*OUTPUTS) == before
    payloads = folder / f"{rows[2].stem}.bin"
    data = bytearray(payloads.read_bytes())
    data[5] ^= 1
    payloads.write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: delete that folder; run again"):
        main()


def test_old_state_is_forgotten(project: Path, set_shard: Callable[..., None]) -> None:
    main()
    (first,) = {path.parent for path in project.glob(".state/shard/*/results")}
    set_shard(resize_filter="box")
    main()
    assert first.exists()
    os.utime(first, (0, 0))
    main()
    assert not first.exists()
    assert len(list(project.glob(".state/shard/*"))) == 1


def _end(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_worker_that_is_killed_is_one_line() -> None:
    with pytest.raises(UserError, match="set THIS to fewer than 2 and run again"):
        list(run_tasks(_end, range(6), 2, variable="THIS"))
    assert sorted(run_tasks(_end, range(3), 2, variable="THIS")) == [0, 1, 2]
