"""Restore image files with a trained model, without training for it: `python -m pipeline.restore --help`. No stage.

Denoises, fills in, enlarges, sharpens or colours what is linear in the image, by DDRM (docs/restore.md).
"""

from __future__ import annotations

import argparse
import logging
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ddpm_core import Inpaint, LinearOperator, restore_ddrm
from pipeline.build.operators import build_operator
from pipeline.data.audit import Refused, open_image, to_pixels
from pipeline.data.pixels import make_grid, to_uint8, to_unit_range
from pipeline.errors import UserError
from pipeline.machine import load_machine
from pipeline.models import TrainedModel, load_model
from pipeline.runtime.files import whole_file
from pipeline.runtime.process import run_stage
from pipeline.runtime.rng import Stream, draw_normal
from pipeline.runtime.topology import start_topology

log = logging.getLogger(__name__)
TASKS = ("denoise", "inpaint", "super_resolve", "deblur", "colourise")
SIDE_BY_SIDE = "side_by_side"
MOST_SHOWN = 12
GREY_LEVEL = 1 / 127.5  # in the scale of the model
ROUNDING = 12**-0.5  # deviation of what 8 bits round away, in grey levels


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m pipeline.restore --help")


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line.

    Raises:
        UserError: it can't be understood, or a number is out of range.
    """
    parser = _Parser(prog="python -m pipeline.restore", description=__doc__)
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="image files, as they were observed")
    parser.add_argument("--task", required=True, choices=TASKS)
    parser.add_argument("--out", required=True, type=Path, help=f"folder for NAME.png of each, and {SIDE_BY_SIDE}.png")
    parser.add_argument(
        "--sigma", type=float, default=0.0, help="deviation of the inputs' noise in grey levels, 0..255"
    )
    parser.add_argument("--mask", type=Path, help="inpaint: image of the model's size, white where pixels are missing")
    parser.add_argument("--factor", type=int, help="super_resolve: how many times larger")
    parser.add_argument("--kernel", help="deblur: gaussian:DEVIATION_PX, box:WIDTH_PX, or weights such as 1,2,1")
    parser.add_argument("--model", default="model", help="folder of a trained model (default: model)")
    parser.add_argument("--label", help="class of the images (default: none in particular)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=50, help="network calls (default: 50)")
    parser.add_argument("--eta", type=float, default=0.85, help="share of fresh noise a step, 0..1 (default: 0.85)")
    parser.add_argument("--degrade", action="store_true", help="inputs are whole: degrade them first, then restore")
    args = parser.parse_intermixed_args(arguments)
    for name, low, high in (("sigma", 0, 255), ("eta", 0, 1), ("seed", 0, 2**32 - 1)):
        if not low <= getattr(args, name) <= high:
            raise UserError(f"--{name} is {getattr(args, name)}, expected a number from {low} to {high}")
    if args.task == "denoise" and args.sigma == 0:
        raise UserError("--task denoise needs --sigma, the deviation of the noise in grey levels")
    return args


def main() -> None:
    """Check everything, restore in batches, then write the files."""
    args, machine = parse(sys.argv[1:]), load_machine()
    targets = make_targets(args.inputs, args.out)
    started = time.monotonic()
    with start_topology(machine) as topology:
        model = load_model(args.model, topology.device)
        label = check_model(model, args)
        size = model.spec["network"]["image_size"]
        shape = (model.spec["network"]["channels"], size, size)
        seen = None if args.mask is None else read_mask(args.mask, size)
        operator = build_operator(args.task, shape, seen=seen, factor=args.factor, kernel=args.kernel)
        operator.to(topology.device)
        given = read_inputs(args.inputs, operator.shape if args.degrade else operator.observed_shape, args.degrade)
        results = []
        for places in torch.split(torch.arange(len(given)), machine.sample_batch):
            pixels = torch.from_numpy(given[places.numpy()]).to(topology.device)
            results.append(restore(model, operator, pixels, places.to(topology.device), label, args))
    observed, restored = (np.concatenate(parts) for parts in zip(*results, strict=True))
    for target, image in zip(targets, restored, strict=True):
        save_image(target, make_image(image))
    rows = [given[:MOST_SHOWN]] * args.degrade + [observed[:MOST_SHOWN], restored[:MOST_SHOWN]]
    save_image(args.out / f"{SIDE_BY_SIDE}.png", make_grid(np.concatenate(rows), len(rows[0])))
    if args.degrade:
        log.info("restore: %.1f dB as observed, %.1f dB restored", psnr(given, observed), psnr(given, restored))
    log.info("restore: done, %d images in %.1f s, in %s", len(targets), time.monotonic() - started, args.out)


def make_targets(inputs: Sequence[Path], out: Path) -> list[Path]:
    """Where each result goes.

    Raises:
        UserError: two inputs have one name, or a result would overwrite an input.
    """
    targets = [out / f"{path.stem}.png" for path in inputs]
    taken = {out / f"{SIDE_BY_SIDE}.png": Path("the picture of all")}
    sources = {path.resolve() for path in inputs}
    for path, target in zip(inputs, targets, strict=True):
        if target in taken:
            raise UserError(f"{path} and {taken[target]} would both be written to {target}: rename one")
        if target.resolve() in sources:
            raise UserError(f"{target} is an input, which would be overwritten: use another --out")
        taken[target] = path
    return targets


def check_model(model: TrainedModel, args: argparse.Namespace) -> int | None:
    """The number of the label that is asked for.

    Raises:
        UserError: the model does not know it, is of no use without one, needs more, or has fewer steps.
    """
    if model.spec["network"].get("context_channels"):
        raise UserError(f"{args.model} needs context channels: restoration takes a model of images alone")
    if model.first_stage is not None:
        raise UserError(f"{args.model} is a model of latents, which are not linear in pixels: take one of pixels")
    if not 1 <= args.steps <= model.schedule.num_timesteps:
        raise UserError(f"--steps is {args.steps}, expected 1 to the model's {model.schedule.num_timesteps}")
    if args.label is not None:
        if args.label not in model.classes:
            known = ", ".join(model.classes) or "none: the model is unconditional"
            raise UserError(f"--label {args.label} is unknown; classes of this model: {known}")
        return model.classes.index(args.label)
    if model.classes and model.spec["lineage"].get("train", {}).get("label_dropout") == 0:
        raise UserError(f"{args.model} never saw an image without its class (train.label_dropout is 0): give --label")
    return None


def read_mask(path: Path, size: int) -> Tensor:
    """(size, size) bool: true where pixels are seen.

    Raises:
        UserError: the file is no image of this size, or has no white.
    """
    white = read_pixels(path, (1, size, size), resize=False)[0] >= 128
    if not white.any():
        raise UserError(f"{path}: no pixel is white, so none is missing")
    return torch.from_numpy(~white)


def read_inputs(inputs: Sequence[Path], shape: tuple[int, ...], resize: bool) -> NDArray[np.uint8]:
    """(n, c, h, w) pixels, as :func:`read_pixels` gives them."""
    return np.stack([read_pixels(path, shape, resize=resize) for path in inputs])


def read_pixels(path: Path, shape: tuple[int, ...], *, resize: bool) -> NDArray[np.uint8]:
    """One file through the checks of the shard stage, (c, h, w).

    Raises:
        UserError: it is refused, or of another size and may not be resized: then it was not observed like that.
    """
    channels, height, width = shape
    if not path.is_file():
        raise UserError(f"{path}: no such file; give image files, not folders")
    try:
        image = open_image(path)
    except Refused as refusal:
        raise UserError(f"{path}: {refusal}") from None
    if image.size != (width, height) and not resize:
        raise UserError(
            f"{path}: {image.width} x {image.height} px, but this model and task take {width} x {height} px"
        )
    return to_pixels(image, height, channels).transpose(2, 0, 1)


def restore(
    model: TrainedModel, operator: LinearOperator, pixels: Tensor, places: Tensor, label: int | None,
    args: argparse.Namespace,
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:  # fmt: skip
    """What was observed, as a picture, and what is restored from it; each depends on its own image, seed and place.

    Args:
        model, operator: on one device.
        pixels: (b, c, h, w) uint8 there: as observed, or whole with `args.degrade`.
        places: (b,) of the images among the inputs.
        label: for all, or None.
        args: the command line's sigma, seed, steps, eta, degrade.

    Returns:
        both (b, c, h, w) uint8.
    """
    y, sigma = to_unit_range(pixels), args.sigma
    if args.degrade:
        y = operator(y)
        y += sigma * GREY_LEVEL * draw_normal(args.seed, Stream.DEGRADE, places, operator.observed_shape)
        y = to_unit_range(to_uint8(y))  # as a file holds it
    if isinstance(operator, Inpaint):
        y = operator(y)
    if args.task == "deblur":  # its small singular values would blow up what 8 bits have rounded away
        sigma = max(sigma, ROUNDING)

    def noise(k: int) -> Tensor:
        return draw_normal(args.seed, Stream.RESTORE, places, operator.shape, draw=k)

    x = restore_ddrm(
        model.network, model.schedule, operator, y, noise(0), noise, noise_sigma=sigma * GREY_LEVEL,
        condition=None if label is None else torch.full_like(places, label),
        parameterization=model.spec["parameterization"], num_steps=args.steps, eta=args.eta,
    )  # fmt: skip
    shown = y if y.shape == x.shape else operator.pseudo_inverse(y)
    return to_uint8(shown).cpu().numpy(), to_uint8(x).cpu().numpy()


def make_image(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(c, h, w) -> (h, w) grey or (h, w, 3)."""
    return pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)


def save_image(path: Path, pixels: NDArray[np.uint8]) -> None:
    """Write a PNG whole.

    Raises:
        UserError: the folder can't be written to.
    """
    try:
        with whole_file(path) as aside:
            Image.fromarray(pixels).save(aside, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; choose another --out") from None


def psnr(truth: NDArray[np.uint8], pixels: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio over all images, in dB; infinite for equal ones.

    Example:
        >>> psnr(np.zeros((1, 2), np.uint8), np.full((1, 2), 255, np.uint8))
        0.0
    """
    error = float(np.mean((truth.astype(float) - pixels) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


if __name__ == "__main__":
    run_stage(main)
