"""Every artefact of the pipeline, named once. Relative to the repository's root, where DVC runs each stage."""

from pathlib import Path

PARAMS = Path("params.yaml")
DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")

# Outputs of stages: DVC caches them and deletes them before the stage runs.
RAW = Path("data/fetched")
SHARDS = Path("shards")
SHARD_INDEX = SHARDS / "index.json"
SHARD_REPORT = Path("metrics/shard.json")
REFUSED = Path("metrics/refused.csv")
REFERENCE = Path("reference")
MODEL = Path("model")
CLASSIFIER = Path("classifier")
CLASSIFIER_METRICS = Path("metrics/classifier.json")
TRAIN_METRICS = Path("metrics/train.json")
LOSS_CURVE = Path("plots/loss.csv")
SAMPLES = Path("samples")
SAMPLE_INDEX = SAMPLES / "index.json"
SAMPLE_GRID = Path("plots/samples.png")
EVALUATION = Path("evaluation")
EVALUATE_METRICS = Path("metrics/evaluate.json")
