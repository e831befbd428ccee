"""What every training's MLflow run says of where it ran."""

from __future__ import annotations

import getpass
import os

import torch

from pipeline.lineage import provenance
from pipeline.runtime.topology import Topology


def describe_run(topology: Topology, source: str) -> dict[str, str]:
    """Tags: machine, world, user, and the way back to the code; `source` is the stage's module."""
    return {
        "world_size": str(topology.world_size),
        "device": torch.cuda.get_device_name() if topology.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "mlflow.user": user_name(),
        "mlflow.source.name": source,
        **provenance(),
    }


def user_name() -> str:
    """Who runs this; a number where the system has no name for it, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
