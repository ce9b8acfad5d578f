# SPDX-License-Identifier: MIT
"""conv_norm_relu_pool, against the reference."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from block_cases import (
    CASES,
    Block,
    assert_within,
    cosine,
    opcheck_samples,
    plain_and_exact,
    randn,
    result_and_gradients,
    rms,
)
from cases import LAYOUTS
from test_ops import DTYPES
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode

from dmfast import ops, reference

#: How many times the rms error of plain torch in float32 Winograd's may be, and how many times what
#: rounding the operands to bfloat16 costs.
WINOGRAD = 10
#: Values before ReLU that are so near zero that rounding may decide their sign.
FLOAT32_MARGIN, BFLOAT16_MARGIN = 1e-4, 0.1


def check_float32(case: Block) -> None:
    gradient = case.gradient(case.exact_y(), FLOAT32_MARGIN)
    tensors = [case.x(), *case.parameters()]
    actual = result_and_gradients(ops.conv_norm_relu_pool, tensors, gradient, 1e-5, case.padding)
    for ours, plain, exact in zip(actual, *plain_and_exact(case, gradient), strict=True):
        assert ours.dtype == torch.float32
        assert_within(ours, plain, exact, WINOGRAD)


def check_bfloat16(case: Block) -> None:
    """What rounding costs is measured with the reference in float64 on rounded operands."""
    gradient = case.gradient(case.exact_y(), BFLOAT16_MARGIN)
    tensors = [case.x(), *case.parameters()]
    actual = result_and_gradients(
        ops.conv_norm_relu_pool, tensors, gradient, 1e-5, case.padding, precision="bfloat16"
    )
    operands = [t.bfloat16().double() for t in tensors[:2]]
    operands += [None if t is None else t.double() for t in tensors[2:]]
    rounded = result_and_gradients(
        reference.conv_norm_relu_pool, operands, gradient, 1e-5, case.padding
    )
    plain, exact = plain_and_exact(case, gradient)
    for ours, single, from_rounded, truth in zip(actual, plain, rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        # Sums of gradients that no product reaches are as in float32.
        worse = max(single, from_rounded, key=lambda result: rms(result - truth))
        assert_within(ours, worse, truth, WINOGRAD)
        if rms(truth) > 0:
            assert cosine(ours, truth) > 0.99


@pytest.mark.parametrize("case", CASES, ids=str)
def test_float32_matches_reference(case: Block) -> None:
    check_float32(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_bfloat16_matches_reference(case: Block) -> None:
    check_bfloat16(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_direct_matches_reference(case: Block, dtype: torch.dtype) -> None:
    gradient = case.gradient(case.exact_y(), 0)
    tensors = [None if t is None else t.to(dtype) for t in (case.x(), *case.parameters())]
    results = []
    for function, options, of_dtype in (
        (ops.conv_norm_relu_pool, {"precision": "direct"}, dtype),
        (reference.conv_norm_relu_pool, {}, dtype),
        (reference.conv_norm_relu_pool, {}, torch.float64),
    ):
        converted = [None if t is None else t.to(of_dtype) for t in tensors]
        results.append(
            result_and_gradients(
                function, converted, gradient.to(dtype), 1e-5, case.padding, **options
            )
        )
    for ours, plain, exact in zip(*results, strict=True):
        assert ours.dtype == dtype
        assert_within(ours, plain, exact, 2)


def test_float64_is_direct() -> None:
    case = Block(16, 16, (6, 6))
    tensors = [t.double() for t in (case.x(), *case.parameters())]
    direct = ops.conv_norm_relu_pool(*tensors, precision="direct")
    for precision in (None, "float32", "bfloat16"):
        assert torch.equal(ops.conv_norm_relu_pool(*tensors, precision=precision), direct)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [Block(16, 16, (8, 8)), Block(3, 16, (7, 6))], ids=str)
def test_narrow_images(case: Block, dtype: torch.dtype) -> None:
    """Computed in float32 from the values as they are, and rounded once."""
    x, parameters = case.x().to(dtype), case.parameters()
    leaves = [t.requires_grad_() for t in (x, *parameters)]
    out = ops.conv_norm_relu_pool(*leaves, precision="float32")
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [t.dtype for t in (out, *gradients)] == [dtype, dtype, *[torch.float32] * 3]
    wide = [t.detach().float() for t in leaves]
    assert torch.equal(out, ops.conv_norm_relu_pool(*wide).to(dtype))
    narrow = ops.conv_norm_relu_pool(*(t.detach().to(dtype) for t in leaves))
    assert narrow.dtype == dtype
    assert cosine(narrow, out) > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [Block(16, 16, (8, 8)), Block(3, 16, (7, 6))], ids=str)
def test_precision_follows_the_dtype(case: Block, dtype: torch.dtype) -> None:
    tensors = [t.to(dtype) for t in (case.x(), *case.parameters())]
    named = "bfloat16" if dtype == torch.bfloat16 else "float32"
    default = ops.conv_norm_relu_pool(*tensors)
    assert torch.equal(default, ops.conv_norm_relu_pool(*tensors, precision=named))


@pytest.mark.parametrize("precision", [None, "bfloat16", "direct"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_results_are_channels_last(layout: str, precision: str | None) -> None:
    case = Block(16, 16, (6, 5), layout=layout)
    x, *parameters = case.x().requires_grad_(), *case.parameters()
    for out in (
        ops.conv_norm_relu_pool(x, *parameters, precision=precision),
        ops.conv_norm_relu_pool(x.detach(), *parameters, precision=precision),
    ):
        assert out.is_contiguous(memory_format=torch.channels_last)


def test_layers_on_another_device_have_the_layout() -> None:
    case = Block(16, 16, (6, 5), images=4, networks=2)
    tensors = [case.x(), *case.parameters()]
    here = ops.conv_norm_relu_pool(*tensors)
    there = ops.conv_norm_relu_pool(*(t.to("meta") for t in tensors))
    assert there.device.type == "meta"
    assert (there.shape, there.stride()) == (here.shape, here.stride())


@pytest.mark.parametrize("networks", [None, 2])
def test_direct_gradcheck(networks: int | None) -> None:
    case = Block(1, 2, (2, 3), networks=networks)
    tensors = [t.double().requires_grad_() for t in (case.x(), *case.parameters())]
    function = functools.partial(ops.conv_norm_relu_pool, precision="direct")
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_a_second_derivative_names_the_way(precision: str | None) -> None:
    case = Block(16, 16, (6, 6))
    leaves = [t.requires_grad_() for t in (case.x(), *case.parameters())]
    out = ops.conv_norm_relu_pool(*leaves, precision=precision)
    (of_x,) = torch.autograd.grad(out.sum(), leaves[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"^conv_norm_relu_pool: .* precision=.direct"):
        of_x.square().sum().backward()


class Calls(TorchDispatchMode):
    """Notes what the operators are called with."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.arguments[func._opname] = args
        return func(*args, **(kwargs or {}))


def test_only_what_is_needed_is_kept_and_computed() -> None:
    case = Block(16, 16, (6, 6))
    x, conv_weight, weight, bias = case.x(), *case.parameters()
    with Calls() as calls:
        ops.conv_norm_relu_pool(x, conv_weight, weight, bias)
    assert calls.arguments["conv_norm_relu_pool"][-1] is False
    conv_weight.requires_grad_()
    bias.requires_grad_()
    with Calls() as calls, torch.no_grad():
        ops.conv_norm_relu_pool(x, conv_weight, weight, bias)
    assert calls.arguments["conv_norm_relu_pool"][-1] is False
    with Calls() as calls:
        ops.conv_norm_relu_pool(x, conv_weight, weight, bias).sum().backward()
    assert calls.arguments["conv_norm_relu_pool"][-1] is True
    wanted = calls.arguments["_conv_norm_relu_pool_backward"][-1]
    assert list(wanted) == [False, True, False, True]
    assert x.grad is None
    assert weight.grad is None


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "direct"])
@pytest.mark.parametrize("channels", [3, 16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_comes_out_where_torch_has_it(
    value: float, channels: int, precision: str
) -> None:
    case = Block(channels, 16, (9, 8), images=4)
    for spoil in ("pixel", "corner", "filter", "weight", "bias"):
        x, conv_weight, weight, bias = case.x(), *case.parameters()
        if spoil == "pixel":
            x[2, channels - 1, 4, 5] = value
        elif spoil == "corner":
            x[0, 0, 0, 0] = value
        elif spoil == "filter":
            conv_weight[5, 1, 1, 2] = value
        elif spoil == "weight":
            weight[3] = torch.nan
        else:
            bias[7] = value
        out = ops.conv_norm_relu_pool(x, conv_weight, weight, bias, precision=precision)
        plain = reference.conv_norm_relu_pool(x, conv_weight, weight, bias)
        assert torch.equal(out.isnan(), plain.isnan()), spoil
        assert torch.equal(out.isinf(), plain.isinf()), spoil


@pytest.mark.parametrize("channels", [1, 3, 16, 32])
def test_constant_images_become_the_bias(channels: int) -> None:
    """Without padding nothing varies but by rounding, which the norm magnifies by 1 / sqrt(eps)."""
    case = Block(channels, 16, (8, 8), images=3, padding=0)
    conv_weight, weight, bias = case.parameters()
    for level in (0.0, 0.7, -1.0):
        x = torch.full((3, channels, 8, 8), level)
        out = ops.conv_norm_relu_pool(x, conv_weight, weight, bias, padding=0)
        spread = level * randn(3, channels, 8, 8, seed=5)
        z, exact = (
            torch.nn.functional.conv2d(spread.to(d), conv_weight.to(d))
            for d in (torch.float32, torch.float64)
        )
        slack = WINOGRAD * rms(z - exact) / 1e-5**0.5 * weight.abs().max().item() + 1e-7
        expected = bias.relu().view(1, 16, 1, 1).expand_as(out)
        assert rms(out - expected) <= slack


@pytest.mark.parametrize("channels", [3, 16, 32])
@pytest.mark.parametrize("spread", [1.0, 0.1])
def test_large_means(channels: int, spread: float) -> None:
    case = Block(channels, 16, (10, 10), images=3, padding=0)
    conv_weight, weight, bias = case.parameters()
    x = 1000 + spread * case.x()
    out = ops.conv_norm_relu_pool(x, conv_weight, weight, bias, padding=0)
    plain = reference.conv_norm_relu_pool(x, conv_weight, weight, bias, padding=0)
    double = (t.double() for t in (x, conv_weight, weight, bias))
    exact = reference.conv_norm_relu_pool(*double, padding=0)
    assert_within(out, plain, exact, WINOGRAD)


@pytest.mark.parametrize("what", ["a pixel in the corner", "a mean", "a bright corner", "size"])
@pytest.mark.parametrize("channels", [3, 16])
def test_statistics_are_as_exact_as_those_of_torch(channels: int, what: str) -> None:
    case = Block(channels, 16, (160, 160) if what == "size" else (64, 64), images=1)
    tensors = [case.x(), *case.parameters()]
    if what == "a pixel in the corner":
        tensors[0][:, :, 0, 0] = 300
    elif what == "a mean":
        tensors[0] += 100
    elif what == "a bright corner":
        tensors[0][:, :, :2, :2] += 300
    out, plain = ops.conv_norm_relu_pool(*tensors), reference.conv_norm_relu_pool(*tensors)
    exact = reference.conv_norm_relu_pool(*(tensor.double() for tensor in tensors))
    assert_within(out, plain, exact, WINOGRAD)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case",
    [
        Block(3, 16, (12, 12), images=24),
        Block(32, 32, (9, 8), images=24, layout="channels_last"),
        Block(16, 16, (7, 6), images=24, networks=3),
        Block(16, 16, (8, 16), images=70),
    ],
    ids=str,
)
def test_bits_depend_on_nothing_else(case: Block, precision: str) -> None:
    """Neither on the number of threads nor, for an image, on the others of its batch."""
    tensors = [case.x(), *case.parameters()]
    gradient = case.gradient(case.exact_y(), 0)
    run = functools.partial(ops.conv_norm_relu_pool, padding=case.padding, precision=precision)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(result_and_gradients(run, tensors, gradient))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    out, of_x = results[0][:2]
    for i in (0, 5, 23):
        of_network = [
            p if case.networks is None else p[i * case.networks // case.images] for p in tensors[1:]
        ]
        alone = [tensors[0][i : i + 1], *of_network]
        of_one = result_and_gradients(run, alone, gradient[i : i + 1])
        assert torch.equal(of_one[0], out[i : i + 1])
        assert torch.equal(of_one[1], of_x[i : i + 1])
    with torch.no_grad():
        assert torch.equal(run(*tensors), out)


@pytest.mark.parametrize("precision", [None, "direct"])
def test_autocast_leaves_it_alone(precision: str | None) -> None:
    case = Block(16, 16, (6, 6))
    tensors = [case.x(), *case.parameters()]
    expected = ops.conv_norm_relu_pool(*tensors, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.conv_norm_relu_pool(*tensors, precision=precision)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("name", [n for n in opcheck_samples() if n.startswith("block")])
def test_opcheck(name: str) -> None:
    operator, arguments = opcheck_samples()[name]
    torch.library.opcheck(operator, arguments())


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    case = Block(16, 16, (6, 6))
    conv_weight, weight, bias = (p.requires_grad_() for p in case.parameters())

    def step(x: Tensor) -> Tensor:
        x = ops.conv_norm_relu_pool(x, conv_weight, weight, bias)
        return ops.instance_norm_relu_pool(x, weight, bias).square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for images in (2, 3):
        x = randn(images, 16, 8, 8, seed=1).requires_grad_()
        leaves = (x, conv_weight, weight, bias)
        expected = torch.autograd.grad(step(x), leaves)
        for ours, theirs in zip(torch.autograd.grad(compiled(x), leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


# ---- The kernels of each kind of processor -----------------------------------------------------

SETS = {
    "avx512_bf16": {"avx512_bf16"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
    "avx2": {"avx2", "fma"},
    "plain": set(),
}


def check_kernels() -> str:
    """Cases for a process of its own; what it runs on."""
    kernels = torch.ops.dmfast._cpu_kernels()
    for case in (
        Block(3, 128, (12, 12), layout="channels_last"),
        Block(1, 16, (10, 10), padding=3, networks=1),
        Block(128, 32, (8, 8), images=3, layout="channels_last"),
        Block(48, 48, (7, 9), images=6, networks=3),
        Block(16, 16, (2, 3), images=7, affine="none"),
        Block(32, 32, (68, 68), images=1),
    ):
        check_float32(case)
        if not kernels.endswith("direct"):
            check_bfloat16(case)
    return kernels


def in_process(asked: str, code: str) -> subprocess.CompletedProcess:
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"DMFAST_CPU": asked, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


@functools.cache
def processor() -> set[str]:
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("no /proc/cpuinfo says what the processor has")
    flags = next(
        (line for line in info.read_text().splitlines() if line.startswith("flags")), "flags:"
    )
    return set(flags.partition(":")[2].split())


@pytest.mark.parametrize("way", ["", ",direct"])
@pytest.mark.parametrize("name", SETS)
def test_every_set_of_kernels(name: str, way: str) -> None:
    if not SETS[name] <= processor():
        pytest.skip(f"the processor has no {name}")
    done = in_process(name + way, "import test_blocks; print(test_blocks.check_kernels())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == name + way


def test_direct_alone_is_direct_on_the_best_set() -> None:
    best = next(name for name in SETS if SETS[name] <= processor())
    done = in_process("direct", "import test_blocks; print(test_blocks.check_kernels())")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{best},direct"


CALL = """
import torch
from dmfast import ops
try:
    ops.conv_norm_relu_pool(torch.zeros(1, 16, 4, 4), torch.zeros(16, 16, 3, 3))
except RuntimeError as error:
    print(error)
"""


@pytest.mark.parametrize("asked", ["sse9", "avx2,winograd", *SETS])
def test_a_set_that_is_not_there_is_named(asked: str) -> None:
    if asked in SETS and SETS[asked] <= processor():
        pytest.skip(f"the processor has {asked}")
    done = in_process(asked, CALL)
    assert done.returncode == 0, done.stderr
    assert "DMFAST_CPU" in done.stdout
    assert asked in done.stdout
    assert done.stdout.count("\n") == 1


# ---- bad input ---------------------------------------------------------------------------------

X, W = torch.zeros(4, 16, 8, 8), torch.zeros(16, 16, 3, 3)
BAD = {
    "precision": (
        (X, W, None, None, 1e-5, 1, "float16"),
        "precision must be 'direct', 'float32', 'bfloat16' or None, got 'float16'",
    ),
    "rank": ((X[0], W), "x must have shape [images, channels, height, width], got [16, 8, 8]"),
    "dtype": ((X.int(), W), "x must be float64, float32, float16 or bfloat16, got int32"),
    "conv_weight": (
        (X, W[:, :8]),
        "conv_weight must have shape [filters, 16, 3, 3] or [networks, filters, 16, 3, 3], got "
        "[16, 8, 3, 3]",
    ),
    "kernel": (
        (X, torch.zeros(16, 16, 5, 5)),
        "conv_weight must have shape [filters, 16, 3, 3] or [networks, filters, 16, 3, 3], got "
        "[16, 16, 5, 5]",
    ),
    "no filters": ((X, W[:0]), "conv_weight must not be empty, got [0, 16, 3, 3]"),
    "conv_weight dtype": ((X, W.double()), "conv_weight must be float32, got float64"),
    "narrow conv_weight": (
        (X.bfloat16(), W.half()),
        "conv_weight must be bfloat16 or float32, got float16",
    ),
    "networks": (
        (X, W.expand(3, -1, -1, -1, -1)),
        "the 4 images of x must divide evenly into the 3 networks",
    ),
    "no networks": (
        (X[:0], W.expand(0, -1, -1, -1, -1)),
        "the 0 images of x must divide evenly into the 0 networks",
    ),
    "weight": (
        (X, W, torch.ones(2, 16)),
        "weight must have shape [16] as the filters of conv_weight, got [2, 16]",
    ),
    "bias": (
        (X, W.expand(2, -1, -1, -1, -1), None, torch.ones(16)),
        "bias must have shape [2, 16] as the filters of conv_weight, got [16]",
    ),
    "bias dtype": ((X, W, None, torch.ones(16).half()), "bias must be float32, got float16"),
    "eps": ((X, W, None, None, torch.nan), "eps must be 0 or more, got nan"),
    "padding": ((X, W, None, None, 1e-5, -1), "padding must be 0 or more, got -1"),
    "far padding": (
        (X, W, None, None, 1e-5, 2**40),
        "padding must be at most 2**20, got 1099511627776",
    ),
    "no columns": (
        (X[..., :0], W, None, None, 1e-5, 3),
        "x must be at least 1 pixels high and wide with padding 3, got [4, 16, 8, 0]",
    ),
    "size": (
        (X[:, :, :3], W, None, None, 1e-5, 0),
        "x must be at least 4 pixels high and wide with padding 0, got [4, 16, 3, 8]",
    ),
    "devices": (
        (X, W.to("meta")),
        "conv_weight is on meta, but x is on cpu; move it",
    ),
}


NO_MEMORY = {
    "x": (lambda: (X[:1].expand(2**40, -1, -1, -1), W), None),
    "narrow x": (lambda: (X[:1].half().expand(2**40, -1, -1, -1), W), None),
    "conv_weight": (lambda: (X, W[:1].expand(2**40, -1, -1, -1)), None),
    "side": (lambda: (X[:1, :, :1, :1].expand(1, -1, 2**28, 2**28), W), None),
    "layers": (lambda: (X[:1].expand(2**40, -1, -1, -1), W), "direct"),
    "padding": (lambda: (X, W, None, None, 1e-5, 2**20), "direct"),
}


@pytest.mark.parametrize("name", NO_MEMORY)
def test_too_much_memory_is_one_line_that_names_the_operator(name: str) -> None:
    arguments, precision = NO_MEMORY[name]
    with pytest.raises(RuntimeError, match=r"^conv_norm_relu_pool: .*memory.*$") as raised:
        ops.conv_norm_relu_pool(*arguments(), precision=precision)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("eps", ["1e-5", None, torch.ones(2)], ids=str)
def test_an_eps_that_is_no_number_is_named(eps: object) -> None:
    with pytest.raises(TypeError, match=r"^conv_norm_relu_pool: eps must be a number, got \w+$"):
        ops.conv_norm_relu_pool(X, W, eps=eps)


def test_networks_without_images_cost_nothing() -> None:
    """However many there are: torch's layers are not called for each."""
    conv_weight = W.expand(2**40, -1, -1, -1, -1)
    out = ops.conv_norm_relu_pool(X[:0], conv_weight, precision="direct")
    assert out.shape == (0, 16, 4, 4)


@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str, direct: bool) -> None:
    arguments, message = BAD[name]
    options = {"precision": "direct"} if direct and len(arguments) < 7 else {}
    with pytest.raises(RuntimeError, match=f"^conv_norm_relu_pool: {re.escape(message)}$"):
        ops.conv_norm_relu_pool(*arguments, **options)
