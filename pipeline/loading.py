"""A candidate ready to draw: its network, what guides it, its first stage; and how often the networks were called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline import paths
from pipeline.build.networks import build_network, build_schedule, place_network
from pipeline.build.sampling import build_sampler
from pipeline.engine.candidates import Candidate, load_average, load_guide_weights
from pipeline.engine.checkpoint import WEIGHTS_NAME
from pipeline.engine.generate import ImageSampler
from pipeline.errors import UserError
from pipeline.first_stage import WEIGHTS, WEIGHTS_IN_MODEL, load_first_stage
from pipeline.guides import load_classifier, load_context_images
from pipeline.runtime.files import sha256_file, sha256_json
from pipeline.sections import SampleParams


class LoadedCandidate:
    """The networks of one candidate with one of its averages, on a device, from which samplers are made.

    Args:
        candidate, ema: whose weights, and which.
        sample: says what guides beside the network itself; the same for all samplers made of it.
        device: where to draw.
        channels_last: as in `place_network`.

    Raises:
        UserError: weights are missing, or don't fit the network or each other.
    """

    def __init__(
        self, candidate: Candidate, ema: str, sample: SampleParams, device: torch.device, channels_last: bool | None
    ) -> None:
        self.candidate, self.ema, self.spec, self.device = candidate, ema, candidate.spec, device
        weights = {"network": load_average(candidate, ema)}
        if sample.autoguidance != 1:
            guide = load_guide_weights(candidate)
            if guide is None:
                raise UserError(f"{candidate.name} has no guide, as sample.autoguidance asks for: set it to 1")
            weights["guide"] = guide
        networks = {name: self._build(one, channels_last) for name, one in weights.items()}
        self.network, self.guides = networks.pop("network"), networks
        if sample.classifier_scale != 0 and self.spec["classes"]:
            self.guides["classifier"] = load_classifier(paths.CLASSIFIER, self.spec, device)
        self.schedule = build_schedule(self.spec).to(device)
        kept = candidate.folder / WEIGHTS_IN_MODEL
        place = paths.FIRST_STAGE / WEIGHTS if candidate.is_checkpoint else kept
        self.first_stage = load_first_stage(self.spec, place, device)
        self.images = load_context_images(self.spec)

    def _build(self, weights: dict[str, Tensor], channels_last: bool | None) -> nn.Module:
        network = build_network(self.spec)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            where, reason = self.candidate.folder, " ".join(str(error).split())[:120]
            raise UserError(f"{where}: weights don't fit the network of model.json ({reason})") from None
        return place_network(network, self.device, channels_last).eval().requires_grad_(False)

    def sampler(self, sample: SampleParams) -> CountedSampler:
        """Seeds -> images with these settings."""
        draw = build_sampler(
            sample, self.spec, self.network, self.schedule, self.images, self.first_stage, **self.guides
        )
        return CountedSampler(draw, self.device, self.network, *self.guides.values())


class CountedSampler:
    """Seeds -> images, as an :class:`ImageSampler`, counting what goes through the networks. A context manager, since
    the networks outlive it.

    Args:
        sampler: what draws.
        device: where.
        networks: whose calls count: the denoiser, and what guides it.
    """

    def __init__(self, sampler: ImageSampler, device: torch.device, *networks: nn.Module) -> None:
        self.sampler, self.device = sampler, device
        self.drawn = self._seen = 0
        self._hooks = [network.register_forward_pre_hook(self._count) for network in networks]

    def _count(self, network: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._seen += len(arguments[0])

    def __call__(self, seeds: Tensor) -> Tensor:
        """(b,) int64 seeds on the device -> (b, c, h, w) uint8 there."""
        self.drawn += len(seeds)
        return self.sampler(seeds)

    def labels(self, seeds: Tensor) -> Tensor | None:
        """As the sampler's."""
        return self.sampler.labels(seeds)

    def calls_per_image(self) -> float:
        """How often networks were called for one image, as counted: Heun's method calls twice a step, and so does
        guidance by the null class. One image is drawn for it where none was yet."""
        if not self.drawn:
            self(torch.zeros(1, dtype=torch.int64, device=self.device))
        return self._seen / self.drawn

    def __enter__(self) -> CountedSampler:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()


def weight_hashes(candidate: Candidate, ema: str, sample: SampleParams) -> dict[str, str]:
    """Hashes of what reaches the images beside the settings: all weights, and what says how to build their networks.

    Raises:
        UserError: a file is missing or damaged.
    """
    spec = {name: value for name, value in candidate.spec.items() if name != "lineage"}  # not where it comes from
    hashes = {"weights": candidate.sha256(ema), "ema": ema if ema == "network" else "", "spec": sha256_json(spec)}
    if sample.autoguidance != 1 and (guide := candidate.guide_file()) is not None:
        hashes["guide"] = sha256_file(guide)
    classifier = [paths.CLASSIFIER / name for name in (WEIGHTS_NAME, "model.json")]
    if sample.classifier_scale != 0:
        hashes |= {f"classifier/{path.name}": sha256_file(path) for path in classifier if path.is_file()}
    return hashes
