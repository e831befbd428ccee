"""Every artefact of the pipeline, named once. Relative to the repository's root, where DVC runs each stage."""

from pathlib import Path

PARAMS = Path("params.yaml")
DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")

# Outputs of stages: DVC caches them and deletes them before the stage runs.
RAW = Path("data/fetched")
SHARDS = Path("shards")
SHARD_INDEX = SHARDS / "index.json"
HELD_OUT = SHARDS / "held_out"
SHARD_REPORT = Path("metrics/shard.json")
REFUSED = Path("metrics/refused.csv")
DUPLICATES = Path("metrics/duplicates.csv")
CLASSES = Path("metrics/classes.csv")
CONTACT_SHEET = Path("plots/contact.png")
REFERENCE = Path("reference")
MODEL = Path("model")
TRAIN_METRICS = Path("metrics/train.json")
LOSS_CURVE = Path("plots/loss.csv")
SAMPLES = Path("samples")
SAMPLE_INDEX = SAMPLES / "index.json"
SAMPLE_GRID = Path("plots/samples.png")
EVALUATION = Path("evaluation")
EVALUATE_METRICS = Path("metrics/evaluate.json")
