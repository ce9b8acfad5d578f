# SPDX-License-Identifier: MIT
"""convnet_class_mean, against the reference."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from block_cases import assert_within, convnet_weights, cosine, opcheck_samples, rms
from cases import TABLES
from torch import Tensor

from dmfast import _convnet, ops, reference
from dmfast.networks import get_network


@dataclass(frozen=True)
class Pass:
    """A call of convnet_class_mean."""

    channels: int = 3
    size: tuple[int, int] = (16, 16)
    depth: int = 3
    filters: int = 16
    padding: int = 1
    offsets: tuple[int, ...] = (0, 2, 7, 8)
    source: str = "uint8"
    augmented: bool = True

    def arguments(self, dtype: torch.dtype = torch.float32) -> tuple[object, ...]:
        """All but the options; the weights in that dtype."""
        generator = torch.Generator().manual_seed(0)
        shape = (9, *self.size, self.channels)
        images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        if self.source == "float32":
            images = images / 255
        elif self.source == "synthetic":
            images = torch.randn(9, self.channels, *self.size, generator=generator)
            images = images.permute(0, 2, 3, 1)
        groups = len(self.offsets) - 1
        index = torch.randint(0, 9, (self.offsets[-1],), generator=generator)
        table = TABLES["each" if self.augmented else "identity"]
        params = table.repeat(groups, 1)[:groups].contiguous()
        mean, std = torch.linspace(0.4, 0.5, self.channels), torch.full((self.channels,), 0.25)
        weights = [w.to(dtype) for w in convnet_weights(self.channels, self.filters, self.depth)]
        return images, index, torch.tensor(self.offsets), params, mean, std, weights

    def __str__(self) -> str:
        size = "x".join(map(str, (self.channels, *self.size)))
        offsets = "_".join(map(str, self.offsets))
        return f"{size}-D{self.depth}W{self.filters}-padding{self.padding}-{offsets}-{self.source}"


PASSES = [
    Pass(),
    Pass(1, (28, 28), padding=3),
    Pass(depth=1),
    Pass(depth=2, source="float32"),
    Pass(depth=4, filters=32, source="synthetic"),
    Pass(1, (13, 10), depth=2, filters=32, augmented=False),
    Pass(4, (9, 12), depth=2, padding=0),
    Pass(filters=128, offsets=(0, 3, 6)),
    Pass(offsets=(0, 0, 5, 5, 5, 6, 6)),
    Pass(offsets=(0, 1)),
    Pass(offsets=tuple(range(0, 71, 10)), depth=2),
    Pass(offsets=(0, 0, 0)),
    Pass(offsets=(0,)),
    # Beyond the fused kernels: torch's layers.
    Pass(filters=10),
    Pass(5, depth=2),
    Pass(depth=1, padding=9),
]


def exact_and_plain(case: Pass) -> tuple[Tensor, Tensor]:
    exact, plain = (
        reference.convnet_class_mean(*case.arguments(dtype), padding=case.padding)
        if len(case.offsets) > 1
        else torch.zeros(0, 64, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    return exact, plain


@pytest.mark.parametrize("precision", [None, "float32", "direct"])
@pytest.mark.parametrize("case", PASSES, ids=str)
def test_matches_reference(case: Pass, precision: str | None) -> None:
    out = ops.convnet_class_mean(*case.arguments(), padding=case.padding, precision=precision)
    assert out.dtype == torch.float32
    assert not out.requires_grad
    exact, plain = exact_and_plain(case)
    # Every block's error passes through the next, so the bound is that of one block for all.
    assert_within(out, plain, exact, 2 if precision == "direct" else 10)
    empty = torch.tensor(case.offsets).diff() == 0
    assert not out[empty].any()


@pytest.mark.parametrize("case", PASSES, ids=str)
def test_bfloat16_matches_reference(case: Pass) -> None:
    """Beside the reference in float64 on weights that are rounded to bfloat16: what rounding one of
    the two operands costs."""
    arguments = case.arguments()
    out = ops.convnet_class_mean(*arguments, padding=case.padding, precision="bfloat16")
    exact, _ = exact_and_plain(case)
    if exact.numel() == 0:
        return
    *rest, weights = arguments
    rounded = [w.bfloat16().double() if w.dim() == 4 else w.double() for w in weights]
    from_rounded = reference.convnet_class_mean(*rest, rounded, padding=case.padding)
    assert_within(out, from_rounded, exact, 10)
    if rms(exact):
        assert cosine(out, exact) > 0.99


def test_is_the_mean_of_the_networks_embeddings() -> None:
    network = get_network("ConvNetW16", 3, 10, (16, 16), seed=1)
    *rest, _ = Pass().arguments()
    images, index, offsets, params, mean, std = rest
    weights = []
    for layer in network.features:
        weights += [layer.weight] if isinstance(layer, torch.nn.Conv2d) else []
        weights += [*layer.parameters()] if isinstance(layer, torch.nn.GroupNorm) else []
    with torch.no_grad():
        out = ops.convnet_class_mean(*rest, weights)
        x = ops.gather_augment(images, index, params, mean, std, torch.float32, offsets)
        embedded = network.embed(x)
    expected = torch.stack([embedded[a:b].mean(0) for a, b in ((0, 2), (2, 7), (7, 8))])
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "direct"])
def test_bits_do_not_depend_on_the_number_of_threads(precision: str) -> None:
    arguments = Pass(offsets=(0, 31, 32, 90)).arguments()
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(ops.convnet_class_mean(*arguments, precision=precision))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("step", [1, 3, 8])
def test_slices_of_the_layers_add_up(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Pass(offsets=(0, 0, 5, 6, 17, 17))
    monkeypatch.setattr(_convnet, "_ELEMENTS_OF_A_SLICE", step * 16 * 16 * case.filters)
    out = ops.convnet_class_mean(*case.arguments(), precision="direct")
    exact, _ = exact_and_plain(case)
    assert rms(out - exact) < 1e-6 * rms(exact)


@pytest.mark.parametrize("precision", [None, "direct"])
def test_autocast_leaves_it_alone(precision: str | None) -> None:
    arguments = Pass().arguments()
    expected = ops.convnet_class_mean(*arguments, precision=precision)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.convnet_class_mean(*arguments, precision=precision), expected)


@pytest.mark.parametrize("precision", [None, "direct"])
def test_a_spoilt_image_spoils_its_group_only(precision: str | None) -> None:
    case = Pass(source="float32", augmented=False)
    images, index, *rest = case.arguments()
    index = torch.arange(8)
    images[3, 4, 5, 1] = torch.nan
    out = ops.convnet_class_mean(images, index, *rest, precision=precision)
    plain = reference.convnet_class_mean(images, index, *rest)
    assert torch.equal(out.isnan(), plain.isnan())
    assert out[1].isnan().all()
    assert not out[[0, 2]].isnan().any()


def test_opcheck() -> None:
    operator, arguments = opcheck_samples()["convnet"]
    torch.library.opcheck(operator, arguments())


def test_a_gradient_is_refused_and_no_grad_named() -> None:
    *rest, weights = Pass().arguments()
    weights[3].requires_grad_()
    with pytest.raises(ValueError, match=r"convnet_class_mean: weights\[3\] must not .*no_grad"):
        ops.convnet_class_mean(*rest, weights)
    with torch.no_grad():
        assert not ops.convnet_class_mean(*rest, weights).requires_grad


# ---- bad input ---------------------------------------------------------------------------------


def changed(position: int, change) -> tuple[object, ...]:
    arguments = [*Pass().arguments()]
    arguments[position] = change(arguments[position])
    return tuple(arguments)


def replaced(weights: list[Tensor], position: int, weight: Tensor) -> list[Tensor]:
    return [*weights[:position], weight, *weights[position + 1 :]]


def with_value(tensor: Tensor, position: object, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


BAD = {
    "images": (0, lambda i: i[0], "images must have shape [images, height, width, channels], got "),
    "images dtype": (0, lambda i: i.double(), "images must be uint8 or float32, got float64"),
    "no images": (0, lambda i: i[:0], "images must not be empty where an index is given"),
    "small images": (
        0,
        lambda i: i[:, :4, :6].contiguous(),
        "images must leave 2x2 pixels for each block to pool, got 4x6, which leaves 1x1 in block 3",
    ),
    "index": (1, lambda i: i.view(2, 4), "index must have shape [N], got [2, 4]"),
    "index dtype": (1, lambda i: i.int(), "index must be int64, got int32"),
    "strided index": (1, lambda i: i.repeat(2)[::2], "index must be contiguous"),
    "large index": (
        1,
        lambda i: with_value(i, 5, 9),
        "index must be from 0 to 8, got 9 at position 5",
    ),
    "negative index": (
        1,
        lambda i: with_value(i, 2, -1),
        "index must be from 0 to 8, got -1 at position 2",
    ),
    "offsets": (
        2,
        lambda _: torch.tensor([0, 8]),
        "offsets must have 4 elements (groups + 1), got 2",
    ),
    "offsets dtype": (2, lambda o: o.int(), "offsets must be int64, got int32"),
    "offsets rank": (2, lambda o: o[None], "offsets must have shape [groups + 1], got [1, 4]"),
    "start": (2, lambda o: with_value(o, 0, 1), "offsets must start at 0, got 1"),
    "end": (2, lambda o: with_value(o, 3, 7), "offsets must end at the number of rows 8, got 7"),
    "descending": (
        2,
        lambda o: with_value(o, 1, 8),
        "offsets must ascend, got 8 before 7 at position 1",
    ),
    "params": (3, lambda p: p[:, :12].contiguous(), "params must have 13 columns, got 12"),
    "params rank": (3, lambda p: p[0], "params must have shape [groups, 13], got [13]"),
    "params dtype": (3, lambda p: p.double(), "params must be float32, got float64"),
    "NaN": (
        3,
        lambda p: with_value(p, (1, 4), torch.nan),
        "params must not hold NaN, got one in row 1, column 4",
    ),
    "mean": (4, lambda m: m[:2], "mean must have one element a channel (3), got [2]"),
    "std dtype": (5, lambda s: s.double(), "std must be float32, got float64"),
    "no weights": (
        6,
        lambda w: [],
        "weights must have 3 tensors a block (convolution, norm weight, norm bias), got 0",
    ),
    "weights": (
        6,
        lambda w: w[:5],
        "weights must have 3 tensors a block (convolution, norm weight, norm bias), got 5",
    ),
    "filters": (
        6,
        lambda w: replaced(w, 3, torch.zeros(16, 3, 3, 3)),
        "weights[3] must have shape [filters, 16, 3, 3], got [16, 3, 3, 3]",
    ),
    "norm weight": (
        6,
        lambda w: replaced(w, 4, torch.zeros(1, 16)),
        "weights[4] must have shape [16], got [1, 16]",
    ),
    "weights dtype": (
        6,
        lambda w: replaced(w, 8, w[8].double()),
        "weights[8] must be float32, got float64",
    ),
    "devices": (
        6,
        lambda w: replaced(w, 0, w[0].to("meta")),
        "weights[0] is on meta, but images is on cpu; move it",
    ),
}


@pytest.mark.parametrize("precision", [None, "direct"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str, precision: str | None) -> None:
    position, change, message = BAD[name]
    arguments = changed(position, change)
    with pytest.raises(RuntimeError, match=f"^convnet_class_mean: {re.escape(message)}"):
        ops.convnet_class_mean(*arguments, precision=precision)


def test_bad_options_are_named() -> None:
    arguments = Pass().arguments()
    for options, message in (
        ({"precision": "fast"}, "precision must be 'direct', 'float32', 'bfloat16' or None, got"),
        ({"padding": -1}, "padding must be 0 or more, got -1"),
        ({"padding": 2**21}, "padding must be at most 2**20, got 2097152"),
        ({"eps": -1.0}, "eps must be 0 or more, got -1.0"),
    ):
        with pytest.raises(RuntimeError, match=f"^convnet_class_mean: {re.escape(message)}"):
            ops.convnet_class_mean(*arguments, **options)
