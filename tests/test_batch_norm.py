# SPDX-License-Identifier: MIT
"""conv_batch_norm_relu_pool, against the reference and torch's layers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from block_cases import CASES, Block, assert_within, randn, rms
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dmfast import ops, reference

#: How many times the rms error of plain torch in float32 Winograd's may be.
WINOGRAD = 10
SINGLE = [case for case in CASES if case.networks is None and case.images]
MARGIN = {"float32": 1e-4, "bfloat16": 0.1}


def statistics_of(case: Block) -> Tensor:
    """What is given in place of the batch's: of about the right size, but others."""
    mean, variance = 0.1 * randn(case.filters, seed=7), 0.3 + randn(case.filters, seed=8).abs()
    return torch.stack([mean, variance])


def tensors_of(case: Block, dtype: torch.dtype) -> list[Tensor | None]:
    return [None if t is None else t.to(dtype) for t in (case.x(), *case.parameters())]


def upstream(case: Block, statistics: Tensor | None, margin: float) -> Tensor:
    """Zero where a value before ReLU is so near zero that rounding decides its sign."""
    x, conv_weight, weight, bias = tensors_of(case, torch.float64)
    z = F.conv2d(x, conv_weight, padding=case.padding)
    mean, variance = (None, None) if statistics is None else statistics.double()
    y = F.batch_norm(z, mean, variance, weight, bias, statistics is None, 0.0, 1e-5)
    near = (y.abs() < margin).double()
    gradient = randn(*F.max_pool2d(near, 2).shape, seed=4)
    return gradient * (F.max_pool2d(near, 2) == 0)


def everything(
    function: Any,
    tensors: list[Tensor | None],
    gradient: Tensor,
    case: Block,
    statistics: Tensor | None,
    **options: Any,
) -> list[Tensor]:
    """The result, the statistics, and the gradients of all tensors that there are."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out, found = function(*leaves, eps=1e-5, padding=case.padding, statistics=statistics, **options)
    wanted = [t for t in leaves if t is not None]
    gradients = torch.autograd.grad(out, wanted, gradient.to(out.dtype))
    return [out.detach(), found, *gradients]


def check(case: Block, given: bool, precision: str) -> None:
    statistics = statistics_of(case) if given else None
    gradient = upstream(case, statistics, MARGIN[precision])
    wide = None if statistics is None else statistics.double()
    single, exact = (
        everything(reference.conv_batch_norm_relu_pool, tensors, gradient, case, of)
        for tensors, of in (
            (tensors_of(case, torch.float32), statistics),
            (tensors_of(case, torch.float64), wide),
        )
    )
    actual = everything(
        ops.conv_batch_norm_relu_pool,
        tensors_of(case, torch.float32),
        gradient,
        case,
        statistics,
        precision=precision,
    )
    rounded = single
    if precision == "bfloat16":
        operands = tensors_of(case, torch.float64)
        operands[:2] = [t.bfloat16().double() for t in operands[:2] if t is not None]
        rounded = everything(reference.conv_batch_norm_relu_pool, operands, gradient, case, wide)
    for ours, plain, from_rounded, truth in zip(actual, single, rounded, exact, strict=True):
        assert ours.dtype == torch.float32
        worse = max(plain, from_rounded, key=lambda result: rms(result - truth))
        assert_within(ours, worse, truth, WINOGRAD)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_matches_the_reference(case: Block, given: bool, precision: str) -> None:
    check(case, given, precision)


@pytest.mark.parametrize("isa", ["avx512", "avx2", "plain"])
def test_every_instruction_set(isa: str) -> None:
    """In a process of its own, for which the environment chooses."""
    code = (
        "import test_batch_norm as t\n"
        "for case in t.SINGLE[:20]:\n"
        "    for given in (False, True):\n"
        "        for precision in ('float32', 'bfloat16'):\n"
        "            t.check(case, given, precision)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(ops.__file__).parents[1])])
    process = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"DMFAST_CPU": isa, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    if "DMFAST_CPU" in process.stderr:
        pytest.skip(f"this CPU has no {isa}")
    assert process.returncode == 0, process.stderr


def test_is_torchs_batch_norm() -> None:
    """The reference and the operator, in float64."""
    case = Block(3, 16, (7, 9), images=4)
    x, conv_weight, weight, bias = tensors_of(case, torch.float64)
    z = F.conv2d(x, conv_weight, padding=1)
    expected = F.avg_pool2d(F.relu(F.batch_norm(z, None, None, weight, bias, True, 0, 1e-5)), 2)
    variance, mean = torch.var_mean(z, (0, 2, 3), correction=0)
    for function in (ops.conv_batch_norm_relu_pool, reference.conv_batch_norm_relu_pool):
        out, found = function(x, conv_weight, weight, bias)
        torch.testing.assert_close(out, expected, check_stride=False)
        torch.testing.assert_close(found, torch.stack([mean, variance]))


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
@pytest.mark.parametrize("channels", [3, 16])
def test_in_parts_it_is_the_same(channels: int, given: bool) -> None:
    """The statistics of parts merge to those of all; by given ones every image is for itself."""
    case = Block(channels, 32, (12, 12), images=9)
    x, conv_weight, weight, bias = tensors_of(case, torch.float32)
    whole, found = ops.conv_batch_norm_relu_pool(x, conv_weight, weight, bias)
    torch.testing.assert_close(
        ops.conv_batch_statistics(x, conv_weight), found, rtol=1e-6, atol=1e-7
    )
    parts = [
        ops.conv_batch_norm_relu_pool(part, conv_weight, weight, bias, statistics=found)[0]
        for part in x.split(4)
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_the_same_bits_on_any_number_of_threads() -> None:
    before = torch.get_num_threads()
    case = Block(16, 32, (12, 12), images=9)
    gradient = upstream(case, None, 0.0)
    made = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            tensors = tensors_of(case, torch.float32)
            made.append(everything(ops.conv_batch_norm_relu_pool, tensors, gradient, case, None))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*made, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_statistics_do_not_drown_in_the_mean(offset: float) -> None:
    """A channel whose mean is hundreds of times its spread."""
    x = randn(40, 1, 10, 10, seed=0) + offset
    conv_weight = torch.rand(16, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    _, found = ops.conv_batch_norm_relu_pool(x, conv_weight, padding=0)
    _, exact = reference.conv_batch_norm_relu_pool(x.double(), conv_weight.double(), padding=0)
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 16])
def test_constant_images_and_values_that_are_not_finite(channels: int) -> None:
    conv_weight = Block(channels, 16, (8, 8)).parameters()[0]
    constant = torch.ones(3, channels, 8, 8)
    out, found = ops.conv_batch_norm_relu_pool(constant, conv_weight, padding=0)
    assert out.isfinite().all()
    assert found[1].abs().max() < 1e-9
    for value in (float("nan"), float("inf")):
        x = randn(3, channels, 8, 8, seed=0)
        x[1, 0, 3, 3] = value
        out, found = ops.conv_batch_norm_relu_pool(x, conv_weight)
        expected, _ = reference.conv_batch_norm_relu_pool(x, conv_weight)
        assert torch.equal(out.isnan(), expected.isnan())
        assert found.isnan().any()


@pytest.mark.parametrize("given", [False, True], ids=["own", "given"])
def test_gradcheck(given: bool) -> None:
    case = Block(2, 3, (4, 5), images=3)
    statistics = statistics_of(case).double() if given else None
    tensors = [t.requires_grad_() for t in tensors_of(case, torch.float64) if t is not None]

    def function(*tensors: Tensor) -> Tensor:
        return ops.conv_batch_norm_relu_pool(*tensors, precision="direct", statistics=statistics)[0]

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def test_there_is_no_second_derivative() -> None:
    x = randn(2, 16, 8, 8, seed=0).requires_grad_()
    conv_weight = Block(16, 16, (8, 8)).parameters()[0]
    out, _ = ops.conv_batch_norm_relu_pool(x, conv_weight)
    (gradient,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"x": torch.zeros(0, 16, 8, 8)}, "no images to take statistics of"),
        ({"conv_weight": torch.zeros(2, 16, 16, 3, 3)}, r"conv_weight must have shape"),
        ({"statistics": torch.zeros(2, 15)}, r"statistics must have shape \[2, 16\]"),
        ({"statistics": torch.zeros(2, 16, dtype=torch.float64)}, "statistics must be"),
        ({"statistics": torch.zeros(2, 16, requires_grad=True)}, "statistics are constants"),
        ({"precision": "half"}, "precision must be"),
        ({"eps": -1.0}, "eps must be 0 or more"),
    ],
)
def test_wrong_arguments(change: dict[str, Any], named: str) -> None:
    arguments: dict[str, Any] = {
        "x": torch.zeros(2, 16, 8, 8),
        "conv_weight": torch.zeros(16, 16, 3, 3),
    }
    with pytest.raises(RuntimeError, match=f"conv_batch_norm_relu_pool: .*{named}"):
        ops.conv_batch_norm_relu_pool(**(arguments | change))


def test_without_images_by_given_statistics() -> None:
    x = torch.zeros(0, 16, 8, 8, requires_grad=True)
    conv_weight = torch.ones(16, 16, 3, 3, requires_grad=True)
    out, _ = ops.conv_batch_norm_relu_pool(x, conv_weight, statistics=torch.ones(2, 16))
    assert out.shape == (0, 16, 4, 4)
    out.sum().backward()
    assert x.grad is not None
    assert conv_weight.grad is not None
    assert not conv_weight.grad.any()
