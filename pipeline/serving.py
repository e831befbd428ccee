"""What MLflow runs to serve a registered model: this file is stored with the model as its code, and no pickle is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel, PythonModelContext
from numpy.typing import NDArray

from pipeline.models import load_model


class ImageGenerator(PythonModel):
    """Rows -> images: one an input row, uint8 (n, c, h, w)."""

    def load_context(self, context: PythonModelContext) -> None:
        """Load the network once."""
        self.model = load_model(context.artifacts["model"])

    def predict(
        self, context: PythonModelContext, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> NDArray[np.uint8]:
        """Images of the rows in the column `label`: a class name, or empty for no class in particular.

        Image i depends on the parameter `seed`, on i and on its label alone.

        Args:
            context: unused.
            model_input: a data frame; only its column `label` is read.
            params: `seed`, `steps`, `sampler` and `guidance`, as `TrainedModel.sample` takes them.
        """
        labels = [str(label) if label else None for label in model_input["label"]]
        return self.model.sample(labels, **(params or {})).cpu().numpy()


set_model(ImageGenerator())
