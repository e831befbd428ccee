"""The doctor finds what would fail, and says nothing of passwords."""

from pathlib import Path

import pytest

from pipeline import doctor
from tests.projects import environment, make_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = make_project(tmp_path, num_images=0)
    (folder / ".dvc").mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", environment()["PATH"])
    for name in ("MLFLOW_TRACKING_URI", "PIPELINE_STATE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def test_a_good_machine_passes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0, capsys.readouterr().out
    assert "nothing would fail" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("slip", "expected"),
    [
        ("params", "train.batch_size"),
        ("raw", "elsewhere"),
        ("environment", "PIPELINE_PROCESSES"),
        ("folder", "run from the repository's root"),
        ("path", "dvc is not on PATH"),
    ],
)
def test_each_slip_is_found(project: Path, monkeypatch, capsys, slip: str, expected: str) -> None:
    text = (project / "params.yaml").read_text()
    match slip:
        case "params":
            (project / "params.yaml").write_text(text.replace("batch_size: 16", "batch_size: 0"))
        case "raw":
            (project / "params.yaml").write_text(text.replace("raw: images", "raw: elsewhere"))
        case "environment":
            monkeypatch.setenv("PIPELINE_PROCESSES", "many")
        case "folder":
            (project / "dvc.yaml").unlink()
        case "path":
            monkeypatch.setenv("PATH", "/nowhere")
    assert doctor.main() == 1
    failures = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAIL")]
    assert any(expected in line for line in failures), failures


def test_a_server_that_is_away_is_a_note_without_its_password(project: Path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ann:secret@127.0.0.1:9")
    assert doctor.main() == 0
    said = capsys.readouterr().out
    assert "note tracking server 127.0.0.1:9 is away" in said
    assert "secret" not in said
