"""Every artefact of the pipeline, named once. Relative to the folder of dvc.yaml, where DVC runs each stage."""

from pathlib import Path

PARAMS = Path("params.yaml")
DVC_YAML = Path("dvc.yaml")
DVC_LOCK = Path("dvc.lock")

# Outputs of stages: DVC caches them and deletes them before the stage runs.
RAW = Path("data/fetched")
SHARDS = Path("shards")
SHARD_INDEX = SHARDS / "index.json"
HELD_OUT = SHARDS / "held_out"  # a set of its own, where shard.held_out_share is above 0
SHARD_REPORT = Path("metrics/shard.json")
REFUSED = Path("metrics/refused.csv")
DUPLICATES = Path("metrics/duplicates.csv")
CLASSES = Path("metrics/classes.csv")
CONTACT_SHEET = Path("plots/contact.png")
REFERENCE = Path("reference")
FIRST_STAGE = Path("first_stage")
AUTOENCODER_METRICS = Path("metrics/autoencoder.json")
AUTOENCODER_CURVE = Path("plots/autoencoder.csv")
LATENTS = Path("latents")
ENCODE_METRICS = Path("metrics/encode.json")
RECONSTRUCTIONS = Path("plots/reconstructions.png")
MODEL = Path("model")
CLASSIFIER = Path("classifier")
CLASSIFIER_METRICS = Path("metrics/classifier.json")
TRAIN_METRICS = Path("metrics/train.json")
LOSS_CURVE = Path("plots/loss.csv")
SAMPLES = Path("samples")
SAMPLE_INDEX = SAMPLES / "index.json"
SAMPLE_GRID = Path("plots/samples.png")
DENOISING_FILM = Path("plots/denoising.png")
EVALUATION = Path("evaluation")
EVALUATE_METRICS = Path("metrics/evaluate.json")
LIKELIHOOD = Path("likelihood")
LIKELIHOOD_METRICS = Path("metrics/likelihood.json")
LIKELIHOOD_CURVE = Path("plots/likelihood.csv")

# Of commands, which are no stages: kept by nobody but the user.
SWEEPS = Path("sweeps")
