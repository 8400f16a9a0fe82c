"""Dynamo's graph, read: calls with their arguments by name, and what must not be moved across."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from ..ops.activations import ACTIVATIONS, GATES, GELU_OF, SLOPE
from ..ops.arguments import to_pair
from ..ops.autograd import PLAIN

_CONV2D = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_CONV2D_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_CONV_TRANSPOSE = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_WRITES_IN_PLACE = {
    operator.iadd, operator.isub, operator.imul, operator.itruediv, operator.ifloordiv, operator.ipow, operator.imod,
    operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift, operator.imatmul, operator.iconcat,
    operator.setitem, operator.delitem,
}  # fmt: skip
_OUR_TRANSPOSE = torch.ops.dwconv_ext.depthwise_conv_transpose2d.default
OURS = (torch.ops.dwconv_ext.depthwise_conv2d.default, _OUR_TRANSPOSE)
_READ_ONLY = {"torch", "torch.nn.functional", "torch._C._nn", "_operator", "builtins", "math"}


def value_of(node: Any) -> Any:
    """What Dynamo saw there: a fake tensor, a number; the argument itself where it is no node."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def tensor_of(node: Any) -> Tensor | None:
    value = value_of(node)
    return value if isinstance(value, Tensor) else None


def number_of(value: Any) -> Any:
    """A Python number. A float that Dynamo left open, as dynamic=True leaves an eps, is fixed, with a guard; an int is not, which
    may follow from a picture's size."""
    value = value_of(value)
    return float(value) if isinstance(value, torch.SymFloat) else value


def is_plain(node: Any) -> bool:
    """Whether what Dynamo saw there is an ordinary dense tensor, or nothing."""
    value = value_of(node)
    return value is None or (type(value) in (FakeTensor, *PLAIN) and value.layout is torch.strided)


def calls(node: Any, name: str) -> bool:
    """Whether it is a method, a function of torch or an ATen operation of this name."""
    if not isinstance(node, fx.Node):
        return False
    if node.op == "call_method":
        return node.target == name
    packet = node.target.overloadpacket if isinstance(node.target, torch._ops.OpOverload) else node.target
    return node.op == "call_function" and packet in (getattr(torch, name, None), getattr(torch.ops.aten, name))


def convolution(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a 2-D convolution by name; None too where its numbers are none, as Dynamo has numpy's."""
    if node.op == "call_function" and node.target in (torch.conv_transpose2d, _OUR_TRANSPOSE):
        return _transposed(node)
    if node.op != "call_function" or node.target not in (torch.conv2d, F.conv2d, torch.ops.dwconv_ext.depthwise_conv2d.default):
        return None
    arguments = {**_CONV2D_DEFAULTS, **dict(zip(_CONV2D, node.args, strict=False)), **node.kwargs}
    if node.target is torch.ops.dwconv_ext.depthwise_conv2d.default:  # of a DepthwiseConv2d
        if len(node.args) > 6 and node.args[6] != "identity":
            return None
        arguments["groups"] = int(tensor_of(node.args[0]).shape[1])  # an open number is fixed: the weight has it
    return _with_numbers(arguments, ("stride", "padding", "dilation", "groups"))


def convolution_1d(node: fx.Node) -> dict[str, Any] | None:
    """The same of a 1-D one."""
    if node.op == "call_function" and node.target is torch.conv_transpose1d:
        return _transposed(node)
    if node.op != "call_function" or node.target is not torch.conv1d:
        return None
    arguments = {**_CONV2D_DEFAULTS, **dict(zip(_CONV2D, node.args, strict=False)), **node.kwargs}
    return _with_numbers(arguments, ("stride", "padding", "dilation", "groups"))


def _with_numbers(arguments: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any] | None:
    """With Python's numbers in the place of a compiler's; None where they are none."""
    for name in names:
        value = arguments[name]
        value = tuple(map(number_of, value)) if isinstance(value, (tuple, list)) else number_of(value)
        if not all(type(v) in (int, str) for v in (value if isinstance(value, tuple) else (value,))):
            return None
        arguments[name] = value
    return arguments


def _transposed(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a depthwise transposed convolution, which alone has an output_padding."""
    ours, names = node.target is _OUR_TRANSPOSE, list(_CONV_TRANSPOSE)
    if ours:
        names.remove("groups")
        if len(node.args) > 7 and node.args[7] != "identity":
            return None
    arguments = {**_CONV2D_DEFAULTS, "output_padding": 0, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    input, weight = tensor_of(arguments["input"]), tensor_of(arguments["weight"])
    if input is None or weight is None or input.dim() != weight.dim():  # without N
        return None
    arguments["groups"] = weight.shape[0] if ours else arguments["groups"]
    found = _with_numbers(arguments, ("stride", "padding", "output_padding", "dilation", "groups"))
    return found if found is not None and found["groups"] == weight.shape[0] > 1 else None


def linear(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a linear layer by name."""
    if node.op != "call_function" or node.target is not F.linear:
        return None
    return {"bias": None, **dict(zip(("input", "weight", "bias"), node.args, strict=False)), **node.kwargs}


_BATCH_NORM = inspect.signature(F.batch_norm)


def batch_norm(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a BatchNorm by name."""
    if node.op != "call_function" or node.target is not F.batch_norm:
        return None
    bound = _BATCH_NORM.bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def _bound(node: fx.Node) -> dict[str, Any]:
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):  # a builtin has no signature
        return dict(node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def layer_norm(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a LayerNorm by name."""
    return _bound(node) if node.op == "call_function" and node.target is F.layer_norm else None


def activation(node: fx.Node) -> tuple[str, float] | None:
    """The op's name and slope of an activation of node.args[0]; "identity" of what does nothing in eval mode."""
    if node.op == "call_method":
        return ("relu", SLOPE) if node.target in ("relu", "relu_") else None
    if node.op != "call_function" or not node.args:
        return None
    if node.target in (torch.relu, torch.relu_):
        return "relu", SLOPE
    if getattr(node.target, "__module__", None) not in ("torch.nn.functional", "torch._C._nn"):
        return None
    name, slope, arguments = node.target.__name__, SLOPE, _bound(node)
    if name == "gelu":
        name = GELU_OF.get(arguments.get("approximate", "none"))
    elif name == "leaky_relu":
        slope = float(number_of(arguments.get("negative_slope", node.args[1] if len(node.args) > 1 else SLOPE)))
    elif name == "hardtanh":
        low, high = (number_of(arguments.get(n, d)) for n, d in (("min_val", -1.0), ("max_val", 1.0)))
        name = "relu6" if (low, high) == (0, 6) else None
    elif name.startswith(("dropout", "feature_dropout")) and arguments.get("training") is False:
        name = "identity"
    return (name, slope) if name in ACTIVATIONS else None


def mean_of_pixels(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """What the node is the mean over height and width of, and whether both are kept as 1."""
    arguments, value = {**dict(enumerate(node.args)), **node.kwargs}, tensor_of(node)
    input = arguments.get(0)
    if value is None or tensor_of(input) is None or tensor_of(input).dim() != 4:
        return None
    if node.op == "call_function" and node.target is F.adaptive_avg_pool2d:
        return (input, True) if arguments.get(1, arguments.get("output_size")) in (1, (1, 1), [1, 1]) else None
    mean = (node.op == "call_method" and node.target == "mean") or (node.op == "call_function" and node.target is torch.mean)
    if not mean or "dtype" in arguments or not isinstance(arguments.get(1, arguments.get("dim")), (tuple, list)):
        return None
    dims = sorted(d % 4 for d in arguments.get(1, arguments.get("dim")))
    return (input, value.dim() == 4) if dims == [2, 3] else None


def max_pool(node: fx.Node) -> tuple[fx.Node, tuple[tuple[int, int], ...]] | None:
    """The input of a max pooling, and its kernel size, stride, padding and dilation; None where it rounds up or wants indices."""
    if node.op != "call_function" or node.target is not F.max_pool2d:
        return None
    names = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
    how = {"stride": None, "padding": 0, "dilation": 1, **dict(zip(names, node.args, strict=False)), **node.kwargs}
    if how.get("ceil_mode") or how.get("return_indices") or tensor_of(how["input"]) is None or tensor_of(how["input"]).dim() != 4:
        return None
    how["stride"] = how["stride"] or how["kernel_size"]
    window = tuple(to_pair("max_pool2d", name, how[name]) for name in ("kernel_size", "stride", "padding", "dilation"))
    return (how["input"], window) if all(type(v) is int for pair in window for v in pair) else None


def flattened(node: fx.Node) -> fx.Node | None:
    """The (N, C, 1, 1) that the node makes (N, C)."""
    method = node.op == "call_method" and node.target == "flatten"
    if not method and not (node.op == "call_function" and node.target is torch.flatten):
        return None
    arguments = {**dict(enumerate(node.args)), **node.kwargs}
    dims = arguments.get(1, arguments.get("start_dim", 0)), arguments.get(2, arguments.get("end_dim", -1))
    value = tensor_of(arguments.get(0))
    whole = value is not None and value.dim() == 4 and value.shape[2:] == (1, 1)
    return arguments[0] if whole and dims in ((1, -1), (1, 3)) else None


def is_telemetry(node: fx.Node) -> bool:
    """torchvision's count of who uses what, in the middle of a network."""
    return node.op == "call_function" and node.target is torch._C._log_api_usage_once and not node.users


def unchanged(node: fx.Node) -> fx.Node | None:
    """The node whose very value this one has: a dropout in eval mode."""
    if node.op != "call_function" or not getattr(node.target, "__name__", "").startswith(("dropout", "feature_dropout")):
        return None
    same = activation(node) == ("identity", SLOPE) and isinstance(node.args[0], fx.Node)
    return node.args[0] if same else None


_GATES = {F.sigmoid: "sigmoid", "sigmoid": "sigmoid", **{function: name for name, function in GATES.items()}}


def gate(node: fx.Node) -> str | None:
    """The name of a gate's function of node.args[0]."""
    return _GATES.get(node.target) if node.op in ("call_function", "call_method") and node.args else None


def factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two tensors whose product the node is."""
    times = node.op == "call_function" and node.target in (operator.mul, torch.mul)
    times = times or (node.op == "call_method" and node.target == "mul")
    whole = times and not node.kwargs and len(node.args) == 2 and all(tensor_of(a) is not None for a in node.args)
    return tuple(node.args) if whole else None


def product(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """A tensor (N, C, H, W) and its factor (N, C, 1, 1), of one dtype, where the node is their product."""
    both = factors(node)
    if both is None:
        return None
    for input, factor in (both, both[::-1]):
        a, b = tensor_of(input), tensor_of(factor)
        if a.dim() == b.dim() == 4 and a.dtype is b.dtype and b.shape[2:] == (1, 1) and a.shape[:2] == b.shape[:2]:
            return (input, factor) if a.shape[2:] != (1, 1) else None
    return None


def addition(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of a plain sum of tensors; the first is where the result goes where that is written in place."""
    plus = node.op == "call_function" and node.target in (operator.add, torch.add, operator.iadd)
    plus = plus or (node.op == "call_method" and node.target in ("add", "add_"))
    if not plus or node.kwargs or len(node.args) != 2 or not all(tensor_of(a) is not None for a in node.args):
        return None
    return tuple(node.args)


def adds_in_place(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


def changes_mode(node: fx.Node) -> bool:
    """Whether what follows may run under another grad or autocast mode, or in a graph of its own."""
    name = getattr(node.target, "__name__", "")
    if node.op == "call_module":
        return True
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return True
    return name in ("_set_grad_enabled", "_enter_autocast", "_exit_autocast") or name.startswith(("_enter_", "_exit_"))


def may_write(node: fx.Node) -> bool:
    """Whether it may change a tensor that was there before. What is not known not to, may."""
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace"):
        return True
    if node.op == "call_method":
        return node.target.endswith("_") or node.target in ("__setitem__", "set_", "resize_")
    if node.op != "call_function" or node.target in _WRITES_IN_PLACE:
        return True
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    name, module = getattr(node.target, "__name__", "_"), getattr(node.target, "__module__", None)
    if module is None and getattr(torch, name, None) is node.target:
        module = "torch"
    if module not in _READ_ONLY or name.endswith("_"):
        return True
    arguments = _bound(node)
    return bool(arguments.get("inplace")) or (node.target is F.batch_norm and arguments["training"] is not False)
