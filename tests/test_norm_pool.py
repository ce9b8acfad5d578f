# SPDX-License-Identifier: MIT
"""instance_norm_relu_pool, against the reference."""

from __future__ import annotations

import re

import pytest
import torch
from block_cases import opcheck_samples, per_image, randn
from cases import LAYOUTS, lay_out
from test_ops import DTYPES, assert_as_exact
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional as F

from dmfast import ops, reference

Shape = tuple[int, int, int, int]

SHAPES: list[Shape] = [
    (2, 3, 8, 8),
    (7, 16, 5, 7),
    (6, 128, 4, 6),
    (3, 130, 4, 2),
    (2, 300, 3, 2),
    (1, 1, 2, 2),
    (2, 2, 33, 40),
    (0, 4, 6, 6),
]


def inputs(
    shape: Shape, layout: str = "contiguous", networks: int | None = None, affine: str = "both"
) -> list[Tensor | None]:
    channels = shape[1]
    axis = (channels,) if networks is None else (networks, channels)
    return [
        lay_out(randn(*shape, seed=0), layout),
        1 + 0.3 * randn(*axis, seed=1) if affine in ("both", "weight") else None,
        0.3 * randn(*axis, seed=2) if affine in ("both", "bias") else None,
    ]


def away_from_zero(tensors: list[Tensor | None]) -> Tensor:
    """A gradient that is zero where rounding decides whether ReLU lets it pass."""
    x, weight, bias = (None if t is None else t.double() for t in tensors)
    y = F.group_norm(x, x.shape[1], eps=1e-5)
    y = per_image(y, weight, 1) * y + per_image(y, bias, 0)
    near = F.max_pool2d((y.abs() < 1e-4).double(), 2)
    n, channels, height, width = x.shape
    return randn(n, channels, height // 2, width // 2, seed=3) * (near == 0)


def check(tensors: list[Tensor | None], dtype: torch.dtype) -> None:
    tensors = [None if t is None else t.to(dtype) for t in tensors]
    gradient = away_from_zero(tensors).to(dtype)
    results = []
    for function, of_dtype in (
        (ops.instance_norm_relu_pool, dtype),
        (reference.instance_norm_relu_pool, dtype),
        (reference.instance_norm_relu_pool, torch.float64),
    ):
        leaves = [None if t is None else t.to(of_dtype).detach().requires_grad_() for t in tensors]
        out = function(*leaves)
        wanted = [t for t in leaves if t is not None]
        results.append([out, *torch.autograd.grad(out, wanted, gradient.to(of_dtype))])
    for actual, plain, exact in zip(*results, strict=True):
        assert actual.dtype == dtype
        if dtype == torch.float64:  # torch's own rounding is then as large as ours
            largest = exact.abs().max().item() if exact.numel() else 0.0
            torch.testing.assert_close(actual, exact, rtol=0, atol=1e-13 * max(largest, 1))
        else:
            assert_as_exact(actual.detach(), plain.detach(), exact.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_reference(shape: Shape, layout: str, dtype: torch.dtype) -> None:
    check(inputs(shape, layout), dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("affine", ["none", "weight", "bias", "both"])
@pytest.mark.parametrize("networks", [None, 1, 3])
def test_parameters_of_networks(networks: int | None, affine: str, layout: str) -> None:
    for dtype in DTYPES:
        check(inputs((6, 5, 5, 6), layout, networks, affine), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_float32_parameters_of_narrow_images(dtype: torch.dtype) -> None:
    x, weight, bias = inputs((4, 3, 6, 6))
    leaves = [t.requires_grad_() for t in (x.to(dtype), weight, bias)]
    out = ops.instance_norm_relu_pool(*leaves)
    assert out.dtype == dtype
    gradients = torch.autograd.grad(out.sum(), leaves)
    assert [g.dtype for g in gradients] == [dtype, torch.float32, torch.float32]
    exact = reference.instance_norm_relu_pool(*(t.double() for t in leaves))
    assert (out - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("affine", "networks", "layout"),
    [
        ("both", None, "contiguous"),
        ("both", 2, "channels_last"),
        ("none", None, "sliced"),
        ("weight", 2, "contiguous"),
        ("bias", None, "channels_last"),
        ("bias", 2, "contiguous"),
    ],
)
def test_gradcheck(affine: str, networks: int | None, layout: str) -> None:
    x, *parameters = inputs((2, 2, 3, 4), layout, networks, affine)
    tensors = [t.double().requires_grad_() for t in (x, *parameters) if t is not None]

    def function(x: Tensor, *given: Tensor) -> Tensor:
        given = iter(given)
        chosen = [None if p is None else next(given) for p in parameters]
        return ops.instance_norm_relu_pool(x, *chosen)

    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors)


def test_third_derivative_is_that_of_the_layers() -> None:
    def third(function) -> Tensor:
        x = randn(2, 2, 4, 4, seed=0).double().requires_grad_()
        gradient = function(x).square().sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(gradient.sin().sum(), x, create_graph=True)
        return gradient

    torch.testing.assert_close(
        third(ops.instance_norm_relu_pool), third(reference.instance_norm_relu_pool)
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_kept(layout: str) -> None:
    x, weight, bias = inputs((2, 3, 6, 5), layout)
    out = ops.instance_norm_relu_pool(x.requires_grad_(), weight, bias)
    out.sum().backward()
    for result in (out, torch.ops.dmfast.instance_norm_relu_pool(x, weight, bias, 1e-5)[0]):
        channels_last = result.is_contiguous(memory_format=torch.channels_last)
        assert channels_last == (layout == "channels_last")
        assert result.is_contiguous() != channels_last


@pytest.mark.parametrize("layout", LAYOUTS)
def test_large_means_do_not_cancel(layout: str) -> None:
    spread = randn(3, 5, 16, 16, seed=0)
    x = lay_out(1000 + 0.01 * spread, layout)
    out = ops.instance_norm_relu_pool(x)
    exact = reference.instance_norm_relu_pool(x.double())
    plain = reference.instance_norm_relu_pool(x)
    assert_as_exact(out, plain, exact)
    # The mean in float32 is itself 2^-15 or less off, which is 0.003 of the spread.
    assert (out - exact).abs().max() <= 2.0**-15 / 0.01


@pytest.mark.parametrize("layout", LAYOUTS)
def test_constant_images_become_the_bias(layout: str) -> None:
    x = lay_out(torch.tensor([1000.1, -0.3, 0.0]).view(1, 3, 1, 1).expand(2, 3, 7, 5), layout)
    bias = torch.tensor([0.5, -0.5, 0.0])
    out = ops.instance_norm_relu_pool(x.clone(), torch.ones(3), bias)
    # What the mean's rounding leaves is magnified by 1 / sqrt(eps).
    slack = torch.tensor([2.0**-14, 2.0**-25, 0]) / 1e-5**0.5
    expected = bias.relu().view(1, 3, 1, 1).expand_as(out)
    assert ((out - expected).abs() <= slack.view(1, 3, 1, 1)).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_comes_out_where_torch_has_it(layout: str, value: float) -> None:
    x, weight, bias = inputs((3, 4, 6, 5), layout)
    x[1, 2, 3, 4] = value
    weight[0] = torch.nan
    bias[3] = value
    gradient = randn(3, 4, 3, 2, seed=5)
    results = []
    for function in (ops.instance_norm_relu_pool, reference.instance_norm_relu_pool):
        leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
        out = function(*leaves)
        results.append([out, *torch.autograd.grad(out, leaves, gradient)])
    for actual, plain in zip(*results, strict=True):
        assert torch.equal(actual.isnan(), plain.isnan())
        assert torch.equal(actual.isinf(), plain.isinf())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("networks", [None, 3])
def test_bits_depend_on_nothing_else(layout: str, networks: int | None) -> None:
    """Neither on the number of threads nor, for an image, on the others of its batch."""
    tensors = inputs((60, 32, 15, 16), layout, networks)
    leaves = [t.requires_grad_() for t in tensors]
    gradient = randn(60, 32, 7, 8, seed=3)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            out = ops.instance_norm_relu_pool(*leaves)
            results.append([out, *torch.autograd.grad(out, leaves, gradient)])
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)
    x, weight, bias = leaves
    for i in (0, 31):
        row = [p if networks is None else p[i * networks // 60] for p in (weight, bias)]
        alone = x[i : i + 1].detach().requires_grad_()
        out = ops.instance_norm_relu_pool(alone, *row)
        assert torch.equal(out, results[0][0][i : i + 1])
        (of_x,) = torch.autograd.grad(out, alone, gradient[i : i + 1])
        assert torch.equal(of_x, results[0][1][i : i + 1])


def test_autocast_leaves_it_alone() -> None:
    x = randn(2, 3, 4, 4, seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.instance_norm_relu_pool(x).dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layers_on_another_device_have_the_layout(layout: str) -> None:
    x, weight, bias = inputs((4, 3, 6, 5), layout, networks=2)
    here = ops.instance_norm_relu_pool(x, weight, bias)
    there = ops.instance_norm_relu_pool(*(t.to("meta") for t in (x, weight, bias)))
    assert there.device.type == "meta"
    assert (there.shape, there.stride()) == (here.shape, here.stride())


@pytest.mark.parametrize("name", [n for n in opcheck_samples() if n.startswith("norm")])
def test_opcheck(name: str) -> None:
    operator, arguments = opcheck_samples()[name]
    torch.library.opcheck(operator, arguments())


X = torch.zeros(4, 3, 8, 8)
BAD = {
    "rank": (
        lambda: (X[0],),
        "x must have shape [images, channels, height, width], got [3, 8, 8]",
    ),
    "dtype": (lambda: (X.long(),), "x must be float64, float32, float16 or bfloat16, got int64"),
    "channels": (lambda: (X[:, :0],), "x must have channels, got [4, 0, 8, 8]"),
    "memory": (
        lambda: (X[:1].expand(2**40, -1, -1, -1),),
        "no memory for a tensor of shape [1099511627776, 3, 8, 8]",
    ),
    "size": (
        lambda: (X[:, :, :1],),
        "x must be at least 2 pixels high and wide, got [4, 3, 1, 8]",
    ),
    "weight": (
        lambda: (X, torch.ones(4)),
        "weight must have shape [3] or [networks, 3], got [4]",
    ),
    "bias": (
        lambda: (X, None, torch.ones(1, 1, 3)),
        "bias must have shape [3] or [networks, 3], got [1, 1, 3]",
    ),
    "weight dtype": (
        lambda: (X, torch.ones(3).double()),
        "weight must be float32, got float64",
    ),
    "narrow weight": (
        lambda: (X.half(), torch.ones(3).bfloat16()),
        "weight must be float16 or float32, got bfloat16",
    ),
    "networks": (
        lambda: (X, torch.ones(3, 3)),
        "the 4 images of x must divide evenly into the 3 networks",
    ),
    "no networks": (
        lambda: (X[:0], torch.ones(0, 3)),
        "the 0 images of x must divide evenly into the 0 networks",
    ),
    "shapes": (
        lambda: (X, torch.ones(3), torch.ones(2, 3)),
        "weight and bias must have one shape, got [3] and [2, 3]",
    ),
    "eps": (lambda: (X, None, None, -1e-5), "eps must be 0 or more, got -1e-05"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    """By the wrapper, and by the operator itself, in the same words."""
    arguments, message = BAD[name]
    x, weight, bias, eps = (*arguments(), *(None, None, 1e-5)[len(arguments()) - 1 :])
    message = f"^instance_norm_relu_pool: {re.escape(message)}$"
    with pytest.raises(RuntimeError, match=message):
        ops.instance_norm_relu_pool(x, weight, bias, eps)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.dmfast.instance_norm_relu_pool(x, weight, bias, eps)


def test_devices_are_named() -> None:
    with pytest.raises(RuntimeError, match=r"^instance_norm_relu_pool: weight is on meta, but x "):
        ops.instance_norm_relu_pool(X, torch.ones(3, device="meta"))


BAD_BACKWARD = {
    "gradient": (
        0,
        X[:, :, :3, :4],
        "gradient must have the shape of the output, got [4, 3, 3, 4]",
    ),
    "gradient dtype": (0, X[:, :, :4, :4].double(), "gradient must be float32, got float64"),
    "statistics": (
        4,
        torch.zeros(4, 3, 2),
        "statistics must have shape [images, 2, channels], got [4, 3, 2]",
    ),
    "statistics dtype": (
        4,
        torch.zeros(4, 2, 3).double(),
        "statistics must be float32, got float64",
    ),
    "wanted": (6, [True], "wanted must have 3 elements, got 1"),
}


@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_bad_input_of_the_backward_is_named(name: str) -> None:
    position, value, message = BAD_BACKWARD[name]
    arguments = [X[:, :, :4, :4], X, None, None, torch.zeros(4, 2, 3), 1e-5, [True] * 3]
    arguments[position] = value
    with pytest.raises(
        RuntimeError, match=f"^instance_norm_relu_pool_backward: {re.escape(message)}$"
    ):
        torch.ops.dmfast._instance_norm_relu_pool_backward(*arguments)
