"""Latents: drawn by place, scaled, stored as moments, never clipped, decoded by the weights they came from alone."""

import io
import json
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipeline.build.networks import build_network, build_schedule, make_model_spec
from pipeline.build.sampling import build_sampler
from pipeline.config import load_params, params_from
from pipeline.data.index import load_index
from pipeline.data.pixels import pixels_to_x0
from pipeline.data.store import ShardStore, read_meta
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.checkpoint import image_form, save_model
from pipeline.engine.latents import FirstStage, interleave, make_latents, measure_scale
from pipeline.engine.reconstruction import score_reconstructions
from pipeline.engine.score import load_reconstruction_scores
from pipeline.errors import UserError
from pipeline.first_stage import (
    NOTE,
    WEIGHTS,
    WEIGHTS_IN_MODEL,
    build_autoencoder,
    build_discriminator,
    build_x0,
    load_first_stage,
    load_latents,
    load_trained,
    make_autoencoder_spec,
)
from pipeline.lineage import ROOT
from pipeline.models import load_model
from pipeline.runtime.files import save_json, sha256_file
from pipeline.runtime.topology import Topology
from pipeline.sections import Params
from tests.worlds import GaussianWorld

PARAMS = load_params(ROOT / "recipes/latent/params.yaml")
ALONE = Topology(0, 1, 0, 1, torch.device("cpu"))
IMAGES = SimpleNamespace(image_size=16, channels=1, num_classes=2, classes=("cat", "dog"), labels=np.array([0, 1]))


def changed(section: str, **values: object) -> Params:
    return PARAMS.model_copy(update={section: getattr(PARAMS, section).model_copy(update=values)})


def raw_params() -> dict:
    return PARAMS.model_dump(mode="python")


def make_first_stage(folder: Path, *, seed: int = 0) -> dict:
    """A first stage on disk, and what latents say of it."""
    spec = make_autoencoder_spec(changed("autoencoder", base_channels=8).autoencoder, IMAGES)
    save_model(folder, build_autoencoder(spec, seed=seed), spec, {})
    return {**spec, "scale": 0.5, "weights_sha256": sha256_file(folder / WEIGHTS)}


def make_spec(first_stage: dict) -> dict:
    latents = SimpleNamespace(**{**vars(IMAGES), "image_size": 4, "channels": 8})
    return make_model_spec(changed("model", base_channels=8), latents, first_stage=first_stage)


def test_a_latent_is_keyed_by_its_place_and_has_the_moments_it_was_stored_with() -> None:
    moments = torch.cat((torch.full((500, 2, 4, 4), 3.0), torch.full((500, 2, 4, 4), 2 * np.log(0.5))), dim=1)
    places = torch.arange(500)
    z = make_latents(moments, places, seed=0, scale=0.1)
    assert z.shape == (500, 2, 4, 4)
    assert torch.equal(make_latents(moments[7:9], places[7:9], seed=0, scale=0.1), z[7:9])
    assert not torch.equal(make_latents(moments[7:9], places[7:9] + 500, seed=0, scale=0.1), z[7:9])
    assert float(z.mean()) == pytest.approx(0.3, abs=0.002)
    assert float(z.std()) == pytest.approx(0.05, rel=0.02)


def test_training_draws_latents_by_the_spec_and_pixels_without() -> None:
    places = torch.arange(3)
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    assert build_x0({}, 0)(images, places).abs().max() <= 1
    assert build_x0({}, 0) is pixels_to_x0
    moments = torch.randn(3, 4, 2, 2)
    drawn = build_x0({"first_stage": {"scale": 5.0}}, 7)(moments, places)
    assert torch.equal(drawn, make_latents(moments, places, seed=7, scale=5.0))
    assert drawn.abs().max() > 1


def test_the_scale_is_that_of_all_blocks_together() -> None:
    rng = np.random.default_rng(0)
    blocks = [rng.normal(loc, 2.0, (n, 6, 4, 4)).astype(np.float32) for loc, n in ((0, 64), (5, 64), (9, 10))]
    every = np.concatenate(blocks).astype(np.float64)
    exact = 1 / np.sqrt(every[:, :3].var() + np.exp(every[:, 3:]).mean())
    assert measure_scale(blocks) == pytest.approx(exact, rel=1e-12)
    assert measure_scale(blocks[:1]) != pytest.approx(exact, rel=0.01)


def test_moments_are_stored_bit_by_bit_with_label_and_meta(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    moments = rng.normal(0, 100, (5, 4, 3, 3)).astype(np.float32)
    samples = [Sample(m.transpose(1, 2, 0), i % 2, {"path": f"{i}.png"}) for i, m in enumerate(moments)]
    form = {"image_size": 3, "channels": 4, "encoding": "moments", "classes": ("a", "b"), "shard_images": 2}
    index = write_shards(tmp_path / "l", iter(samples), **form, notes={NOTE: {"scale": 2.0}})
    stored, labels = ShardStore(index).read(np.array([4, 0, 3]))
    assert stored.dtype == np.float32
    assert np.array_equal(stored, moments[[4, 0, 3]])
    assert labels.tolist() == [0, 0, 1]
    assert [meta["path"] for meta in read_meta(index)] == [f"{i}.png" for i in range(5)]
    assert json.loads((tmp_path / "l" / NOTE).read_text()) == {"scale": 2.0}
    with tarfile.open(tmp_path / "l/00001.tar") as tar:  # a stock reader sees plain .npy files
        assert np.array_equal(
            np.load(io.BytesIO(tar.extractfile("00000002.npy").read())), moments[2].transpose(1, 2, 0)
        )
    write_shards(tmp_path / "m", iter(samples), **form, notes={NOTE: {"scale": 2.0}})
    assert load_index(tmp_path / "m") == index
    with pytest.raises(ValueError, match="float64"):
        write_shards(tmp_path / "n", [Sample(moments[0].transpose(1, 2, 0).astype(float))], **form)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "dpm_solver", "heun"])
def test_latents_are_never_clipped(tmp_path: Path, sampler: str) -> None:
    """Latents of a wide Gaussian keep their deviation through every sampler; clipped ones would stay in [-1, 1]."""
    spec = make_spec(make_first_stage(tmp_path))
    schedule = build_schedule(spec)
    params = changed("sample", sampler=sampler, steps=50).sample
    seen: list[torch.Tensor] = []

    class Spy(FirstStage):
        def decode(self, latents: torch.Tensor) -> torch.Tensor:
            seen.append(latents)
            return super().decode(latents)

    network = GaussianWorld(schedule, mean=0.5, deviation=3.0).denoiser("v")
    draw = build_sampler(params, spec, network, schedule, first_stage=Spy(build_autoencoder(spec["first_stage"]), 0.5))
    images = draw(torch.arange(40))
    assert (images.shape, images.dtype) == ((40, 1, 16, 16), torch.uint8)
    assert seen[0].shape == (40, 4, 4, 4)
    assert float(seen[0].std()) == pytest.approx(3.0, rel=0.1)
    assert float(seen[0].abs().max()) > 5


def test_pixels_are_still_clipped(tmp_path: Path) -> None:
    spec = make_model_spec(changed("model", base_channels=8), IMAGES)
    schedule = build_schedule(spec)
    draw = build_sampler(PARAMS.sample, spec, GaussianWorld(schedule, deviation=3.0).denoiser("v"), schedule)
    out = draw.method(torch.randn(4, 1, 16, 16), None, condition=None)
    assert float(out.abs().max()) <= 1


def test_what_would_clip_or_mirror_latents_is_refused(tmp_path: Path) -> None:
    spec = make_spec(make_first_stage(tmp_path))
    first_stage = load_first_stage(spec, tmp_path / WEIGHTS, "cpu")
    network, schedule = build_network(spec), build_schedule(spec)
    with pytest.raises(UserError, match="dynamic_threshold is for pixels"):
        build_sampler(changed("sample", dynamic_threshold=0.9).sample, spec, network, schedule, first_stage=first_stage)
    with pytest.raises(ValueError, match="needs its first stage"):
        build_sampler(PARAMS.sample, spec, network, schedule)
    pixels = make_model_spec(changed("model", base_channels=8), IMAGES)
    with pytest.raises(ValueError, match="of pixels takes none"):
        build_sampler(PARAMS.sample, pixels, build_network(pixels), schedule, first_stage=first_stage)


@pytest.mark.parametrize(
    ("section", "key", "value", "said"),
    [
        ("train", "horizontal_flip", True, "train.horizontal_flip is true"),
        ("sample", "dynamic_threshold", 0.9, "dynamic_threshold is for pixels"),
        ("model", "context", "inpaint", "which is made of pixels"),
        ("autoencoder", "factor", 3, "autoencoder.factor"),
        ("autoencoder", "channel_multipliers", [1, 2], "the 3 entries that factor 4 needs"),
        ("autoencoder", "fator", 4, "known here: seed, total_images"),
        ("encode", "shards", 4, "known here: shard_images"),
    ],
)
def test_params_that_do_not_fit_latents_are_named(section: str, key: str, value: object, said: str) -> None:
    content = raw_params()
    content[section][key] = value
    with pytest.raises(UserError, match=said) as caught:
        params_from(content, where="params.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("section", ["autoencoder", "encode"])
def test_one_section_of_the_two_is_not_enough(section: str) -> None:
    content = raw_params()
    del content[section]
    with pytest.raises(UserError, match="belong together"):
        params_from(content, where="params.yaml")


def test_a_pipeline_on_pixels_has_neither_section() -> None:
    params = load_params(ROOT / "params.yaml")
    assert params.autoencoder is None
    assert params.encode is None


def test_a_factor_or_an_adversary_that_does_not_fit_the_images_is_named() -> None:
    odd = SimpleNamespace(image_size=30, channels=1)
    with pytest.raises(UserError, match="images of 30 px can't be divided"):
        make_autoencoder_spec(PARAMS.autoencoder, odd)
    with pytest.raises(UserError, match="for images of 48 px at least, but they have 30"):
        build_discriminator(PARAMS.autoencoder.model_copy(update={"discriminator_layers": 4}), odd)
    assert make_autoencoder_spec(PARAMS.autoencoder, IMAGES)["network"]["channel_multipliers"] == [1, 2, 4]


def test_the_first_stage_is_its_seed_alone() -> None:
    spec = make_autoencoder_spec(PARAMS.autoencoder, IMAGES)
    torch.manual_seed(1)
    one = build_autoencoder(spec, seed=3)
    torch.manual_seed(2)
    two, three = build_autoencoder(spec, seed=3), build_autoencoder(spec, seed=4)
    assert torch.equal(one.last_layer, two.last_layer)
    assert not torch.equal(one.last_layer, three.last_layer)


def test_exchanged_or_missing_first_stage_weights_are_refused_in_one_line(tmp_path: Path) -> None:
    first_stage = make_first_stage(tmp_path / "one")
    make_first_stage(tmp_path / "two", seed=1)
    spec = make_spec(first_stage)
    model = tmp_path / "model"
    save_model(model, build_network(spec), spec, {}, files={WEIGHTS_IN_MODEL: tmp_path / "one" / WEIGHTS})
    assert load_model(model).sample(["cat", 1], steps=2).shape == (2, 1, 16, 16)
    (model / WEIGHTS_IN_MODEL).write_bytes((tmp_path / "two" / WEIGHTS).read_bytes())
    with pytest.raises(UserError, match="put the right weights back") as caught:
        load_model(model)
    assert "\n" not in str(caught.value)
    (model / WEIGHTS_IN_MODEL).unlink()
    with pytest.raises(UserError, match=r"first_stage\.safetensors is missing"):
        load_model(model)


def test_a_loaded_latent_model_draws_what_the_stage_would(tmp_path: Path) -> None:
    first_stage = make_first_stage(tmp_path / "one")
    spec = make_spec(first_stage)
    network = build_network(spec)
    torch.nn.init.normal_(network.conv_out.weight, std=0.1)
    save_model(tmp_path / "model", network, spec, {}, files={WEIGHTS_IN_MODEL: tmp_path / "one" / WEIGHTS})
    model = load_model(tmp_path / "model")
    params = changed("sample", sampler="ddim", steps=3).sample
    loaded = load_first_stage(spec, tmp_path / "one" / WEIGHTS, "cpu")
    draw = build_sampler(params, spec, network.eval(), build_schedule(spec), first_stage=loaded)
    assert torch.equal(model.sample(["cat", "dog"], steps=3), draw(torch.arange(2)))
    assert image_form(spec) == (1, 16)
    assert load_first_stage({"network": {}}, tmp_path, "cpu") is None
    assert image_form({"network": {"channels": 3, "image_size": 8}}) == (3, 8)


def test_decoding_undoes_the_scale() -> None:
    network = build_autoencoder(make_autoencoder_spec(PARAMS.autoencoder, IMAGES))
    first_stage = FirstStage(network, 0.25)
    z = torch.randn(2, 4, 4, 4)
    torch.testing.assert_close(first_stage.decode(0.25 * z), network.decode(z))
    images = torch.randint(0, 256, (2, 1, 16, 16), dtype=torch.uint8)
    moments = first_stage.encode(images)
    assert moments.shape == (2, 8, 4, 4)
    assert torch.equal(first_stage.reconstruct(images), FirstStage(network, 3.0).reconstruct(images))
    assert not any(p.requires_grad for p in network.parameters())


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{}")])
def test_damaged_latents_are_named(tmp_path: Path, damage) -> None:
    samples = [Sample(np.zeros((2, 2, 4), np.float32), None)]
    write_shards(tmp_path, samples, image_size=2, channels=4, encoding="moments", classes=(), shard_images=2,
                 notes={NOTE: {"first_stage": {"scale": 1.0}}})  # fmt: skip
    assert load_latents(tmp_path).spec == {"scale": 1.0}
    damage(tmp_path / NOTE)
    with pytest.raises(UserError, match="dvc repro encode"):
        load_latents(tmp_path)


def test_a_missing_first_stage_says_which_stage_makes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dvc repro autoencoder"):
        load_trained(tmp_path)


def test_rows_of_images_and_reconstructions_alternate() -> None:
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1)
    rows = interleave(images, images + 10, columns=2)
    assert rows.ravel().tolist() == [0, 1, 10, 11, 2, 3, 12, 13, 4, 14]


class PixelFeatures:
    """An extractor whose features are the pixels."""

    dim = 16

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().flatten(1)


def test_scores_of_reconstructions_are_over_the_asked_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 200, (30, 4, 4, 1)).astype(np.uint8)
    index = write_shards(tmp_path / "s", [Sample(p) for p in pixels], image_size=4, channels=1, encoding="raw",
                         classes=(), shard_images=10)  # fmt: skip
    ids = np.array([3, 29, 4, 11, 12])
    moments, psnr = score_reconstructions(index, ids, lambda x: x + 10, PixelFeatures(), ALONE, batch_size=2)
    assert psnr == pytest.approx(20 * np.log10(255 / 10))
    assert moments.n == 5
    np.testing.assert_allclose(moments.mean().numpy(), pixels[ids].reshape(5, -1).mean(0) + 10)
    _, exact = score_reconstructions(index, ids, lambda x: x, PixelFeatures(), ALONE, batch_size=2)
    assert exact == pytest.approx(10 * np.log10(255**2 * 12))


def test_reconstruction_scores_of_another_extractor_do_not_stand_beside(tmp_path: Path) -> None:
    path = tmp_path / "encode.json"
    with pytest.raises(UserError, match="no readable scores"):
        load_reconstruction_scores(path, "a")
    scores = {"fd_reconstruction": 1.0, "fd_reconstruction_like_for_like": 2.0, "psnr_reconstruction": 30.0}
    save_json(path, {**scores, "scale": 4.0, "protocol": "a"})
    assert load_reconstruction_scores(path, "a") == scores
    with pytest.raises(UserError, match="measured as `a`"):
        load_reconstruction_scores(path, "b")
