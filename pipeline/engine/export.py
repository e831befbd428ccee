"""A trained denoiser as a file that other programs run: torch.export and ONNX, each compared with the original."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.errors import UserError
from pipeline.runtime.files import whole_file

TOLERANCE = 1e-4  # of the largest output: other kernels add in another order
_PROBE = 3  # images the trace is made with; not 1, which would be taken for a constant

Inputs = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, Tensor]


def make_inputs(spec: Mapping[str, Any], num_timesteps: int, batch_size: int) -> Inputs:
    """x_t, t and, for a model with classes, labels: drawn from a fixed seed.

    Raises:
        UserError: the model takes more than labels.
    """
    network = spec["network"]
    if network.get("context_channels"):
        raise UserError("model.json: the network takes a context beside x_t; export knows labels only")
    generator = torch.Generator().manual_seed(0)
    shape = (batch_size, network["channels"], network["image_size"], network["image_size"])
    x_t = torch.randn(shape, generator=generator)
    t = torch.randint(num_timesteps, (batch_size,), generator=generator)
    if not spec["classes"]:
        return x_t, t
    return x_t, t, torch.randint(len(spec["classes"]) + 1, (batch_size,), generator=generator)


def export_torch(network: nn.Module, inputs: Inputs, path: Path) -> Callable[..., Tensor]:
    """Write a `.pt2` that `torch.export.load(path).module()` gives back without this project's code.

    Args:
        network: in evaluation mode, on the CPU.
        inputs: an example; the number of images stays free.

    Returns:
        what the written file computes.
    """
    program = _trace(network, inputs)
    with whole_file(path) as aside:
        torch.export.save(program, aside.with_suffix(".pt2"))  # it insists on the suffix
        aside.with_suffix(".pt2").replace(aside)
    return torch.export.load(path).module()


def export_onnx(network: nn.Module, inputs: Inputs, path: Path) -> Callable[..., Tensor]:
    """Write a `.onnx` with inputs x_t, t (and labels) and the output `output`; arguments as in `export_torch`.

    Raises:
        UserError: the packages for it are missing.
    """
    try:
        import onnxruntime
        import onnxscript  # noqa: F401 (torch.onnx needs it and says so only late)
    except ImportError as error:
        raise UserError(f"{error.name} is missing: pip install -c constraints.txt -e '.[export]'") from None
    names = ["x_t", "t", "labels"][: len(inputs)]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns that torchvision is not there
    traced = _trace(network, inputs)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"`isinstance\(treespec, LeafSpec\)`")  # torch 2.13's own
        program = torch.onnx.export(
            traced, inputs, dynamo=True, input_names=names, output_names=["output"], verbose=False
        )
    assert program is not None
    with whole_file(path) as aside:
        program.save(aside, include_initializers=True)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(*arguments: Tensor) -> Tensor:
        feed = {name: argument.numpy() for name, argument in zip(names, arguments, strict=True)}
        return torch.from_numpy(session.run(None, feed)[0])

    return run


def _trace(network: nn.Module, inputs: Inputs) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    shapes = tuple({0: batch} for _ in inputs)
    # strict: einops' cache of shapes would turn the number of images into a constant
    return torch.export.export(network, inputs, dynamic_shapes=shapes, strict=True)


@torch.no_grad()
def worst_difference(network: nn.Module, exported: Callable[..., Tensor], inputs: Inputs) -> float:
    """The largest difference between both outputs, relative to the largest output."""
    expected = network(*inputs)
    return float((exported(*inputs) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))


FORMATS: dict[str, tuple[str, Callable[[nn.Module, Inputs, Path], Callable[..., Tensor]]]] = {
    "torch": ("denoiser.pt2", export_torch),
    "onnx": ("denoiser.onnx", export_onnx),
}


def export_denoiser(
    network: nn.Module, spec: Mapping[str, Any], num_timesteps: int, name: str, folder: Path
) -> tuple[Path, float]:
    """One of :data:`FORMATS`, written and then compared with the network on another number of images than it was made
    with.

    Returns:
        the file and the worst relative difference.

    Raises:
        UserError: they differ by more than :data:`TOLERANCE`; the file is removed.
    """
    file, export = FORMATS[name]
    path = folder / file
    exported = export(network, make_inputs(spec, num_timesteps, _PROBE), path)
    difference = worst_difference(network, exported, make_inputs(spec, num_timesteps, 2 * _PROBE + 1))
    if difference > TOLERANCE:
        path.unlink()
        raise UserError(f"{name}: the exported denoiser differs by {difference:.1e} from the trained one; not kept")
    return path, difference
