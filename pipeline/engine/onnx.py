"""A feature network written down for onnxruntime, which is several times as fast as eager torch on a CPU.

The networks are of a few kinds of layers, so the graph is written layer by layer: tracing them by torch.onnx would take
seconds at each start. Made in memory each time, in a fraction of a second, so that nothing can be stale.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from pipeline.engine.blocks import Branches, Pool, Residual

_IR_VERSION, _OPSET = 8, 17
Attributes = Mapping[str, int | tuple[int, ...]]


class OnnxNetwork(nn.Module):
    """The same function as a network of :mod:`pipeline.engine.blocks`, computed by onnxruntime on the CPU.

    It takes as many threads as torch does when it is made.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(write_onnx(network), options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        if not len(x):
            return x.new_zeros(0, self.session.get_outputs()[0].shape[1])
        return torch.from_numpy(self.session.run(None, {"x": x.contiguous().numpy()})[0])


def write_onnx(network: nn.Module) -> bytes:
    """A network of convolutions, ReLUs, pools, :class:`Residual`, :class:`Branches` and :class:`Pool` as an ONNX model
    `x` (b, 3, h, w) -> `features` (b, d), all float32.

    Raises:
        TypeError: a layer of another kind.
    """
    graph = _Graph()
    last = graph.add(network, "x")
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    channels = _count_channels(network, convolutions[0].in_channels)
    graph.node("Identity", [last], output="features")
    inputs = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["b", convolutions[0].in_channels, "h", "w"])
    outputs = helper.make_tensor_value_info("features", TensorProto.FLOAT, ["b", channels])
    body = helper.make_graph(graph.nodes, "features", [inputs], [outputs], graph.tensors)
    opsets = [helper.make_opsetid("", _OPSET)]
    model: bytes = helper.make_model(body, opset_imports=opsets, ir_version=_IR_VERSION).SerializeToString()
    return model


def _count_channels(layer: nn.Module, channels: int) -> int:
    """Channels behind a layer that is given so many."""
    if isinstance(layer, nn.Conv2d):
        return layer.out_channels
    if isinstance(layer, Branches):
        return sum(_count_channels(branch, channels) for branch in layer.branches)
    if isinstance(layer, nn.Sequential):
        for child in layer:
            channels = _count_channels(child, channels)
    return channels


class _Graph:
    """Nodes and constants in the order of their use; every value has a name of its own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.tensors: list[onnx.TensorProto] = []

    def add(self, layer: nn.Module, x: str) -> str:
        """Write a layer down; returns its output's name."""
        match layer:
            case nn.Sequential():
                for child in layer:
                    x = self.add(child, x)
                return x
            case Residual():
                return self.node("Add", [self.add(layer.body, x), x])
            case Branches():
                return self.node("Concat", [self.add(branch, x) for branch in layer.branches], {"axis": 1})
            case nn.Conv2d():
                assert layer.bias is not None
                return self.convolution(layer, layer.weight, layer.bias, x)
            case nn.ReLU6():
                return self.node("Clip", [x, self.constant(torch.tensor(0.0)), self.constant(torch.tensor(6.0))])
            case nn.ReLU():
                return self.node("Relu", [x])
            case nn.MaxPool2d() | nn.AvgPool2d():
                kind = "MaxPool" if isinstance(layer, nn.MaxPool2d) else "AveragePool"  # padding is not counted
                return self.window(kind, layer, x)
            case Pool():
                return self.node("Flatten", [self.node("GlobalAveragePool", [x])], {"axis": 1})
        raise TypeError(f"{type(layer).__name__} can't be written as ONNX here")

    def convolution(self, layer: nn.Conv2d, weight: Tensor, bias: Tensor, x: str) -> str:
        """A kernel whose first row and column are zeros, which torch needs for padding behind only, is written without
        them: ONNX pads each side as it is told."""
        pads = _pair(layer.padding) * 2
        if (
            min(layer.weight.shape[2:]) > 1
            and min(pads) > 0
            and not bool(weight[:, :, 0].any() or weight[:, :, :, 0].any())
        ):
            weight, pads = weight[:, :, 1:, 1:], (pads[0] - 1, pads[1] - 1, pads[2], pads[3])
        kernel = (weight.shape[2], weight.shape[3])
        attributes: Attributes = {"kernel_shape": kernel, "strides": _pair(layer.stride), "pads": pads}
        inputs = [x, self.constant(weight), self.constant(bias)]
        return self.node("Conv", inputs, {**attributes, "group": layer.groups})

    def window(self, kind: str, layer: nn.MaxPool2d | nn.AvgPool2d, x: str) -> str:
        """A pool that slides over the image."""
        kernel, strides, pads = (_pair(value) for value in (layer.kernel_size, layer.stride, layer.padding))
        return self.node(kind, [x], {"kernel_shape": kernel, "strides": strides, "pads": pads * 2})

    def node(self, kind: str, inputs: list[str], attributes: Attributes | None = None, output: str = "") -> str:
        """One operator; returns its output's name."""
        output = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [output], **dict[str, Any](attributes or {})))
        return output

    def constant(self, value: Tensor) -> str:
        """A float32 tensor; returns its name."""
        name = f"c{len(self.tensors)}"
        self.tensors.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name


def _pair(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        return value, value
    assert isinstance(value, tuple)
    return value
