"""A feature network written down for onnxruntime, which is several times as fast as eager torch on a CPU.

The file format is a protobuf of a few fields, and the networks are of a few kinds of layers: writing it takes less code
than asking a package for it, which would have to be installed wherever scores are computed. Made in memory each time,
in a fraction of a second, so that nothing can be stale.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from pipeline.engine.blocks import Branches, Pool, Residual

_IR_VERSION, _OPSET = 8, 17
Attributes = Mapping[str, int | tuple[int, ...]]

_FLOAT = 1  # TensorProto.DataType
_ATTRIBUTE_INT, _ATTRIBUTE_INTS = 2, 7  # AttributeProto.AttributeType


def has_onnxruntime() -> bool:
    """Whether it is installed."""
    return importlib.util.find_spec("onnxruntime") is not None


class OnnxNetwork(nn.Module):
    """The same function as a network of :mod:`pipeline.engine.blocks`, computed by onnxruntime on the CPU.

    It takes as many threads as torch does when it is made.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        import onnxruntime  # an extra, and slow to import

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

    **Source**: onnx.proto of ONNX 1.12, IR version 8, operators of opset 17.

    Raises:
        TypeError: a layer of another kind.
    """
    graph = _Graph()
    last = graph.add(network, "x")
    convolutions = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    channels = _count_channels(network, convolutions[0].in_channels)
    graph.node("Identity", [last], output="features")
    body = b"".join(_message(1, node) for node in graph.nodes) + _text(2, "features")
    body += b"".join(_message(5, tensor) for tensor in graph.tensors)
    body += _message(11, _value("x", ["b", convolutions[0].in_channels, "h", "w"]))
    body += _message(12, _value("features", ["b", channels]))
    return _number(1, _IR_VERSION) + _message(7, body) + _message(8, _text(1, "") + _number(2, _OPSET))


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
        self.nodes: list[bytes] = []
        self.tensors: list[bytes] = []

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
        node = b"".join(_text(1, name) for name in inputs) + _text(2, output) + _text(4, kind)
        for name, value in (attributes or {}).items():
            if isinstance(value, int):
                node += _message(5, _text(1, name) + _number(3, value) + _number(20, _ATTRIBUTE_INT))
            else:
                values = b"".join(_number(8, v) for v in value)
                node += _message(5, _text(1, name) + values + _number(20, _ATTRIBUTE_INTS))
        self.nodes.append(node)
        return output

    def constant(self, value: Tensor) -> str:
        """A float32 tensor; returns its name."""
        name = f"c{len(self.tensors)}"
        content = value.detach().contiguous().numpy().astype("<f4").tobytes()
        dims = b"".join(_number(1, size) for size in value.shape)
        self.tensors.append(dims + _number(2, _FLOAT) + _text(8, name) + _message(9, content))
        return name


def _pair(value: object) -> tuple[int, ...]:
    if isinstance(value, int):
        return value, value
    assert isinstance(value, tuple)
    return value


def _value(name: str, shape: Iterable[int | str]) -> bytes:
    """A ValueInfoProto: float32 of a shape whose free sizes have names."""
    dims = b"".join(_message(1, _number(1, s) if isinstance(s, int) else _text(2, s)) for s in shape)
    return _text(1, name) + _message(2, _message(1, _number(1, _FLOAT) + _message(2, dims)))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: str) -> bytes:
    return _message(field, value.encode())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first; all but the last have the eighth bit set."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
