"""What a start must not pay for: heavy libraries that only some runs need are imported where they are used."""

import json
import subprocess
import sys

import pytest

from pipeline.lineage import ROOT

LISTING = "import json, sys; import {}; print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("ddpm_core", {"pipeline", "mlflow", "dvc", "webdataset", "sklearn", "matplotlib", "ruamel"}),
        ("pipeline.train", {"mlflow", "dvc", "webdataset", "sklearn", "matplotlib", "diffusers"}),
        ("bench.report", {"torch", "mlflow", "dvc", "diffusers"}),
    ],
)
def test_import_leaves_out(module: str, absent: set[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LISTING.format(module)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    assert module.split(".")[0] in loaded
    assert loaded & absent == set()
