"""A trained model in three lines of Python, for notebooks and services. No stage imports this."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ddpm_core import NoiseSchedule
from pipeline.build import build_network, build_sampler, build_schedule
from pipeline.config import SampleParams
from pipeline.data.pixels import to_uint8
from pipeline.engine.checkpoint import GUIDE_NAME, load_model_spec, load_weights
from pipeline.errors import UserError
from pipeline.guides import load_classifier, load_guide
from pipeline.runtime.rng import Stream, draw_normal


class TrainedModel:
    """A model as `load_model` gives it.

    Args:
        spec: what model.json says.
        network: with its weights, on the device where samples are drawn.
        schedule: on that device.
        guides: what guides it beside its own classes, as `build_guidance` takes it: `guide`, `classifier`.
    """

    def __init__(self, spec: dict[str, Any], network: nn.Module, schedule: NoiseSchedule, **guides: nn.Module) -> None:
        self.spec, self.network, self.schedule, self.guides = spec, network, schedule, guides
        self.classes: tuple[str, ...] = tuple(spec["classes"])

    def sample(
        self,
        labels: Sequence[int | str] | None = None,
        *,
        num_images: int = 1,
        seed: int = 0,
        sampler: Literal["ddim", "ddpm", "dpm_solver", "heun"] = "ddim",
        steps: int = 25,
        guidance: float = 1.0,
        guidance_interval: tuple[float, float] | None = None,
        autoguidance: float = 1.0,
        classifier_scale: float = 0.0,
    ) -> Tensor:
        """Draw images. Image i depends on (seed, i) and its label alone, not on how many are drawn with it.

        Args:
            labels: one an image, as class names or their numbers; None for a model without classes, or for images of
                no class in particular from one that has them.
            num_images: how many without labels; labels say it themselves.
            seed: in [0, 2**32).
            sampler, steps, guidance, guidance_interval, autoguidance, classifier_scale: as in params.yaml.

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
        draw = build_sampler(params, self.spec, self.network, self.schedule, **self.guides)
        device = self.schedule.betas.device
        condition = None if labels is None else torch.tensor([self._number(label) for label in labels], device=device)
        places = torch.arange(num_images if condition is None else len(condition), device=device)

        def noise(k: int) -> Tensor:
            return draw_normal(seed, Stream.SAMPLE, places, draw.shape, draw=k)

        return to_uint8(draw.method(noise(0), noise, condition=condition))

    def _number(self, label: int | str) -> int:
        number = label if isinstance(label, int) else self.classes.index(label) if label in self.classes else -1
        if not 0 <= number < len(self.classes):
            known = ", ".join(self.classes) or "none: the model is unconditional"
            raise UserError(f"label {label!r} is unknown; classes of this model: {known}")
        return number


def load_model(
    folder: str | Path = "model", device: torch.device | str = "cpu", *, classifier: str | Path | None = None
) -> TrainedModel:
    """The model in a folder, ready to sample.

    Args:
        folder: the train stage's output: `model.json` and `weights.safetensors`, both data, never code.
        device: where to draw samples.
        classifier: the classifier stage's output, for `classifier_scale`; None for none. The guide that `autoguidance`
            needs lies in the model's folder, where it was trained with one.

    Raises:
        UserError: a folder holds no model, or one of another format, or the two don't belong together.
    """
    folder, device = Path(folder), torch.device(device)
    spec = load_model_spec(folder)
    network = build_network(spec)
    load_weights(folder, network)
    guides = {"guide": load_guide(folder, spec, device)} if (folder / GUIDE_NAME).is_file() else {}
    if classifier is not None:
        guides["classifier"] = load_classifier(Path(classifier), spec, device)
    schedule = build_schedule(spec).to(device)
    return TrainedModel(spec, network.to(device).eval().requires_grad_(False), schedule, **guides)
