"""A trained model in three lines of Python, for notebooks and services. No stage imports this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ddpm_core import NoiseSchedule
from pipeline.build.networks import build_context, build_network, build_schedule
from pipeline.build.sampling import build_sampler
from pipeline.data.pixels import to_unit_range
from pipeline.engine.checkpoint import GUIDE_NAME, load_model_spec, load_weights
from pipeline.engine.context import Context, to_condition
from pipeline.engine.latents import FirstStage
from pipeline.errors import UserError
from pipeline.first_stage import WEIGHTS_IN_MODEL, load_first_stage
from pipeline.guides import load_classifier, load_guide
from pipeline.runtime.registry import fetch_model, is_model_uri
from pipeline.runtime.rng import Stream, draw_normal
from pipeline.sections import SampleParams


class TrainedModel:
    """A model as `load_model` gives it.

    Args:
        spec: what model.json says.
        network: with its weights, on the device where samples are drawn.
        schedule: on that device.
        first_stage: of a model of latents, on that device too.
        guides: what guides it beside its own classes, as `build_guidance` takes it: `guide`, `classifier`.
    """

    def __init__(
        self,
        spec: dict[str, Any],
        network: nn.Module,
        schedule: NoiseSchedule,
        first_stage: FirstStage | None = None,
        **guides: nn.Module,
    ) -> None:
        self.spec, self.network, self.schedule = spec, network, schedule
        self.first_stage, self.guides = first_stage, guides
        self.classes: tuple[str, ...] = tuple(spec["classes"])

    def sample(
        self,
        labels: Sequence[int | str | None] | None = None,
        *,
        num_images: int = 1,
        seed: int = 0,
        sampler: Literal["ddim", "ddpm", "dpm_solver", "heun"] = "ddim",
        steps: int = 25,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        autoguidance: float = 1.0,
        classifier_scale: float = 0.0,
        context: Tensor | NDArray[np.uint8] | None = None,
        mask: Tensor | NDArray[np.bool_] | None = None,
    ) -> Tensor:
        """Draw images. Image i depends on (seed, i) and its label alone, not on how many are drawn with it.

        Args:
            labels: one an image, as class names or their numbers; None, one for all or one for an image, for no class
                in particular, and for a model without classes.
            num_images: how many without labels; labels say it themselves.
            seed: in [0, 2**32).
            sampler, steps, guidance, guidance_interval, autoguidance, classifier_scale: as in params.yaml.
            context: for a model with a context, and only for one, uint8 (n, c, h, w): small images to enlarge, grey
                ones (c of 1) to colour, or ones to paint into. They say how many images there are.
            mask: for painting, bool (n, 1, h, w): true where pixels are missing; the others come back as they are.

        Returns:
            (n, c, h, w) uint8 on the model's device.

        Raises:
            UserError: a label that the model does not know, or settings that can't be.
        """
        params = SampleParams(
            seed=seed, num_samples=2, sampler=sampler, steps=steps, spacing="trailing", eta=0.0, guidance=guidance,
            guidance_interval=None if guidance_interval is None else list(guidance_interval),
            autoguidance=autoguidance, classifier_scale=classifier_scale, dynamic_threshold=None,
        )  # fmt: skip
        draw = build_sampler(params, self.spec, self.network, self.schedule, None, self.first_stage, **self.guides)
        device = self.schedule.betas.device
        named = None if labels is None else [self._number(label) for label in labels]
        numbers = torch.tensor(named, device=device) if named and self.classes else None
        given = self._context(context, mask, draw.shape, device)
        count = num_images if labels is None else len(labels)
        if given is not None:
            if numbers is not None and len(numbers) != len(given.channels):
                raise UserError(f"{len(numbers)} labels for {len(given.channels)} images in context: one an image")
            count = len(given.channels)
        places = torch.arange(count, device=device)

        def noise(k: int) -> Tensor:
            return draw_normal(seed, Stream.SAMPLE, places, draw.shape, draw=k)

        x = draw.method(noise(0), noise, condition=to_condition(numbers, given))
        return draw.to_pixels(x if given is None else given.complete(x))

    def _context(
        self,
        images: Tensor | NDArray[np.uint8] | None,
        mask: Tensor | NDArray[np.bool_] | None,
        shape: tuple[int, ...],
        device: torch.device,
    ) -> Context | None:
        maker = build_context(self.spec)
        if maker is None:
            if images is not None or mask is not None:
                raise UserError("context or mask is given, but this model was trained without a context")
            return None
        given = None if images is None else torch.as_tensor(images, device=device)
        if given is None or given.dtype != torch.uint8 or given.ndim != 4:
            found = "none" if given is None else f"{str(given.dtype).removeprefix('torch.')} {tuple(given.shape)}"
            raise UserError(f"context is {found}, but this model needs uint8 images (n, c, h, w)")
        missing = None if mask is None else torch.as_tensor(mask, device=device).bool()
        return maker.from_user(to_unit_range(given), missing, shape)

    def _number(self, label: int | str | None) -> int:
        if label is None:
            return len(self.classes)  # the row of "no class"
        number = label if isinstance(label, int) else self.classes.index(label) if label in self.classes else -1
        if not 0 <= number < len(self.classes):
            known = ", ".join(self.classes) or "none: the model is unconditional"
            raise UserError(f"label {label!r} is unknown; classes of this model: {known}")
        return number


def resolve_model(place: str | Path) -> Path:
    """The folder of a model that may lie in MLflow: downloaded then, as `load_model` takes it."""
    return fetch_model(str(place)) if is_model_uri(place) else Path(place)


def load_model(
    place: str | Path = "model", device: torch.device | str = "cpu", *, classifier: str | Path | None = None
) -> TrainedModel:
    """The model in a folder or in MLflow, ready to sample.

    Args:
        place: the train stage's output: `model.json` and `weights.safetensors`, both data, never code; of a model of
            latents also `first_stage.safetensors`. Or an address such as `models:/ddpm-pipeline@best` or
            `runs:/ID/registered_model`, looked up at `MLFLOW_TRACKING_URI`, or else in `mlflow.db` here.
        device: where to draw samples.
        classifier: the classifier stage's output, for `classifier_scale`; None for none. The guide that `autoguidance`
            needs lies in the model's folder, where it was trained with one.

    Raises:
        UserError: there is no model, or one of another format, or what comes with it does not belong to it.
    """
    folder, device = resolve_model(place), torch.device(device)
    spec = load_model_spec(folder)
    network = build_network(spec)
    load_weights(folder, network)
    guides = {"guide": load_guide(folder, spec, device)} if (folder / GUIDE_NAME).is_file() else {}
    if classifier is not None:
        guides["classifier"] = load_classifier(Path(classifier), spec, device)
    network.to(device).eval().requires_grad_(False)
    first_stage = load_first_stage(spec, folder / WEIGHTS_IN_MODEL, device)
    return TrainedModel(spec, network, build_schedule(spec).to(device), first_stage, **guides)
