"""params.yaml: what is shipped is valid, and a slip is named by key with what is allowed."""

from pathlib import Path

import pytest

from pipeline.config import load_params
from pipeline.errors import UserError
from pipeline.machine import load_machine

SHIPPED = Path(__file__).parents[2] / "params.yaml"


def test_the_shipped_params_are_valid() -> None:
    assert load_params(SHIPPED).train.learning_rate == pytest.approx(1e-3)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("learning_rate: 1.0e-3", "learning_rate: -1.0", ["train.learning_rate", "greater than 0", "-1.0"]),
        ("beta_schedule: cosine", "beta_schedule: cosin", ["schedule.beta_schedule", "'scaled_linear'", "'cosin'"]),
        ("  batch_size: 64 ", "  batchsize: 64 ", ["train.batchsize: unknown key", "train.batch_size: missing"]),
        ("image_size: auto", "image_size: big", ["shard.image_size", "'auto'", "'big'"]),
        ("source: digits", "source: idx", ["fetch", "idx_dir"]),
        ("  steps: 25", "  steps: 5000", ["sample.steps is 5000", "schedule.timesteps"]),
        ("raw: data/fetched ", "raw: data/fetched/mine ", ["data", "DVC deletes"]),
        ("sigmoid_start: -3.0", "sigmoid_start: 3.0", ["schedule: sigmoid_start is 3.0, not below sigmoid_end"]),
        ("sigmoid_tau: 1.0", "sigmoid_tau: 0.0", ["schedule.sigmoid_tau", "greater than 0"]),
        ("min_snr_gamma: null", "min_snr_gamma: 0.0", ["train.min_snr_gamma", "greater than 0"]),
        ("timestep_sampling: uniform", "timestep_sampling: loss-aware", ["train.timestep_sampling", "'stratified'"]),
        ("network: unet", "network: vit", ["model.network", "'unet' or 'dit'", "'vit'"]),
        ("num_heads: auto", "num_heads: 0", ["model.num_heads", "'auto'"]),
        ("context: none", "context: outpaint", ["model.context", "'inpaint'", "'outpaint'"]),
        ("context_factor: 4", "context_factor: 1", ["model.context_factor", "greater than or equal to 2"]),
        ("guidance_interval: null", "guidance_interval: [5.0, 0.2]", ["sample: guidance_interval", "two rising noise"]),
        ("guidance_interval: null", "guidance_interval: [0.2]", ["sample.guidance_interval", "at least 2 items"]),
        ("guide_images: null", "guide_images: 64001", ["train: guide_images is 64001", "64000 of total_images"]),
        ("autoguidance: 1.0", "autoguidance: 2.0", ["sample: autoguidance and guidance are both on"]),
        (
            "data:",
            "classifier: {poolin: mean}\ndata:",
            ["classifier.poolin: unknown key", "known here: seed, total_images"],
        ),
        ("data:", "data: [", ["line", "not valid YAML"]),
    ],
)
def test_a_slip_is_one_line_that_names_key_and_remedy(tmp_path: Path, old: str, new: str, expected: list[str]) -> None:
    text = SHIPPED.read_text()
    assert text.count(old) >= 1
    text = text.replace("  guidance: 1.0 ", "  guidance: 2.0 ") if "autoguidance" in old else text
    (tmp_path / "params.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(UserError) as caught:
        load_params(tmp_path / "params.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert all(part in message for part in expected), message


def test_exponents_without_a_point_are_numbers_as_for_dvc(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text(SHIPPED.read_text().replace("learning_rate: 1.0e-3", "learning_rate: 1e-4"))
    assert load_params(tmp_path / "params.yaml").train.learning_rate == pytest.approx(1e-4)


def test_a_missing_file_says_where_to_run_from(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run from the repository's root"):
        load_params(tmp_path / "params.yaml")


def test_a_learned_variance_has_no_bound_of_a_fixed_one(tmp_path: Path) -> None:
    text, path = (
        SHIPPED.read_text().replace("learned_variance: false", "learned_variance: true"),
        tmp_path / "params.yaml",
    )
    path.write_text(text)
    assert load_params(path).model.learned_variance
    path.write_text(text.replace("original_elbo_weight: 0.0", "original_elbo_weight: 0.1"))
    with pytest.raises(UserError, match=r"^[^\n]*train\.original_elbo_weight is 0\.1, [^\n]*it must be 0[^\n]*$"):
        load_params(path)


@pytest.mark.parametrize(("given", "expected"), [("", None), ("auto", None), ("0", False), ("1", True)])
def test_a_switch_is_on_off_or_left_to_the_device(given: str, expected: bool | None) -> None:
    machine = load_machine({"PIPELINE_CHANNELS_LAST": given, "PIPELINE_COMPILE": given})
    assert (machine.channels_last, machine.compile) == (expected, expected)
    assert load_machine({}).activation_checkpointing is False
    assert load_machine({"PIPELINE_ACTIVATION_CHECKPOINTING": "1"}).activation_checkpointing is True


@pytest.mark.parametrize(
    "name",
    ["PIPELINE_PROCESSES", "PIPELINE_DEVICE", "PIPELINE_MICROBATCH", "PIPELINE_CHANNELS_LAST",
     "PIPELINE_ACTIVATION_CHECKPOINTING"],
)  # fmt: skip
def test_a_wrong_machine_variable_is_named(name: str) -> None:
    with pytest.raises(UserError, match=name):
        load_machine({name: "none", "PATH": "ignored"})


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_zero_terminal_snr_is_not_for_eps(tmp_path: Path, parameterization: str) -> None:
    text = SHIPPED.read_text().replace("zero_terminal_snr: false", "zero_terminal_snr: true")
    path = tmp_path / "params.yaml"
    path.write_text(text.replace("parameterization: v ", f"parameterization: {parameterization} "))
    if parameterization != "eps":
        assert load_params(path).model.parameterization == parameterization
        return
    with pytest.raises(UserError, match=r"zero_terminal_snr is true, so model\.parameterization must be v or x0"):
        load_params(path)


def test_classes_are_balanced_in_random_order_only(tmp_path: Path) -> None:
    text = SHIPPED.read_text().replace("class_balanced: false", "class_balanced: true")
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert load_params(path).order.class_balanced
    path.write_text(text.replace("kind: random ", "kind: windowed "))
    with pytest.raises(UserError, match="order: class_balanced is true, but kind is windowed"):
        load_params(path)


@pytest.mark.parametrize(
    ("mix", "message"),
    [("[]", "at least 1"), ("[{shards: a, weight: 0.0}]", "greater than 0"), ("[{shards: a}]", "missing")],
)
def test_a_mix_names_sets_and_weights(tmp_path: Path, mix: str, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(SHIPPED.read_text().replace("mix: null ", "mix: [{shards: a, weight: 2.0}] "))
    assert load_params(path).order.mix[0].weight == 2.0
    path.write_text(SHIPPED.read_text().replace("mix: null ", f"mix: {mix} "))
    with pytest.raises(UserError, match=f"order.mix: .*{message}"):
        load_params(path)
