# SPDX-License-Identifier: MIT
"""The ways of blocks on a GPU, on the CPU: they are functions of tensors, and the kernel of a whole
block has a stand-in. On a GPU: test_cuda.py."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from block_cases import (
    CASES,
    Block,
    assert_within,
    cosine,
    plain_and_exact,
    result_and_gradients,
    rms,
)
from emulated import build_operators
from test_blocks import BFLOAT16_MARGIN, FLOAT32_MARGIN, Calls
from test_convnet import PASSES, Pass, exact_and_plain
from test_norm_pool import away_from_zero
from test_norm_pool import inputs as norm_inputs
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dmfast import _blocks, _convnet, _gpu_blocks, ops, reference

OP = torch.ops.dmfast
Optional = Tensor | None


def ids(case: object) -> str:
    return str(case)


# ---- A stand-in for the kernel ------------------------------------------------------------------


def convolve(x: Tensor, conv_weight: Tensor, padding: int) -> Tensor:
    """In float32 of operands rounded to bfloat16, as the kernel's products."""
    weights = conv_weight.bfloat16().float()
    weights = weights if weights.dim() == 5 else weights[None]
    parts = zip(x.float().tensor_split(len(weights)), weights, strict=True)
    return torch.cat([F.conv2d(part, w, padding=padding) for part, w in parts])


def stand_in(
    x: Tensor,
    conv_weight: Tensor,
    weight: Optional,
    bias: Optional,
    packed: Optional,
    eps: float,
    padding: int,
    wgmma: bool,
) -> tuple[Tensor, Tensor]:
    assert x.dtype == torch.bfloat16
    assert all(p is None or p.dtype == torch.float32 for p in (conv_weight, weight, bias))
    assert packed is None or packed.shape == conv_weight.shape
    z = convolve(x, conv_weight, padding)
    out, statistics = OP.instance_norm_relu_pool(z, weight, bias, eps)
    return out.bfloat16().contiguous(memory_format=torch.channels_last), statistics


def stand_in_backward(
    gradient: Tensor,
    x: Tensor,
    conv_weight: Tensor,
    weight: Optional,
    bias: Optional,
    statistics: Tensor,
    padding: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    assert gradient.dtype == torch.bfloat16
    z = convolve(x, conv_weight, padding)
    of_z, *of_parameters = OP._instance_norm_relu_pool_backward(
        gradient.float(), z, weight, bias, statistics, 0.0, [True, *wanted[2:]]
    )
    weights = conv_weight.bfloat16().float()
    weights = weights if weights.dim() == 5 else weights[None]
    parts = zip(of_z.tensor_split(len(weights)), weights, strict=True)
    of_x = torch.cat([F.conv_transpose2d(part, w, padding=padding) for part, w in parts])
    images = [
        t.bfloat16().contiguous(memory_format=torch.channels_last) if want else x.new_empty(0)
        for t, want in zip((of_x, of_z), wanted, strict=False)
    ]
    return *images, *of_parameters


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, ...]]]:
    """The stand-in as the CPU's operators, which takes every block; what it was asked to take."""
    asked: list[tuple[int, ...]] = []

    def takes(*arguments: int) -> bool:
        asked.append(arguments)
        return True

    takes._dynamo_marked_constant = True
    library = torch.library.Library("dmfast", "IMPL")
    library.impl("_fused_block", stand_in, "CPU")
    library.impl("_fused_block_backward", stand_in_backward, "CPU")
    library.impl("_fused_block_pack", lambda conv_weight, *_: torch.empty_like(conv_weight), "CPU")
    monkeypatch.setattr(_gpu_blocks, "_takes", takes)
    monkeypatch.setenv("DMFAST_GPU", "fused")
    yield asked
    library._destroy()


# ---- Which way ----------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["", "cudnn", "fused", "wgmma", "torch"])
def test_the_variable_names_the_way(asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFAST_GPU", asked)
    assert _gpu_blocks.gpu_way() == (asked or "cudnn")
    monkeypatch.delenv("DMFAST_GPU")
    assert _gpu_blocks.gpu_way() == "cudnn"


def test_an_unknown_way_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DMFAST_GPU", "cutlass")
    message = "^DMFAST_GPU must be cudnn, fused, wgmma or torch, got 'cutlass'$"
    with pytest.raises(RuntimeError, match=message):
        _gpu_blocks.gpu_way()


class OnGpu:
    """As much of a tensor on a GPU as the choice looks at."""

    device = torch.device("cuda", 1)

    def __init__(self, *shape: int) -> None:
        self.shape = torch.Size(shape)


@pytest.mark.parametrize("cuda_operators", [True, False])
@pytest.mark.parametrize("way", ["cudnn", "fused", "wgmma", "torch"])
def test_what_goes_by_more_than_the_layers(
    way: str, cuda_operators: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMFAST_GPU", way)
    monkeypatch.setattr(_blocks._load, "has_cuda_operators", lambda: cuda_operators)
    weights = [OnGpu(10, 5, 3, 3), OnGpu(16, 10, 3, 3)]
    for precision in (None, "float32", "bfloat16", "direct"):
        for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            expected = cuda_operators and way != "torch"
            expected = expected and precision != "direct" and dtype != torch.float64
            assert _blocks.is_fused(weights, 9, precision, dtype) == expected


def test_the_kernel_is_asked_for_bfloat16_only(kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    x, conv_weight = OnGpu(4, 3, 9, 8), OnGpu(2, 32, 3, 3, 3)
    assert not _gpu_blocks.is_whole(x, conv_weight, 2, torch.float32, False)
    for way, whole in (("cudnn", False), ("torch", False), ("fused", True), ("wgmma", True)):
        monkeypatch.setenv("DMFAST_GPU", way)
        assert _gpu_blocks.is_whole(x, conv_weight, 2, torch.bfloat16, True) == whole
    assert kernel == [(3, 32, 9, 8, 2, True, 1)] * 2


def test_a_backward_is_asked_for_where_there_is_one(kernel) -> None:
    case = Block(3, 32, (8, 8))
    x, parameters = case.x().bfloat16(), case.parameters()
    _gpu_blocks.gpu_block(x, *parameters, 1e-5, 1)
    parameters[2].requires_grad_()
    _gpu_blocks.gpu_block(x, *parameters, 1e-5, 1)
    with torch.no_grad():
        _gpu_blocks.gpu_block(x, *parameters, 1e-5, 1)
    assert [arguments[5] for arguments in kernel] == [False, True, False]


# ---- Torch's convolution and what follows it ----------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_convolved_block_matches_reference(case: Block) -> None:
    gradient = case.gradient(case.exact_y(), FLOAT32_MARGIN)
    tensors = [case.x(), *case.parameters()]
    actual = result_and_gradients(
        _gpu_blocks.convolved_block, tensors, gradient, 1e-5, case.padding
    )
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    for ours, plain, exact in zip(actual, *plain_and_exact(case, gradient), strict=True):
        assert ours.dtype == torch.float32
        assert_within(ours, plain, exact, 2)


def in_bfloat16(
    function: Callable[..., Tensor], case: Block, dtype: torch.dtype, device: str = "cpu"
) -> None:
    """A way with products of bfloat16, from and to images of that dtype, beside what rounding the
    operands costs."""
    gradient = case.gradient(case.exact_y(), BFLOAT16_MARGIN)
    x, *parameters = case.x(), *case.parameters()
    tensors = [None if t is None else t.to(device) for t in (x.to(dtype), *parameters)]
    actual = result_and_gradients(function, tensors, gradient.to(device), 1e-5, case.padding)
    assert actual[0].dtype == actual[1].dtype == dtype
    assert actual[0].device.type == device
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    operands = [t.bfloat16().double() for t in (x, parameters[0])]
    operands += [None if t is None else t.double() for t in parameters[1:]]
    rounded = result_and_gradients(
        reference.conv_norm_relu_pool, operands, gradient, 1e-5, case.padding
    )
    plain, exact = plain_and_exact(case, gradient)
    for ours, single, from_rounded, truth in zip(actual, plain, rounded, exact, strict=True):
        # What is passed on is rounded as well: twice the operands' share, and of what no product
        # reaches the error of a bfloat16 in the mean of its terms.
        worse = max(single, from_rounded, key=lambda result: rms(result - truth))
        floor = 2 * torch.finfo(torch.bfloat16).eps * rms(truth)
        assert rms(ours.cpu() - truth) <= 4 * rms(worse - truth) + floor
        if rms(truth) > 0:
            assert cosine(ours.cpu(), truth) > 0.99


@pytest.mark.parametrize("case", CASES, ids=ids)
def test_convolved_block_in_bfloat16(case: Block) -> None:
    in_bfloat16(_gpu_blocks.convolved_block, case, torch.bfloat16)


@pytest.mark.parametrize("networks", [None, 2])
def test_convolved_block_gradcheck(networks: int | None) -> None:
    case = Block(1, 2, (2, 3), networks=networks)
    tensors = [t.double().requires_grad_() for t in (case.x(), *case.parameters())]

    def function(*tensors: Tensor) -> Tensor:
        return _gpu_blocks.convolved_block(*tensors, 1e-5, 1)

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


# ---- One kernel ---------------------------------------------------------------------------------

WHOLE = [case for case in CASES if case.images and case.padding < 9]


@pytest.mark.parametrize("case", WHOLE, ids=ids)
def test_whole_block_matches_reference(case: Block, kernel) -> None:
    in_bfloat16(_gpu_blocks.gpu_block, case, torch.bfloat16)
    assert len(kernel) == 1


def test_whole_block_without_images(kernel) -> None:
    case = Block(16, 16, (8, 8), images=0, networks=3)
    tensors = [case.x().bfloat16(), *case.parameters()]
    out, *gradients = result_and_gradients(
        _gpu_blocks.gpu_block, tensors, torch.zeros(0, 16, 4, 4), 1e-5, 1
    )
    assert out.shape == (0, 16, 4, 4)
    assert not any(gradient.any() for gradient in gradients)


def test_parameters_of_the_dtype_of_the_images(kernel) -> None:
    case = Block(3, 16, (8, 8))
    tensors = [t.bfloat16() for t in (case.x(), *case.parameters())]
    out, *gradients = result_and_gradients(
        _gpu_blocks.gpu_block, tensors, torch.ones(2, 16, 4, 4), 1e-5, 1
    )
    assert [t.dtype for t in (out, *gradients)] == [torch.bfloat16] * 5


def whole_arguments(case: Block) -> tuple[object, ...]:
    leaves = [None if t is None else t.requires_grad_() for t in case.parameters()]
    return case.x().bfloat16().requires_grad_(), *leaves, None, 1e-5, case.padding, False


@pytest.mark.parametrize("affine", ["both", "none"])
@pytest.mark.parametrize("networks", [None, 3])
def test_opcheck(networks: int | None, affine: str, kernel) -> None:
    case = Block(3, 16, (7, 6), images=6, networks=networks, affine=affine)
    arguments = whole_arguments(case)
    torch.library.opcheck(OP._fused_block.default, arguments)
    with torch.no_grad():
        out, statistics = OP._fused_block(*arguments)
        tensors = [None if t is None else t.detach() for t in arguments[:4]]
        for wanted in ([True] * 4, [False, True, False, True], [True, False, True, False]):
            torch.library.opcheck(
                OP._fused_block_backward.default,
                (torch.ones_like(out), *tensors, statistics, case.padding, wanted),
            )


def test_only_what_is_needed_is_computed(kernel) -> None:
    case = Block(3, 16, (8, 8))
    x, (conv_weight, weight, bias) = case.x().bfloat16(), case.parameters()
    conv_weight.requires_grad_()
    bias.requires_grad_()
    with Calls() as calls:
        _gpu_blocks.gpu_block(x, conv_weight, weight, bias, 1e-5, 1).sum().backward()
    wanted = calls.arguments["_fused_block_backward"][-1]
    assert list(wanted) == [False, True, False, True]
    assert x.grad is None
    x.requires_grad_()
    with Calls() as calls:
        _gpu_blocks.gpu_block(x, conv_weight.detach(), weight, None, 1e-5, 1).sum().backward()
    assert list(calls.arguments["_fused_block_backward"][-1]) == [True, False, False, False]
    assert "convolution_backward" not in calls.arguments


def test_a_second_derivative_names_the_way(kernel) -> None:
    x, *rest = whole_arguments(Block(3, 16, (8, 8)))
    out, _ = OP._fused_block(x, *rest)
    (of_x,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"^conv_norm_relu_pool: .* precision=.direct"):
        of_x.square().sum().backward()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("way", ["cudnn", "fused"])
def test_compiles_without_graph_breaks(
    way: str, dynamic: bool, kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMFAST_GPU", way)
    torch._dynamo.reset()
    parameters = [p.requires_grad_() for p in Block(16, 16, (8, 8)).parameters()]

    def step(x: Tensor) -> Tensor:
        return _gpu_blocks.gpu_block(x, *parameters, 1e-5, 1).float().square().sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for images, side in ((2, 8), (3, 8), (3, 6)):
        x = torch.randn(images, 16, side, side).bfloat16().requires_grad_()
        leaves = (x, *parameters)
        expected = torch.autograd.grad(step(x), leaves)
        for ours, theirs in zip(torch.autograd.grad(compiled(x), leaves), expected, strict=True):
            torch.testing.assert_close(ours, theirs)
    assert bool(kernel) == (way == "fused")


# ---- The host's side of the kernels -------------------------------------------------------------

HOST = [
    Block(3, 32, (8, 8)),
    Block(1, 32, (4, 4), images=3, padding=3, networks=3),
    Block(2, 64, (6, 8), images=3, affine="weight"),
    Block(32, 32, (8, 8), images=3, affine="bias"),
    Block(32, 64, (8, 8), images=4, networks=2, layout="sliced"),
]
HOST_NORMS = [
    ((3, 40, 9, 7), "channels_last", 3),
    ((2, 32, 8, 8), "sliced", None),
    ((4, 5, 6, 6), "channels_last", 2),
    ((0, 4, 6, 6), "contiguous", 3),
]


def check_host(library: str) -> None:
    """In a process of its own: the operators for a GPU on the CPU, with emulated kernels."""
    torch.ops.load_library(library)
    emulated = torch.ops.dmfast_emulated
    taken: list[bool] = []

    def takes(*arguments: int) -> bool:
        taken.append(emulated._fused_block_takes(*arguments))
        return taken[-1]

    _gpu_blocks._takes = takes
    for case in HOST:
        in_bfloat16(_gpu_blocks.gpu_block, case, torch.bfloat16)
    assert taken == [True] * len(HOST)
    assert not emulated._fused_block_takes(5, 32, 8, 8, 1, False, 0)
    check_host_pass()
    check_host_addresses()
    for arguments in HOST_NORMS:
        check_host_norm(emulated, *arguments)


def check_host_pass() -> None:
    """With weights that are packed once; the parts of slices."""
    case = Pass(depth=2, filters=32)
    exact, _ = exact_and_plain(case)
    out = class_means(case, torch.bfloat16)
    assert cosine(out, exact) > 0.999
    assert rms(out - exact) < 0.02 * rms(exact)


def check_host_addresses() -> None:
    case = Block(1, 32, (2, 6), images=4, padding=2)
    x, parameters = case.x().bfloat16()[1:], case.parameters()
    assert x.data_ptr() % 16
    packed = OP._fused_block_pack(parameters[0], 2, 6, 2)
    results = [
        OP._fused_block(images, *parameters, kept, 1e-5, 2, False)
        for images, kept in ((x, None), (x.clone(), None), (x, packed))
    ]
    for out, statistics in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(statistics, results[0][1])
    for bad, message in (
        ((x.float(), *parameters, None), "x must be bfloat16, got float32"),
        ((x, parameters[0].double(), None, None, None), "conv_weight must be float32, got float64"),
        ((x, *parameters, packed[1:]), "packed must be what fused_block_pack made"),
        ((x, parameters[0], parameters[1][:3], None, None), "weight must have 32 elements"),
    ):
        with pytest.raises(RuntimeError, match=f"^fused_block: {message}"):
            OP._fused_block(*bad, 1e-5, 2, False)


def check_host_norm(emulated, shape, layout: str, networks: int | None) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x, *parameters = norm_inputs(shape, layout, networks)
        x = x.to(dtype)
        gradient = away_from_zero([x, *parameters]).to(dtype)
        for weight, bias in (parameters, (None, parameters[1]), (None, None)):
            tensors = (x, weight, bias)
            wanted = [[True] * 3, [False, True, False], [True, False, False]]
            results = []
            for operators in (emulated, OP):
                made = [*operators.instance_norm_relu_pool(*tensors, 1e-5)]
                for which in wanted:
                    made += operators._instance_norm_relu_pool_backward(
                        gradient, *tensors, made[1], 1e-5, which
                    )
                results.append(made)
            for ours, theirs in zip(*results, strict=True):
                assert ours.stride() == theirs.stride()
                torch.testing.assert_close(ours, theirs)


def test_the_host_calls_the_kernels_right() -> None:
    code = f"import test_gpu_blocks; test_gpu_blocks.check_host({str(build_operators())!r})"
    here = Path(__file__).resolve().parent
    path = os.pathsep.join(filter(None, (str(here), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"DMFAST_GPU": "fused", "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


# ---- From bytes to class means ------------------------------------------------------------------


def class_means(case: Pass, dtype: torch.dtype) -> Tensor:
    with torch.no_grad():
        return _convnet._on_gpu(*case.arguments(), case.padding, 1e-5, dtype)


@pytest.mark.parametrize("case", PASSES, ids=ids)
def test_class_means_match_reference(case: Pass) -> None:
    out = class_means(case, torch.float32)
    exact, plain = exact_and_plain(case)
    assert out.dtype == torch.float32
    assert_within(out, plain, exact, 2)
    assert not out[torch.tensor(case.offsets).diff() == 0].any()


@pytest.mark.parametrize("way", ["cudnn", "fused"])
@pytest.mark.parametrize("case", PASSES, ids=ids)
def test_class_means_in_bfloat16(
    case: Pass, way: str, kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DMFAST_GPU", way)
    out = class_means(case, torch.bfloat16)
    exact, _ = exact_and_plain(case)
    *rest, weights = case.arguments()
    rounded = [w.bfloat16().double() if w.dim() == 4 else w.double() for w in weights]
    if exact.numel():
        from_rounded = reference.convnet_class_mean(*rest, rounded, padding=case.padding)
        assert_within(out, from_rounded, exact, 10)
    if rms(exact):
        assert cosine(out, exact) > 0.99
        assert bool(kernel) == (way == "fused")


@pytest.mark.parametrize(("images", "gathered"), [(1, 17), (3, 17), (17, 5), (4, 6)])
def test_slices_change_no_bit(images: int, gathered: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Pass(offsets=(0, 0, 5, 6, 17, 17))
    whole = class_means(case, torch.float32)
    calls: list[int] = []

    def counted(x: Tensor, *rest: object) -> Tensor:
        calls.append(len(x))
        return _gpu_blocks.gpu_block(x, *rest)

    monkeypatch.setattr(_convnet, "gpu_block", counted)
    monkeypatch.setattr(_convnet, "_BYTES_OF_A_SLICE", images * 16 * 16 * case.filters * 4)
    monkeypatch.setattr(_convnet, "_ELEMENTS_GATHERED", gathered * 16 * 16 * 3)
    out = class_means(case, torch.float32)
    assert max(calls) == min(images, gathered)
    assert sum(calls) == 17 * case.depth
    # A convolution may choose another algorithm for another number of images.
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-6)


def test_one_kernel_writes_less_and_takes_more_at_once(
    kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, bool]] = []

    def counted(x: Tensor, *rest: object) -> Tensor:
        calls.append((len(x), rest[-1] is not None))
        return _gpu_blocks.gpu_block(x, *rest)

    monkeypatch.setattr(_convnet, "gpu_block", counted)
    monkeypatch.setattr(_convnet, "_BYTES_OF_A_SLICE", 2 * 16 * 16 * 16 * 2)
    for way, images, packed in (("cudnn", 2, False), ("fused", 8, True)):
        calls.clear()
        monkeypatch.setenv("DMFAST_GPU", way)
        class_means(Pass(), torch.bfloat16)
        assert calls[0] == (images, packed)


def test_a_spoilt_image_spoils_its_group_only() -> None:
    case = Pass(source="float32", augmented=False)
    images, _, *rest = case.arguments()
    images[3, 4, 5, 1] = torch.nan
    with torch.no_grad():
        out = _convnet._on_gpu(images, torch.arange(8), *rest, 1, 1e-5, torch.float32)
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


def test_products_are_in_the_precision_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.dtype] = []

    def noted(x: Tensor, *rest: object) -> Tensor:
        seen.append(x.dtype)
        return _gpu_blocks.gpu_block(x, *rest)

    monkeypatch.setattr(_blocks, "gpu_block", noted)
    case = Block(3, 16, (8, 8))
    x, *parameters = case.x(), *case.parameters()
    expected = ops.conv_norm_relu_pool(x, *parameters, precision="direct")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for bfloat16, products in ((True, torch.bfloat16), (False, torch.float32)):
            narrow = [t.to(dtype) for t in (x, *parameters)]
            out = _blocks._block_on_gpu(*narrow, 1e-5, 1, bfloat16)
            assert (out.dtype, seen.pop()) == (dtype, products)
            assert cosine(out, expected) > 0.999
