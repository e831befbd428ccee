"""From names and parameters to objects."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import ddpm_core
from pipeline.build.networks import (
    build_context,
    build_network,
    build_schedule,
    has_learned_variance,
    make_model_spec,
    place_network,
)
from pipeline.build.sampling import build_guidance, build_sampler
from pipeline.build.training import build_learning_rate, build_order, build_precision
from pipeline.config import load_params
from pipeline.data.index import ShardIndex
from pipeline.data.order import RandomOrder, WindowedOrder
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.context import Colour, Inpaint, SuperResolution
from pipeline.errors import UserError
from pipeline.sections import MixedSet, Params

PARAMS = load_params(Path(__file__).parents[2] / "params.yaml")


def index(size: int = 8, classes: int = 10) -> SimpleNamespace:
    names, labels = tuple(map(str, range(classes))), np.repeat(np.arange(classes or 1) if classes else [-1], 3)
    return SimpleNamespace(image_size=size, channels=1, num_classes=classes, classes=names, labels=labels)


def changed(section: str, **values: object) -> Params:
    return PARAMS.model_copy(update={section: getattr(PARAMS, section).model_copy(update=values)})


@pytest.mark.parametrize(("size", "levels"), [(8, 2), (12, 2), (16, 3), (28, 3), (32, 4), (64, 4), (100, 3), (9, 1)])
def test_auto_multipliers_fit_the_image(size: int, levels: int) -> None:
    arguments = make_model_spec(PARAMS, index(size))["network"]
    assert len(arguments["channel_multipliers"]) == levels
    assert size % 2 ** (levels - 1) == 0


def test_the_initial_weights_depend_on_the_seed_alone() -> None:
    spec = make_model_spec(PARAMS, index())
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = build_network(spec, seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    two, three = build_network(spec, seed=5), build_network(spec, seed=6)
    assert torch.equal(one.conv_in.weight, two.conv_in.weight)
    assert not torch.equal(one.conv_in.weight, three.conv_in.weight)


def test_the_learning_rate_warms_up_and_falls_to_nothing() -> None:
    rate = build_learning_rate(PARAMS.train)
    total, warm = PARAMS.train.total_images, PARAMS.train.warmup_images
    assert rate(0) == 0.0
    assert rate(warm // 2) == pytest.approx(0.5 * PARAMS.train.learning_rate, rel=0.01)
    assert rate(total // 2) == pytest.approx(0.5 * PARAMS.train.learning_rate)
    assert rate(total) == pytest.approx(0.0, abs=1e-12)
    constant = build_learning_rate(changed("train", learning_rate_schedule="constant").train)
    assert constant(total) == PARAMS.train.learning_rate


def test_what_can_not_be_built_is_a_user_error() -> None:
    spec = make_model_spec(PARAMS, index())
    with pytest.raises(UserError, match="known: unet, dit"):
        build_network({**spec, "network": {"name": "vit"}})
    with pytest.raises(UserError, match="can't be halved"):
        make_model_spec(changed("model", channel_multipliers=[1, 1, 1, 1, 1]), index())
    with pytest.raises(UserError, match=r"model\.patch_size is 3, which does not divide images of 8 px"):
        make_model_spec(changed("model", network="dit", patch_size=3), index())
    with pytest.raises(UserError, match=r"model\.num_heads is 5, which does not divide a width of 192"):
        make_model_spec(changed("model", network="dit", num_heads=5), index())
    with pytest.raises(UserError, match="schedule: betas must lie"):
        build_schedule({"schedule": {**spec["schedule"], "beta_schedule": "linear", "timesteps": 10}})
    unconditional = make_model_spec(PARAMS, index(classes=0))
    guided = PARAMS.sample.model_copy(update={"guidance": 2.0})
    with pytest.raises(UserError, match="has no classes"):
        build_sampler(guided, unconditional, build_network(unconditional), build_schedule(unconditional))


def test_the_schedule_is_what_params_ask_for() -> None:
    spec = make_model_spec(
        changed("schedule", beta_schedule="sigmoid", zero_terminal_snr=True, sigmoid_tau=0.7), index()
    )
    built = build_schedule(spec)
    asked = ddpm_core.register_schedule(beta_schedule="sigmoid", zero_terminal_snr=True, sigmoid_tau=0.7)
    assert torch.equal(built.betas, asked.betas)
    assert built.zero_terminal_snr


def test_precision_on_the_cpu_is_float32_unless_asked() -> None:
    cpu = torch.device("cpu")
    assert build_precision("auto", cpu) == torch.float32
    assert build_precision("bfloat16", cpu) == torch.bfloat16


@pytest.mark.parametrize(
    ("sampler", "guidance", "threshold"),
    [("ddim", 1.0, None), ("ddim", 2.0, 0.9), ("ddpm", 0.0, None), ("dpm_solver", 1.0, None), ("heun", 1.0, 0.9)],
)
def test_a_sample_depends_on_its_seed_alone(sampler: str, guidance: float, threshold: float | None) -> None:
    settings = {"sampler": sampler, "steps": 4, "guidance": guidance, "dynamic_threshold": threshold}
    params = changed("model", base_channels=8).model_copy(update={"sample": changed("sample", **settings).sample})
    spec = make_model_spec(params, index())
    network = build_network(spec).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    draw = build_sampler(params.sample, spec, network, build_schedule(spec))
    together = draw(torch.arange(12))
    assert together.dtype == torch.uint8
    assert draw.labels(torch.arange(12)).tolist() == [*range(10), 0, 1]
    alone = draw(torch.tensor([7]))
    assert (together[7].int() - alone[0].int()).abs().max() <= 1
    assert not torch.equal(together[7], together[8])


def test_each_sampler_name_is_its_own_method_and_the_threshold_reaches_it() -> None:
    spec = make_model_spec(changed("model", base_channels=8), index())
    network = build_network(spec).eval()
    torch.nn.init.normal_(network.conv_out.weight, std=3.0)

    def draw(**settings: object) -> bytes:
        params = changed("sample", steps=4, **settings).sample
        return build_sampler(params, spec, network, build_schedule(spec))(torch.arange(4)).numpy().tobytes()

    names, shares = ("ddim", "ddpm", "dpm_solver", "heun"), (None, 0.5)
    assert len({draw(sampler=name, dynamic_threshold=share) for name in names for share in shares}) == 8


def test_the_order_is_what_params_ask_for(tmp_path: Path) -> None:
    def write(name: str, count: int) -> ShardIndex:
        samples = (Sample(np.zeros((4, 4, 1), np.uint8), i % 2) for i in range(count))
        return write_shards(tmp_path / name, samples, image_size=4, channels=1, encoding="raw", classes=("a", "b"),
                            shard_images=5)  # fmt: skip

    one, two = write("one", 20), write("two", 31)
    places = np.arange(40)

    def ids(indexes: list[ShardIndex], **values: object) -> list[int]:
        return build_order(changed("order", **values), indexes).images_at(places).tolist()

    form = {"batch_size": PARAMS.train.batch_size, "num_lanes": 4, "window_images": 6}
    assert ids([one]) == RandomOrder(20, PARAMS.train.seed).images_at(places).tolist()
    windowed = WindowedOrder([5, 5, 5, 5], PARAMS.train.seed, **form)
    assert ids([one], kind="windowed", lanes=4, window_images=6) == windowed.images_at(places).tolist()
    assert [i % 2 for i in ids([one], class_balanced=True)].count(0) == 20
    mix = [MixedSet(shards="one", weight=3.0), MixedSet(shards="two", weight=1.0)]
    for values in ({}, {"class_balanced": True}, {"kind": "windowed", "lanes": 4, "window_images": 6}):
        mixed = ids([one, two], mix=mix, **values)
        assert 28 <= sum(i < 20 for i in mixed) <= 32
        assert max(mixed) < 51


def test_classes_of_all_mixed_sets_are_sampled() -> None:
    first, second = index(), index()
    first.labels, second.labels = np.array([0, 1, 1]), np.array([7, 1])
    assert make_model_spec(PARAMS, first, second)["labels"] == [0, 1, 7]


def test_a_transformer_is_built_by_name_and_has_the_width_of_the_embedding() -> None:
    """48 base channels, the default, are DiT-Ti: 192 wide, 12 deep, 3 heads."""
    spec = make_model_spec(changed("model", network="dit"), index())
    network = build_network(spec)
    assert isinstance(network, ddpm_core.DiT)
    assert (spec["network"]["width"], len(network.blocks), network.blocks[0].num_heads) == (192, 12, 3)
    assert network.input_shape == (1, 8, 8)
    four = make_model_spec(changed("model", network="dit", num_heads=4, patch_size=4), index())["network"]
    assert (four["num_heads"], four["patch_size"]) == (4, 4)


@pytest.mark.parametrize("name", ["unet", "dit"])
@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver", "heun"])
def test_a_learned_variance_reaches_network_and_sampler(name: str, sampler: str) -> None:
    params = changed("model", network=name, learned_variance=True, qk_norm=True, base_channels=8, depth=1)
    spec = make_model_spec(params, index())
    assert has_learned_variance(spec)
    network = build_network(spec).eval()
    out = network.conv_out if name == "unet" else network.patch_out
    torch.nn.init.normal_(out.weight, std=0.5)
    settings = params.sample.model_copy(update={"sampler": sampler, "steps": 3})
    draw = build_sampler(settings, spec, network, build_schedule(spec))
    drawn = draw(torch.arange(4))
    assert drawn.shape == (4, 1, 8, 8)
    with torch.no_grad():
        out.bias[len(out.bias) // 2 :] = -2.0  # of the variance alone
    assert torch.equal(draw(torch.arange(4)), drawn) == (sampler != "ddpm")


def test_a_model_from_before_the_learned_variance_has_none() -> None:
    network = make_model_spec(PARAMS, index())["network"]
    assert not has_learned_variance({"network": network})
    assert not has_learned_variance({"network": {key: network[key] for key in network if key != "learned_variance"}})


@pytest.mark.parametrize(("asked", "last"), [(None, False), (False, False), (True, True)])
def test_channels_last_is_for_those_who_ask_or_have_cuda(asked: bool | None, last: bool) -> None:
    network = build_network(make_model_spec(changed("model", base_channels=8), index()))
    placed = place_network(network, torch.device("cpu"), asked)
    weight = placed.get_submodule("down.0.block.conv_in").weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == last
    assert weight.is_contiguous() != last


def test_without_a_context_the_model_is_described_as_before() -> None:
    spec = make_model_spec(PARAMS, index())
    assert set(spec) == {"network", "schedule", "parameterization", "classes", "labels"}
    assert "context_channels" not in spec["network"]
    assert build_context(spec) is None
    assert isinstance(build_network(spec), ddpm_core.UNet)


@pytest.mark.parametrize(
    ("context", "expected"),
    [("inpaint", (Inpaint(), 4)), ("super_resolution", (SuperResolution(4), 3)), ("colour", (Colour(), 1))],
)
@pytest.mark.parametrize("classes", [0, 3])
def test_a_context_reaches_maker_and_network(context: str, expected: tuple, classes: int) -> None:
    images = index(classes=classes)
    images.channels = 3
    spec = make_model_spec(changed("model", context=context, base_channels=8), images)
    assert (build_context(spec), spec["network"]["context_channels"]) == expected
    network = build_network(spec).eval()
    told = {"context": torch.zeros(2, expected[1], 8, 8)}
    if classes:
        told["label"] = torch.tensor([0, 3])
    assert network(torch.zeros(2, 3, 8, 8), torch.tensor([0, 1]), told).shape == (2, 3, 8, 8)
    assert any("embedders.label" in name for name, _ in network.named_parameters()) == bool(classes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"context": "colour"}, "model.context is colour, but the images are grey"),
        ({"context": "super_resolution", "context_factor": 3}, "context_factor is 3, which does not divide"),
    ],
)
def test_a_context_that_the_images_do_not_allow_is_refused(values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_model_spec(changed("model", **values), index())


def test_guidance_beside_a_context_drops_the_label_and_keeps_the_context() -> None:
    spec = make_model_spec(changed("model", context="inpaint", base_channels=8), index())
    sample = PARAMS.sample.model_copy(update={"guidance": 2.0})
    denoiser = build_guidance(sample, spec, build_network(spec), build_schedule(spec))
    assert isinstance(denoiser, ddpm_core.ClassifierFreeGuidance)
    assert denoiser.null == {"label": len(spec["classes"])}
    with pytest.raises(UserError, match="classifier_scale is for models without a context"):
        build_guidance(
            sample.model_copy(update={"classifier_scale": 1.0}), spec, build_network(spec), build_schedule(spec)
        )
