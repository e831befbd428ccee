"""Contexts: what the network is shown of an image, in training, in sampling and for a user's own images."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_core import p_losses
from pipeline.data.index import ShardIndex
from pipeline.data.pixels import to_uint8, to_unit_range
from pipeline.data.writer import Sample, write_shards
from pipeline.engine.context import (
    Colour,
    Inpaint,
    RealContexts,
    SuperResolution,
    draw_hole,
    to_condition,
    training_context,
)
from pipeline.engine.generate import ImageSampler
from pipeline.errors import UserError
from pipeline.runtime.rng import Stream, draw_permutation, draw_uniform
from tests.pipeline.test_step import BATCH, batch_at, make_step

MAKERS = {"inpaint": Inpaint(), "super_resolution": SuperResolution(2), "colour": Colour()}


def images(count: int, channels: int = 3, size: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, 256, (count, channels, size, size), dtype=torch.uint8, generator=generator)


def uniform(places: torch.Tensor):
    return lambda k: draw_uniform(0, Stream.CONTEXT, places, draw=k)


def shards(folder: Path, count: int = 12, *, classes: tuple[str, ...] = ("a", "b", "c")) -> ShardIndex:
    rows = images(count).permute(0, 2, 3, 1).numpy()
    samples = [Sample(row, i % len(classes) if classes else None) for i, row in enumerate(rows)]
    return write_shards(folder, samples, image_size=8, channels=3, encoding="raw", classes=classes, shard_images=5)


def test_holes_lie_inside_and_are_of_all_sizes_and_places() -> None:
    top, left, height, width = draw_hole(uniform(torch.arange(4000)), 16, 12).unbind(1)
    assert (int(height.min()), int(height.max()), int(width.min()), int(width.max())) == (4, 12, 3, 9)
    assert min(int(top.min()), int(left.min())) == 0
    assert (int((top + height).max()), int((left + width).max())) == (16, 12)
    assert abs(float(np.corrcoef(height, width)[0, 1])) < 0.08
    assert abs(float(np.corrcoef(top, left)[0, 1])) < 0.08


def test_an_inpainting_context_hides_the_hole_and_nothing_else() -> None:
    x0 = to_unit_range(images(20))
    context = Inpaint()(x0, uniform(torch.arange(20)))
    for image, seen, mask, (top, left, height, width) in zip(
        x0, context.channels, context.mask, context.hole.tolist(), strict=True
    ):
        inside = torch.zeros(1, 8, 8, dtype=torch.bool)
        inside[:, top : top + height, left : left + width] = True
        assert torch.equal(mask.bool(), inside)
        assert not seen[:3][inside.expand(3, -1, -1)].any()
        assert torch.equal(seen[:3][~inside.expand(3, -1, -1)], image[~inside.expand(3, -1, -1)])
        assert torch.equal(seen[3:] > 0, inside)
    changed = x0 + context.mask  # what the hole hides has no way into the context
    assert torch.equal(Inpaint()(changed, uniform(torch.arange(20))).channels, context.channels)
    done = to_uint8(context.complete(torch.full_like(x0, 0.3)))
    known = ~context.mask.bool().expand_as(x0)
    assert torch.equal(done[known], images(20)[known])
    assert set(done[~known].tolist()) == {166}


def test_super_resolution_shows_averages_and_a_users_small_image_gives_the_same_context() -> None:
    maker, x0 = SuperResolution(2), to_unit_range(images(5))
    context = maker(x0, uniform(torch.arange(5)))
    means = images(5).float().reshape(5, 3, 4, 2, 4, 2).mean((3, 5))
    small = means.round().to(torch.uint8)
    assert torch.equal(context.channels, maker.from_user(to_unit_range(small), None, (3, 8, 8)).channels)
    flat = to_unit_range(torch.full((1, 3, 8, 8), 77, dtype=torch.uint8))
    torch.testing.assert_close(maker(flat, uniform(torch.arange(1))).channels, flat)
    assert float(context.channels.abs().max()) <= 1
    assert context.complete(x0) is x0


def test_a_grey_context_is_that_of_pillow_and_a_users_grey_image_gives_the_same() -> None:
    x0 = to_unit_range(images(5))
    context = Colour()(x0, uniform(torch.arange(5)))
    grey = np.stack([np.asarray(Image.fromarray(i.permute(1, 2, 0).numpy()).convert("L")) for i in images(5)])
    assert np.array_equal(to_uint8(context.channels)[:, 0], grey)
    again = Colour().from_user(context.channels, None, (3, 8, 8))
    assert torch.equal(again.picture, context.picture)
    assert context.picture.shape == x0.shape


def test_training_and_samples_draw_each_number_of_a_hole_for_itself_and_not_the_same(tmp_path: Path) -> None:
    places, x0 = torch.arange(9), to_unit_range(images(9))
    in_training = training_context(Inpaint(), x0, 0, places).hole
    assert torch.equal(in_training, draw_hole(uniform(places), 8, 8))
    of_samples = RealContexts(Inpaint(), shards(tmp_path / "s"), seed=0)(places).hole
    keyed = [draw_uniform(0, Stream.SAMPLE_CONTEXT, places, draw=k) for k in range(4)]
    assert torch.equal(of_samples, draw_hole(keyed.__getitem__, 8, 8))
    assert not torch.equal(of_samples, in_training)


@pytest.mark.parametrize("name", MAKERS)
def test_a_context_depends_on_its_image_and_place_alone(name: str) -> None:
    maker, x0 = MAKERS[name], to_unit_range(images(6))
    together = training_context(maker, x0, 3, torch.arange(100, 106))
    alone = training_context(maker, x0[2:3], 3, torch.tensor([102]))
    assert torch.equal(together.channels[2:3], alone.channels)
    assert together.channels.shape == (6, maker.num_channels(3), 8, 8)


@pytest.mark.parametrize(
    ("maker", "given", "mask", "message"),
    [
        (Inpaint(), images(2), None, "mask is none"),
        (Inpaint(), images(2), torch.ones(2, 1, 4, 4), r"mask is \(2, 1, 4, 4\), expected \(2, 1, 8, 8\)"),
        (Inpaint(), images(2, size=4), torch.ones(2, 1, 8, 8), "expected images to paint into"),
        (SuperResolution(2), images(2), None, r"expected small images \(n, 3, 4, 4\)"),
        (SuperResolution(2), images(2, size=4), torch.ones(2, 1, 8, 8), "predicts every pixel"),
        (Colour(), images(2), None, r"expected grey images \(n, 1, 8, 8\)"),
        (Colour(), images(2, channels=1), torch.ones(2, 1, 8, 8), "predicts every pixel"),
    ],
)
def test_a_users_images_must_fit(maker, given, mask, message) -> None:
    with pytest.raises(UserError, match=message):
        maker.from_user(to_unit_range(given), mask, (3, 8, 8))


def test_samples_take_each_image_once_then_go_round(tmp_path: Path) -> None:
    index = shards(tmp_path / "s")
    contexts, seeds = RealContexts(Inpaint(), index, seed=4), torch.arange(20)
    order = draw_permutation(4, Stream.SAMPLE_IMAGE, 12)
    assert contexts.ids(seeds).tolist() == [*order.tolist(), *order[:8].tolist()]
    assert torch.equal(contexts.originals(seeds), images(12)[contexts.ids(seeds)])
    assert torch.equal(contexts.labels(seeds), contexts.ids(seeds) % 3)
    assert not torch.equal(contexts.ids(seeds), RealContexts(Inpaint(), index, seed=5).ids(seeds))
    whole, part = contexts(seeds), contexts(seeds[7:9])
    assert torch.equal(whole.channels[7:9], part.channels)
    assert not torch.equal(whole.hole[:12], RealContexts(Inpaint(), index, seed=5)(seeds).hole[:12])


def test_the_notes_name_image_and_hole(tmp_path: Path) -> None:
    index, seeds = shards(tmp_path / "s"), torch.arange(7)
    contexts = RealContexts(Inpaint(), index, seed=0)
    expected = [
        {"image": i, "hole": hole}
        for i, hole in zip(contexts.ids(seeds).tolist(), contexts(seeds).hole.tolist(), strict=True)
    ]
    assert contexts.notes(seeds) == expected
    assert RealContexts(Colour(), index, seed=0).notes(seeds[:1]) == [{"image": expected[0]["image"]}]


def test_a_sampler_shows_the_network_context_and_label_and_composites(tmp_path: Path) -> None:
    told = {}

    def method(x_noisy, noise, condition):
        told.update(condition)
        return torch.zeros_like(x_noisy)

    contexts = RealContexts(Inpaint(), shards(tmp_path / "s"), seed=0)
    sampler = ImageSampler(method, seed=0, classes=(0, 1, 2), shape=(3, 8, 8), contexts=contexts)
    seeds = torch.arange(5)
    out = sampler(seeds)
    assert torch.equal(told["context"], contexts(seeds).channels)
    assert torch.equal(told["label"], contexts.labels(seeds))
    known = ~contexts(seeds).mask.bool().expand_as(out)
    assert torch.equal(out[known], contexts.originals(seeds)[known])
    assert set(out[~known].tolist()) == {128}
    picture = sampler.picture(out.numpy())
    assert picture.shape == (2 * 44 + 12, 4 * (4 * 26 + 12) + 12, 3)
    row = picture[12:44, 12:116][::4, ::4]
    assert np.array_equal(row[:, :8], to_uint8(contexts(seeds).picture)[0].permute(1, 2, 0))
    assert np.array_equal(row[:, 9:17], out[0].permute(1, 2, 0))
    assert np.array_equal(row[:, 18:], contexts.originals(seeds)[0].permute(1, 2, 0))
    unconditional = ImageSampler(method, seed=0, classes=(), shape=(3, 8, 8), contexts=contexts)
    assert unconditional.labels(seeds) is None


def test_labels_alone_stay_a_tensor() -> None:
    labels = torch.tensor([1])
    assert to_condition(labels, None) is labels
    assert to_condition(None, None) is None


@pytest.mark.parametrize("null_label", [None, 3])
def test_training_makes_the_context_of_the_flipped_image_however_the_batch_is_cut(null_label) -> None:
    draws = []
    for micro_batch in (BATCH, 5):
        kept: list = []

        def loss(denoiser, schedule, x0, t, noise, condition, kept=kept):
            kept.append((x0, condition))
            return p_losses(denoiser, schedule, x0, t, noise, None)

        step, _ = make_step(micro_batch=micro_batch, loss=loss, context=Inpaint(), horizontal_flip=True,
                            null_label=null_label, label_dropout=0.5)  # fmt: skip
        batch = batch_at(1)
        batch.labels.fill_(2)
        step(batch)
        draws.append([torch.cat(parts) for parts in zip(*[(x0, c["context"]) for x0, c in kept], strict=True)])
        assert all(set(c) == {"context"} | ({"label"} if null_label else set()) for _, c in kept)
        if null_label:
            assert set(torch.cat([c["label"] for _, c in kept]).tolist()) == {2, 3}
    (x0, context), other = draws
    assert torch.equal(context, other[1])
    assert torch.equal(context, training_context(Inpaint(), x0, 0, batch.positions).channels)
    assert not torch.equal(x0, to_unit_range(batch.images))


def test_a_model_without_a_context_is_trained_as_before() -> None:
    kept: list = []

    def loss(denoiser, schedule, x0, t, noise, condition):
        kept.append(condition)
        return p_losses(denoiser, schedule, x0, t, noise, None)

    partial(make_step, loss=loss)()[0](batch_at(0))
    assert kept == [None]
