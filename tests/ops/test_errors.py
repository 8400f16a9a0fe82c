"""Every wrong argument raises, by name, before a kernel runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

import dwconv_ext
from dwconv_ext import DepthwiseConv2d, FusedDSConv, depthwise_conv2d, separable_conv2d

ops = torch.ops.dwconv_ext
X, W, B = torch.randn(2, 4, 8, 8), torch.randn(8, 1, 3, 3), torch.randn(8)
PAIR = (1, 1)

WRONG = {
    "input_rank": ((X[0, 0], W), {}, "input must be 3-dimensional .* or 4-dimensional"),
    "input_rank_5": ((X[None], W), {}, "input must be 3-dimensional .* or 4-dimensional"),
    "input_no_channels": ((X[:, :0], W), {}, "input must have at least one channel"),
    "input_not_a_tensor": ((3, W), {}, "input must be a Tensor, but got int"),
    "input_integer": ((X.int(), W.int()), {}, "input must be float32, float64, bfloat16 or float16"),
    "input_complex": ((X.cfloat(), W.cfloat()), {}, "input must be float32, float64, bfloat16 or float16"),
    "input_bool": ((X > 0, W > 0), {}, "input must be float32, float64, bfloat16 or float16"),
    "weight_rank": ((X, W[0]), {}, "weight must be 4-dimensional"),
    "weight_rank_same": ((X, W[0]), {"padding": "same"}, "weight must be 4-dimensional"),
    "weight_channels": ((X, W[:6]), {}, "input must have the 6 channels of weight, or a divisor of them, but got shape"),
    "weight_not_depthwise": ((X, torch.randn(8, 2, 3, 3)), {}, r"weight must have shape \(C \* multiplier, 1, kH, kW\)"),
    "weight_none": ((X, W[:0]), {}, "weight must have shape"),
    "weight_empty_filter": ((X, W[:, :, :0]), {}, "weight must have a non-empty filter"),
    "weight_dtype": ((X, W.double()), {}, "weight's dtype .* should be the same, but got torch.float64 and torch.float32"),
    "weight_device": ((X, W.to("meta")), {}, "weight must be on the others' device, cpu, but got meta"),
    "bias_device": ((X, W, B.to("meta")), {}, "bias must be on the others' device"),
    "weight_not_a_tensor": ((X, None), {}, "weight must be a Tensor"),
    "bias_size": ((X, W, B[:4]), {}, "bias must be 1-dimensional with 8 elements"),
    "bias_rank": ((X, W, B[None]), {}, "bias must be 1-dimensional with 8 elements"),
    "bias_dtype": ((X, W, B.double()), {}, "bias's dtype and the others' should be the same"),
    "bias_not_a_tensor": ((X, W, 1.0), {}, "bias must be a Tensor"),
    "stride_zero": ((X, W), {"stride": 0}, r"stride should be greater than zero, but got \(0, 0\)"),
    "stride_negative": ((X, W), {"stride": (1, -2)}, "stride should be greater than zero"),
    "stride_three": ((X, W), {"stride": (1, 1, 1)}, "stride must be an int or a pair"),
    "stride_float": ((X, W), {"stride": 1.5}, "stride must be an int or a pair"),
    "stride_string": ((X, W), {"stride": "2"}, "stride must be an int or a pair"),
    "padding_overflows": ((X, W), {"padding": 2**62}, f"Given padding={2**62} at dimension 0, expected padding to be at most"),
    "padding_overflows_with_the_size": (
        (X, W), {"padding": (0, 2**62 - 2), "stride": 2**62}, f"at dimension 1, expected padding to be at most {2**62 - 5}",
    ),
    "dilation_overflows": ((X, W), {"dilation": 2**62}, "filter is larger than the padded input along height.*more than 2"),
    "output_too_large": ((X, W), {"padding": 2**40}, r"the output's shape \[2, 8, 2199023255558, .* is too large.*padding is"),
    "padding_negative": ((X, W), {"padding": -1}, "padding must be non-negative"),
    "padding_word": ((X, W), {"padding": "full"}, "padding must be 'same', 'valid', an int, a pair or four"),
    "padding_same_strided": ((X, W), {"padding": "same", "stride": 2}, "padding='same' is not supported for strided"),
    "padding_float": ((X, W), {"padding": 0.5}, "padding must be 'same', 'valid', an int, a pair or four ints, but got 0.5"),
    "padding_three": ((X, W), {"padding": (1, 2, 3)}, "padding must be 'same', .*four ints, but got .1, 2, 3."),
    "padding_four_floats": ((X, W), {"padding": (1, 2, 3, 0.5)}, "padding must be 'same', .*four ints, but got .1, 2, 3, 0.5."),
    "padding_four_negative": ((X, W), {"padding": (1, 0, 0, -1)}, r"padding must be non-negative, but got \(1, 0, 0, -1\)"),
    "padding_four_overflows": ((X, W), {"padding": (0, 2**62, 0, 0)}, f"Given padding={2**62} at dimension 0, expected padding"),
    "padding_none": ((X, W), {"padding": None}, "padding must be 'same', 'valid', an int, a pair or four ints, but got None"),
    "padding_beyond_64_bits": ((X, W), {"padding": 2**70}, f"padding must fit 64 bits, but got {2**70}"),
    "dilation_beyond_64_bits": ((X, W), {"dilation": (1, -(2**70))}, "dilation must fit 64 bits, but got"),
    "dilation_zero": ((X, W), {"dilation": 0}, "dilation should be greater than zero"),
    "dilation_bool": ((X, W), {"dilation": True}, "dilation must be an int or a pair"),
    "filter_too_large": ((X[:, :, :2], W), {}, "filter is larger than the padded input along height"),
    "filter_too_wide": ((X[..., :2], W), {"padding": (1, 0)}, "filter is larger than the padded input along width"),
    "dilated_filter_too_large": ((X, W), {"dilation": 4}, "filter is larger than the padded input along height"),
    "empty_image": ((X[:, :, :0], W), {"padding": 2}, "input must have a non-empty height and width"),
    "act": ((X, W), {"act": "swish"}, "act must be one of identity, relu.*got 'swish'"),
    "act_list": ((X, W), {"act": ["relu"]}, r"act must be one of identity, relu.*got \['relu'\]"),
    "slope": ((X, W), {"slope": "a"}, "slope must be a number, but got 'a'"),
    "empty_row": ((X[..., :0], W), {"padding": 2}, "input must have a non-empty height and width"),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_depthwise(wrong):
    args, kwargs, message = WRONG[wrong]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^depthwise_conv2d: .*{message}"):
        depthwise_conv2d(*args, **kwargs)


@pytest.mark.parametrize("wrong", WRONG)
def test_depthwise_without_data(wrong):
    """The same through the fake kernels (test_checks.py: of every op)."""
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        test_depthwise(wrong)


GRAD = torch.randn(2, 8, 6, 6)
WRONG_BACKWARD = {
    "grad_shape": ((GRAD[:, :4], X, W, PAIR, (0, 0), PAIR, [True] * 3), "grad_output must have the output's shape"),
    "grad_rank": ((GRAD[0], X, W, PAIR, (0, 0), PAIR, [True] * 3), "grad_output must have the output's shape"),
    "grad_dtype": (
        (GRAD.double(), X, W, PAIR, (0, 0), PAIR, [True] * 3),
        "grad_output's dtype and the others' should be the same",
    ),
    "mask": ((GRAD, X, W, PAIR, (0, 0), PAIR, [True] * 2), "output_mask must have 3|bool"),
    "stride_rank": ((GRAD, X, W, (1, 1, 1), (0, 0), PAIR, [True] * 3), "stride must be a pair"),
    "padding": ((GRAD, X, W, PAIR, (-1, 0), PAIR, [True] * 3), "padding must be non-negative"),
}


@pytest.mark.parametrize("wrong", WRONG_BACKWARD)
def test_backward_op(wrong):
    args, message = WRONG_BACKWARD[wrong]
    with pytest.raises(RuntimeError, match=message):
        ops.depthwise_conv2d_backward(*args)


DW, PW = torch.randn(4, 1, 3, 3), torch.randn(6, 4, 1, 1)
WRONG_SEPARABLE = {
    "multiplier": ((X, W, None, PW, None), {}, "dw_weight must have one filter per channel of input"),
    "pw_shape": ((X, DW, None, PW[:, :3], None), {}, r"pw_weight must have shape \(out_channels, 4, 1, 1\)"),
    "pw_not_pointwise": ((X, DW, None, torch.randn(6, 4, 3, 3), None), {}, r"pw_weight must have shape"),
    "pw_dtype": ((X, DW, None, PW.half(), None), {}, "pw_weight's dtype and the others' should be the same"),
    "dw_bias": ((X, DW, B, PW, None), {}, "dw_bias must be 1-dimensional with 4 elements"),
    "pw_bias": ((X, DW, None, PW, B), {}, "pw_bias must be 1-dimensional with 6 elements"),
    "activation": ((X, DW, None, PW, None), {"pw_act": "swish"}, "pw_act must be one of identity, relu.*got 'swish'"),
    "dw_activation": ((X, DW, None, PW, None), {"dw_act": ""}, "dw_act must be one of"),
    "activation_none": ((X, DW, None, PW, None), {"dw_act": None}, "dw_act must be one of .*got None"),
    "activation_module": ((X, DW, None, PW, None), {"pw_act": torch.nn.ReLU()}, r"pw_act must be one of .*got ReLU\(\)"),
    "slope": ((X, DW, None, PW, None), {"pw_slope": None}, "pw_slope must be a number, but got None"),
    "padding_beyond_64_bits": ((X, DW, None, PW, None), {"padding": 2**70}, "padding must fit 64 bits"),
    "dw_rank_same": ((X, DW[0], None, PW, None), {"padding": "same"}, "dw_weight must be 4-dimensional"),
    "residual_shape": ((X, DW, None, PW, None), {"residual": X}, r"residual must have the output's shape \[2, 6, 6, 6\]"),
    "residual_width": ((X, DW, None, PW, None), {"residual": torch.randn(2, 6, 6, 5)}, r"residual must have the output's shape"),
    "residual_dtype": (
        (X, DW, None, PW, None),
        {"residual": torch.randn(2, 6, 6, 6).half()},
        "residual's dtype and the others' should be the same",
    ),
    "residual_type": ((X, DW, None, PW, None), {"residual": 1}, "residual must be a Tensor"),
    "residual_rank": (
        (X[0], DW, None, PW, None),
        {"residual": torch.randn(1, 6, 6, 6)},
        r"residual must be 3-dimensional \(out_channels, outH, outW\), as input is, but got shape \[1, 6, 6, 6\]",
    ),
    "filter": ((X[..., :2], DW, None, PW, None), {}, "filter is larger than the padded input along width"),
    "rank": ((X[0, 0], DW, None, PW, None), {}, "input must be"),
}


@pytest.mark.parametrize("wrong", WRONG_SEPARABLE)
def test_separable(wrong):
    args, kwargs, message = WRONG_SEPARABLE[wrong]
    with pytest.raises((RuntimeError, TypeError, ValueError), match=f"^separable_conv2d: .*{message}"):
        separable_conv2d(*args, **kwargs)


@pytest.mark.parametrize("op, name", [("separable_conv2d", "dw_act"), ("separable_conv2d", "pw_act"), ("batch_norm_act", "act")])
def test_unknown_activations_in_forward_mode(op, name):
    """Where the op is taken apart, and no kernel looks at its arguments."""
    activations = {"dw_act": "relu", "pw_act": "relu", "act": "relu", name: "swish"}

    def call(x):
        if op == "batch_norm_act":
            return ops.batch_norm_act(x, None, None, 1e-5, activations["act"])[0]
        return ops.separable_conv2d(x, DW, None, PW, None, PAIR, PAIR, PAIR, activations["dw_act"], activations["pw_act"])

    with pytest.raises(RuntimeError, match=f"{op}: {name} must be one of .* but got 'swish'"):
        torch.func.jvp(call, (X,), (X,))


ISA = dwconv_ext._C.selected_isa()
PACKED = torch.ops.dwconv_ext.separable_conv2d_pack(DW, None, PW, None, ISA)
BLOCK = [6, 3, 3, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]
MADE = r"packed must be what separable_conv2d_pack made on this device of weights for {} channels of input"
WRONG_PACKED = {
    "rank": ((X[0], PACKED, BLOCK, [0.0, 0.0]), "input must be 4-dimensional"),
    "dtype": ((X.bfloat16(), PACKED, BLOCK, [0.0, 0.0]), MADE.format(4)),
    "channels": ((X[:, 1:], PACKED, BLOCK, [0.0, 0.0]), MADE.format(3)),
    "outputs": ((X, PACKED, [7, *BLOCK[1:]], [0.0, 0.0]), MADE.format(4)),
    "filter": ((X, PACKED, [6, 3, 5, *BLOCK[3:]], [0.0, 0.0]), MADE.format(4)),
    "huge": ((X, PACKED, [2**62, 2**62, 2**62, *BLOCK[3:]], [0.0, 0.0]), MADE.format(4)),
    "not_packed": ((X, torch.zeros(len(PACKED), dtype=torch.uint8), BLOCK, [0.0, 0.0]), MADE.format(4)),
    "cut": ((X, PACKED[:-1], BLOCK, [0.0, 0.0]), MADE.format(4)),
    "no_bytes": ((X, PACKED[:8], BLOCK, [0.0, 0.0]), MADE.format(4)),
    "floats": ((X, torch.zeros(2000), BLOCK, [0.0, 0.0]), MADE.format(4)),
    "activation": ((X, PACKED, [*BLOCK[:12], 8], [0.0, 0.0]), "block must be 13 integers that end in two activations"),
    "short": ((X, PACKED, BLOCK[:12], [0.0, 0.0]), "block must be 13 integers"),
    "slopes": ((X, PACKED, BLOCK, [0.0]), "block must be 13 integers.*slopes two numbers"),
    "stride": ((X, PACKED, [*BLOCK[:3], 0, *BLOCK[4:]], [0.0, 0.0]), "stride should be greater than zero"),
    "small_input": ((X[..., :0, :], PACKED, BLOCK, [0.0, 0.0]), "input must have a non-empty height and width"),
    "residual": ((X, PACKED, BLOCK, [0.0, 0.0], X), r"residual must have the output's shape \[2, 6, 8, 8\]"),
}


@pytest.mark.parametrize("wrong", WRONG_PACKED)
def test_packed(wrong):
    args, message = WRONG_PACKED[wrong]
    with pytest.raises(RuntimeError, match=f"separable_conv2d_packed: {message}"):
        torch.ops.dwconv_ext.separable_conv2d_packed(*args)


WRONG_WEIGHTS = {
    "not_depthwise": ((PW, None, PW, None), r"dw_weight must have shape \(C, 1, kH, kW\)"),
    "no_filter": ((DW[:, :, :0], None, PW, None), "dw_weight must have shape"),
    "pw_shape": ((DW, None, PW[:, :3], None), r"pw_weight must have shape \(out_channels, 4, 1, 1\)"),
    "pw_dtype": ((DW, None, PW.half(), None), "pw_weight's dtype and the others' should be the same"),
    "dw_bias": ((DW, B, PW, None), "dw_bias must be 1-dimensional with 4 elements"),
    "pw_bias": ((DW, None, PW, B), "pw_bias must be 1-dimensional with 6 elements"),
    "dtype": ((DW.int(), None, PW.int(), None), "dw_weight must be float32"),
}


@pytest.mark.parametrize("wrong", WRONG_WEIGHTS)
def test_pack(wrong):
    args, message = WRONG_WEIGHTS[wrong]
    with pytest.raises(RuntimeError, match=f"separable_conv2d_pack: {message}"):
        torch.ops.dwconv_ext.separable_conv2d_pack(*args, ISA)


def test_pack_for_another_instruction_set():
    with pytest.raises(RuntimeError, match=r"isa must be the selected instruction set, .* but got 'sse9'"):
        torch.ops.dwconv_ext.separable_conv2d_pack(DW, None, PW, None, "sse9")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: FusedDSConv(4, 8, activation="tanh"), "FusedDSConv: activation must be one of .* but got 'tanh'"),
        (lambda: FusedDSConv(4, 8, activation=["relu"]), r"FusedDSConv: activation must be one of .* but got \['relu'\]"),
        (lambda: FusedDSConv(4, 8, dw_activation=torch.nn.Tanh()), "FusedDSConv: dw_activation must be one of"),
        (lambda: FusedDSConv(4, 8, "3"), "FusedDSConv: kernel_size must be an int or a pair of ints, but got '3'"),
        (lambda: DepthwiseConv2d(4, 6, 3), "out_channels must be divisible by groups"),
        (lambda: DepthwiseConv2d(0, 4, 3), "DepthwiseConv2d: in_channels must be a positive int, but got 0"),
        (lambda: DepthwiseConv2d(4, 4, 3, padding=None), "DepthwiseConv2d: padding must be 'same', 'valid', an int or"),
        (lambda: FusedDSConv(4, 8)(torch.randn(2, 5, 8, 8)), "expected|channels"),
    ],
)
def test_modules(make, message):
    with pytest.raises((RuntimeError, TypeError, ValueError), match=message):
        make()


ON_CUDA = """
import importlib.util
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == {hidden!r} else find(name, *rest)
import torch, dwconv_ext
x, w = torch.randn(2, 4, 8, 8), torch.randn(4, 1, 3, 3)
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
for op in torch._C._dispatch_get_all_op_names():
    assert not op.startswith("dwconv_ext") or torch._C._dispatch_has_kernel_for_dispatch_key(op, "CUDA"), op
ops = torch.ops.dwconv_ext
{call}
"""


@pytest.mark.skipif(torch.version.cuda is None, reason="a CPU-only torch has no CUDA tensors")
def test_ops_without_a_cuda_kernel_say_so():
    """As their kernels for CUDA tensors would be called: with the CUDA half, where there is one, and without it."""
    call = "ops.depthwise_conv2d.default.redispatch(cuda, x, w, None, (1, 1), (0, 0), (1, 1))"
    error = python(ON_CUDA.format(hidden="dwconv_ext._C_cuda", call=call)).stderr
    assert "RuntimeError: depthwise_conv2d: CUDA tensors need the CUDA half, but the CUDA half was not built" in error, error
    call = "ops.squeeze_excitation.default.redispatch(cuda, x, x, None, x, None, 'relu', 'sigmoid')"
    error = python(ON_CUDA.format(hidden="", call=call)).stderr
    assert "RuntimeError: squeeze_excitation: tensors must be on the CPU" in error, error


def python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment})


def test_unknown_instruction_set_fails_at_import():
    result = python("import dwconv_ext", DWCONV_EXT_ISA="avx9")
    assert result.returncode != 0 and "ImportError: DWCONV_EXT_ISA: 'avx9' is not available here" in result.stderr
    lacking = {"avx2", "avx512", "avx512_bf16", "amx"} - set(dwconv_ext._C.supported_isas())
    for isa in sorted(lacking)[:1]:
        result = python("import dwconv_ext", DWCONV_EXT_ISA=isa)
        assert result.returncode == 1 and f"DWCONV_EXT_ISA: '{isa}' is not available here; this CPU" in result.stderr


def test_instruction_set_can_be_chosen():
    result = python("import dwconv_ext; print(dwconv_ext._C.selected_isa())", DWCONV_EXT_ISA="baseline")
    assert result.stdout.strip() == "baseline", result.stderr


def test_log_plan_prints_each_shape_once():
    code = (
        "import torch, dwconv_ext as d\nfor _ in range(3): d.depthwise_conv2d(torch.randn(1, 16, 9, 9), torch.randn(16, 1, 3, 3))"
    )
    result = python(code, DWCONV_EXT_LOG_PLAN="1")
    assert result.stderr.count("depthwise_conv2d forward float32 NCHW N=1 C=16") == 1, result.stderr


def test_not_built_says_what_to_do(tmp_path):
    """A checkout that was never built, put first on the path."""
    import dwconv_ext

    package = tmp_path / "dwconv_ext"
    package.mkdir()
    source = os.path.dirname(dwconv_ext.__file__)
    for name in os.listdir(source):
        if name.endswith(".py"):
            shutil.copy(os.path.join(source, name), package / name)
    # An editable install's finder would find the built module after all.
    alone = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Editable' not in str(f)]; "
    result = python(f"{alone}sys.path.insert(0, {str(tmp_path)!r}); import dwconv_ext")
    assert "is not built for this Python" in result.stderr and "pip install ." in result.stderr, result.stderr
    extension = package / ("_C" + __import__("sysconfig").get_config_var("EXT_SUFFIX"))
    extension.write_bytes(b"not a library")
    result = python(f"{alone}sys.path.insert(0, {str(tmp_path)!r}); import dwconv_ext")
    assert "does not load under torch" in result.stderr and "--no-build-isolation" in result.stderr, result.stderr
