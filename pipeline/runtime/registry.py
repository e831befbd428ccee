"""Models in MLflow's registry: a folder that serves itself, its versions and their alias, and the way back to disk."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import UserError
from pipeline.runtime.files import load_json, sha256_file

if TYPE_CHECKING:
    from mlflow import MlflowClient

CODE = Path(__file__).parents[1]
PACKAGES = ("torch", "numpy", "einops", "safetensors", "pydantic", "ruamel.yaml", "pillow", "tqdm", "psutil", "mlflow")
ARTIFACT = "registered_model"
SETTINGS = {  # for mlflow, unless the user set them: quiet, no telemetry, and errors at once, since we retry ourselves
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
}
URI = re.compile(r"(models|runs|mlflow-artifacts|m-[0-9a-f]+):/")


def prepare_mlflow() -> None:
    """What must be said before mlflow is imported for the first time: it is to be quiet and quick to fail."""
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # it warns of each refused connection
    warnings.filterwarnings("ignore", module=r"(mlflow|sqlalchemy|alembic)\b")  # mlflow 3.17 on SQLAlchemy 2.1
    warnings.filterwarnings("ignore", message=r"(?s).*input example was not provided")  # of pyfunc


def save_served_model(model: Path, folder: Path) -> None:
    """Write an MLflow model: weights, description, this project's code, and what goes in and comes out. No pickle.

    Args:
        model: the train stage's output.
        folder: shall not exist.
    """
    import mlflow.pyfunc
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    spec = load_json(model / "model.json")
    first_stage = spec.get("first_stage")  # of a model of latents: it makes the images
    channels = first_stage["network"]["channels"] if first_stage else spec["network"]["channels"]
    size = (first_stage or spec["network"])["image_size"]
    shape = (-1, channels, size, size)
    signature = ModelSignature(
        inputs=Schema([ColSpec("string", "label", required=False)]),
        outputs=Schema([TensorSpec(np.dtype(np.uint8), shape)]),
        params=ParamSchema([
            ParamSpec("seed", "long", 0),
            ParamSpec("steps", "long", 25),
            ParamSpec("sampler", "string", "ddim"),
            ParamSpec("guidance", "double", 1.0),
        ]),
    )  # fmt: skip
    mlflow.pyfunc.save_model(
        str(folder),
        python_model=str(CODE / "serving.py"),
        artifacts={"model": str(model)},
        code_paths=[str(CODE), str(CODE.parent / "ddpm_core")],
        pip_requirements=[f"{name}=={version(name).split('+')[0]}" for name in PACKAGES],
        signature=signature,
    )


def register_model(
    client: MlflowClient, run_id: str, name: str, model: Path, *, score_name: str, score: float | None, protocol: str
) -> str:
    """A version of the registered model `name`, once for equal weights. The alias `best` goes to the lowest score among
    the versions that were scored by the same protocol; `latest` is MLflow's own name for the newest.

    Args:
        client: of the store that holds the run.
        run_id: the run that the model belongs to; its artifacts take the model.
        name: of the registered model, created when it is missing.
        model: the train stage's output.
        score_name, score, protocol: what the version is ranked by; None is never the best.

    Returns:
        the version.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name, description="Diffusion models trained by this pipeline.")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    weights = sha256_file(model / "weights.safetensors")
    versions = client.search_model_versions(f"name = '{name}'")
    found = next((v for v in versions if v.run_id == run_id and v.tags.get("weights_sha256") == weights), None)
    if found is None:
        with tempfile.TemporaryDirectory() as folder:
            save_served_model(model, Path(folder) / ARTIFACT)
            client.log_artifacts(run_id, str(Path(folder) / ARTIFACT), ARTIFACT)
        source = f"{client.get_run(run_id).info.artifact_uri}/{ARTIFACT}"
        found = client.create_model_version(name, source, run_id, tags={"weights_sha256": weights})
    ranking = {"score_name": score_name, "protocol": protocol, "score": "" if score is None else repr(score)}
    for key, value in ranking.items():
        client.set_model_version_tag(name, found.version, key, value)
    others = [v for v in versions if str(v.version) != str(found.version) and _comparable(v.tags, ranking)]
    scores = {int(v.version): float(v.tags["score"]) for v in others}
    if score is not None:
        scores[int(found.version)] = score
    if scores:
        client.set_registered_model_alias(name, "best", str(min(scores, key=lambda v: (scores[v], v))))
    return str(found.version)


def _comparable(tags: dict[str, str], ranking: dict[str, str]) -> bool:
    return bool(tags.get("score")) and all(tags.get(k) == ranking[k] for k in ("score_name", "protocol"))


def is_model_uri(path: str | Path) -> bool:
    """Whether this is an address of a model in MLflow rather than a folder.

    Example:
        >>> is_model_uri("models:/ddpm-pipeline@best"), is_model_uri("recipes/model")
        (True, False)
    """
    return URI.match(str(path)) is not None


def fetch_model(uri: str) -> Path:
    """Download a model, such as `models:/ddpm-pipeline@best` or `runs:/ID/registered_model`, from `MLFLOW_TRACKING_URI`
    or `mlflow.db` here.

    Returns:
        the folder with model.json, in a new temporary place.

    Raises:
        UserError: MLflow has no such model, or it holds none of this pipeline's.
    """
    prepare_mlflow()
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    store = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path.cwd() / 'mlflow.db'}"
    try:
        folder = Path(mlflow.artifacts.download_artifacts(uri, dst_path=tempfile.mkdtemp(), tracking_uri=store))
    except (MlflowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{uri}: MLflow gives no such model ({reason}); `make ui` shows what there is") from None
    found: list[Any] = sorted(folder.rglob("model.json"))
    if not found:
        raise UserError(f"{uri}: holds no model.json, so it is no model of this pipeline")
    return Path(found[0]).parent
