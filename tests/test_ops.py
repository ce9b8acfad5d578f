# SPDX-License-Identifier: MIT
"""The operators that work on images and embeddings, against the reference."""

from __future__ import annotations

import re

import block_cases
import pytest
import torch
from cases import CASES, LAYOUTS, TABLES, Case, lay_out, rows
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from dmfast import _load, ops, reference

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def assert_as_exact(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """At most twice the error of plain torch in the same dtype, beside the dtype's own rounding.

    Against float64 itself, where plain torch is the truth, the rounding of a sampling coordinate
    counts: it grows with the image's side.
    """
    largest = exact.abs().max() if exact.numel() else torch.tensor(0.0)
    steps = 4 + (max(exact.shape[2:]) if actual.dtype == torch.float64 and exact.ndim == 4 else 0)
    floor = steps * torch.finfo(actual.dtype).eps * largest
    error, plain_error = (actual.double() - exact).abs(), (plain.double() - exact).abs()
    assert error.shape == plain_error.shape
    if error.numel():
        assert error.max() <= 2 * plain_error.max() + floor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_siamese_augment_matches_reference(case: Case, dtype: torch.dtype) -> None:
    x = case.images(dtype)
    out = ops.siamese_augment(x, case.params, case.offsets_tensor)
    assert (out.shape, out.dtype) == (x.shape, x.dtype)
    plain = reference.siamese_augment(x, case.params, case.offsets_tensor)
    exact = reference.siamese_augment(x.double(), case.params, case.offsets_tensor)
    assert_as_exact(out, plain, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_siamese_augment_gradient_matches_reference(case: Case, dtype: torch.dtype) -> None:
    def gradient(function, x: Tensor, weight: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        (function(x, case.params, case.offsets_tensor) * weight).sum().backward()
        return x.grad

    x, weight = case.images(dtype), case.images(dtype, seed=1)
    exact = gradient(reference.siamese_augment, x.double(), weight.double())
    plain = gradient(reference.siamese_augment, x, weight)
    assert_as_exact(gradient(ops.siamese_augment, x, weight), plain, exact)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("table", [name for name in TABLES if name != "extreme"])
def test_siamese_augment_gradcheck(table: str, layout: str) -> None:
    params = TABLES[table]
    case = Case(table, (len(params), 2, 5, 4), layout)
    x = case.images(torch.float64).requires_grad_()
    assert gradcheck(ops.siamese_augment, (x, params))
    assert gradgradcheck(ops.siamese_augment, (x, params))


def test_backward_is_the_exact_adjoint() -> None:
    """<A x, y> = <x, A' y> to the last few bits, for maps that shrink, turn and cannot be inverted:
    no sample is lost at the edge of the candidates that are gathered."""
    generator = torch.Generator().manual_seed(0)
    table = rows(
        *(
            {"scale_x": sx, "scale_y": sy, "angle": angle}
            for sx in (0.0, 0.05, 0.9, 1.2, 3.0, -1.0)
            for sy in (0.0, 0.83, 1.1)
            for angle in (0.0, 0.1, 0.7853981633974483, 1.5707963267948966, 2.9)
        )
    )
    for height, width in ((7, 7), (6, 11), (16, 3)):
        shape = (len(table), 1, height, width)
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        y = torch.randn(shape, generator=generator, dtype=torch.float64)
        forward = (ops.siamese_augment(x, table) * y).sum((1, 2, 3))
        back = (torch.ops.dmfast._siamese_augment_backward(y, table, None) * x).sum((1, 2, 3))
        torch.testing.assert_close(forward, back, rtol=1e-12, atol=1e-12)


def test_infinities_stay_where_they_are() -> None:
    x = torch.zeros(1, 1, 5, 5)
    x[..., 2] = torch.inf
    out = ops.siamese_augment(x, rows({"scale_y": 1.1}))
    assert torch.equal(out.isinf(), x.isinf())
    assert not out.isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_identity_changes_no_bit(dtype: torch.dtype) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1.5, 6e-8]).to(dtype)
    x = x.view(1, 1, 2, 3)
    out = ops.siamese_augment(x, TABLES["identity"])
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    assert torch.equal(out.view(bits), x.view(bits))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_is_kept(layout: str) -> None:
    x = Case("all", (2, 3, 6, 5), layout).images(torch.float32)
    out = ops.siamese_augment(x, TABLES["all"])
    channels_last = layout == "channels_last"
    assert out.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert out.is_contiguous() != channels_last


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    x = torch.randn(64, 3, 32, 32)
    real = torch.randn(300, 1500)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            loss = ops.class_mean_discrepancy(real, real[:30], 10)
            results.append((ops.siamese_augment(x, TABLES["all"]), loss))
    finally:
        torch.set_num_threads(threads)
    (first, first_loss), (second, second_loss) = results
    assert torch.equal(first, second)
    assert torch.equal(first_loss, second_loss)


# ---- gather_augment ----------------------------------------------------------------------------

MEAN, STD = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.20, 0.21, 0.22])


def gather_arguments(images: Tensor, dtype: torch.dtype) -> tuple[object, ...]:
    index = torch.tensor([4, 0, 4, 2, 1, 3, 0])
    return images, index, TABLES["each"], MEAN, STD, dtype, torch.tensor([0, 2, 2, 3, 5, 6, 7])


SOURCES = ("uint8", "float32", "synthetic", "sliced")


def stored_images(source: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (5, 8, 9, 3), generator=generator, dtype=torch.uint8)
    if source == "float32":
        images = images / 255
    elif source == "synthetic":
        images = torch.randn(5, 3, 8, 9, generator=generator).permute(0, 2, 3, 1)
    elif source == "sliced":
        images = images[:, ::2, 1:, :]
    return images


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("source", SOURCES)
def test_gather_augment_matches_reference(source: str, dtype: torch.dtype) -> None:
    arguments = gather_arguments(stored_images(source), dtype)
    out = ops.gather_augment(*arguments)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    exact = reference.gather_augment(*gather_arguments(stored_images(source), torch.float64))
    assert_as_exact(out, reference.gather_augment(*arguments), exact)


def test_gather_augment_without_augmentation_is_the_plain_normalisation() -> None:
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    out = ops.gather_augment(
        images, torch.tensor([1]), TABLES["identity"], MEAN, STD, torch.float32
    )
    plain = ((images[1].float() / 255 - MEAN) / STD).permute(2, 0, 1)
    assert torch.equal(out[0], plain)


def test_gather_augment_refuses_a_gradient() -> None:
    images = torch.zeros(2, 4, 4, 3, requires_grad=True)
    with pytest.raises(ValueError, match=r"gather_augment: images must not .*siamese_augment"):
        ops.gather_augment(images, torch.tensor([0]), TABLES["all"], MEAN, STD, torch.float32)


# ---- class_mean_discrepancy --------------------------------------------------------------------

SIDES = {
    "even": (12, None, 6, None),
    "offsets": (13, (0, 1, 9, 13), 5, (0, 2, 3, 5)),
    "empty_class": (7, (0, 4, 4, 7), 4, (0, 2, 2, 4)),
}


def sides(name: str, dtype: torch.dtype, features: int = 37) -> tuple[object, ...]:
    n, real_offsets, m, syn_offsets = SIDES[name]
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(n, features, generator=generator).to(dtype)
    syn = torch.randn(m, features, generator=generator).to(dtype)
    as_tensor = [None if o is None else torch.tensor(o) for o in (real_offsets, syn_offsets)]
    return real, syn, 3, *as_tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIDES)
def test_class_mean_discrepancy_matches_reference(name: str, dtype: torch.dtype) -> None:
    def loss_and_gradients(function, real, syn, *rest):
        real, syn = real.detach().requires_grad_(), syn.detach().requires_grad_()
        loss = function(real, syn, *rest)
        return loss, *torch.autograd.grad(loss, (real, syn))

    real, syn, *rest = sides(name, dtype, features=700)
    loss, *gradients = loss_and_gradients(ops.class_mean_discrepancy, real, syn, *rest)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    plain, *plain_gradients = loss_and_gradients(reference.class_mean_discrepancy, real, syn, *rest)
    exact, *exact_gradients = loss_and_gradients(
        reference.class_mean_discrepancy, real.double(), syn.double(), *rest
    )
    assert_as_exact(loss.detach(), plain.detach(), exact.detach())
    for actual, ours, truth in zip(gradients, plain_gradients, exact_gradients, strict=True):
        assert actual.dtype == dtype
        assert_as_exact(actual, ours, truth)


def test_class_mean_discrepancy_of_float64_and_float32_is_accumulated_in_float64() -> None:
    real, syn = torch.randn(5000, 8) + 100, torch.randn(50, 8, dtype=torch.float64)
    exact = reference.class_mean_discrepancy(real.double(), syn, 1)
    torch.testing.assert_close(ops.class_mean_discrepancy(real, syn, 1), exact, rtol=1e-12, atol=0)


def test_class_mean_discrepancy_of_mixed_dtypes() -> None:
    real, syn, *rest = sides("offsets", torch.float32)
    mixed = ops.class_mean_discrepancy(real.bfloat16(), syn.requires_grad_(), *rest)
    mixed.backward()
    exact = reference.class_mean_discrepancy(real.bfloat16().double(), syn.double(), *rest)
    assert mixed.dtype == torch.float32
    torch.testing.assert_close(mixed.double(), exact)
    assert syn.grad.dtype == torch.float32


ROW_LAYOUTS = {
    "contiguous": lambda rows: rows,
    "transposed": lambda rows: rows.T.contiguous().T,
    "sliced": lambda rows: torch.stack([rows, rows], 1)[:, 1],
    "strided": lambda rows: torch.stack([rows, rows], 2)[..., 1],
}


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
def test_class_mean_discrepancy_takes_any_layout(layout: str) -> None:
    real, syn, *rest = sides("offsets", torch.float32)
    expected = ops.class_mean_discrepancy(real, syn, *rest)
    far_real, far_syn = (ROW_LAYOUTS[layout](side) for side in (real, syn))
    assert torch.equal(ops.class_mean_discrepancy(far_real, far_syn, *rest), expected)


@pytest.mark.parametrize("layout", ROW_LAYOUTS)
@pytest.mark.parametrize("name", SIDES)
def test_class_mean_discrepancy_gradcheck(name: str, layout: str) -> None:
    real, syn, *rest = sides(name, torch.float64, features=3)

    def function(real: Tensor, syn: Tensor) -> Tensor:
        return ops.class_mean_discrepancy(real, syn, *rest)

    inputs = [ROW_LAYOUTS[layout](side).requires_grad_() for side in (real, syn)]
    assert gradcheck(function, inputs)
    assert gradgradcheck(function, inputs)


def test_operators_of_the_backward_gradcheck() -> None:
    """Each is differentiable by itself, not only as a part of what it is the backward of."""
    op = torch.ops.dmfast
    rows, offsets = torch.randn(7, 3, dtype=torch.float64), torch.tensor([0, 4, 4, 7])
    means = torch.randn(3, 3, dtype=torch.float64)
    images = torch.randn(7, 2, 4, 5, dtype=torch.float64)
    each = Case("each", (7, 2, 4, 5), offsets=(0, 2, 2, 3, 5, 6, 7))
    for function, x in (
        (lambda x: op._class_mean(x, 3, offsets), rows),
        (lambda x: op._class_mean_backward(x, 7, offsets, torch.float64), means),
        (lambda x: op._siamese_augment_backward(x, each.params, each.offsets_tensor), images),
        (lambda x: ops.siamese_augment(x, each.params, each.offsets_tensor), images),
    ):
        assert gradcheck(function, x.requires_grad_())
        assert gradgradcheck(function, x)


def test_any_number_of_classes_without_features_takes_no_time() -> None:
    assert ops.class_mean_discrepancy(torch.zeros(0, 0), torch.zeros(0, 0), 2**62) == 0


def test_class_mean_discrepancy_without_classes_is_zero() -> None:
    assert ops.class_mean_discrepancy(torch.zeros(0, 4), torch.zeros(0, 4), 0) == 0


# ---- opcheck: schema, fake, autograd -----------------------------------------------------------


def opcheck_samples() -> dict[str, tuple[object, tuple[object, ...]]]:
    op = torch.ops.dmfast
    samples: dict[str, tuple[object, tuple[object, ...]]] = {}
    for layout in LAYOUTS:
        for count in (0, 1, 6):
            table = TABLES["each" if count else "all"][: count or None]
            x = lay_out(torch.randn(count, 3, 5, 6), layout if count else "contiguous")
            name = f"{layout}-{count}"
            samples[f"augment-{name}"] = op.siamese_augment, (x.requires_grad_(), table, None)
            samples[f"augment_backward-{name}"] = (
                op._siamese_augment_backward,
                (x.clone().requires_grad_(), table, None),
            )
    for source in SOURCES:
        arguments = gather_arguments(stored_images(source), torch.bfloat16)
        samples[f"gather-{source}"] = op.gather_augment, arguments
    for layout, lay_rows in ROW_LAYOUTS.items():
        real, syn, _, *offsets = sides("offsets", torch.float32)
        real, syn = lay_rows(real).requires_grad_(), lay_rows(syn).requires_grad_()
        samples[f"discrepancy-{layout}"] = op.class_mean_discrepancy, (real, syn, 3, *offsets)
        samples[f"class_mean-{layout}"] = op._class_mean, (real, 3, offsets[0])
        gradient = lay_rows(torch.randn(3, 4)).requires_grad_()
        samples[f"class_mean_backward-{layout}"] = (
            op._class_mean_backward,
            (gradient, 13, offsets[0], torch.float32),
        )
    strength = [1.0, 2.0, 0.5, 0.125, 0.5, 0.5, 1.2, 15.0]
    step = torch.tensor([7])
    samples["draw_augmentation"] = (
        op.draw_augmentation_,
        (torch.zeros(6, 13), [0, 4], False, 3, 2, 8, 8, strength, 0, 0, step, 0, 2),
    )
    offsets = torch.tensor([0, 2, 5])
    samples["draw_batch"] = (
        op.draw_batch,
        (torch.arange(9), torch.tensor([0, 4, 9]), offsets, 5, 0, 1, None, 0, 1),
    )
    for layout in LAYOUTS:
        tensors = [lay_out(torch.zeros(2, 3, 3, 3), layout), torch.zeros(2, 5)]
        samples[f"draw_weights-{layout}"] = (
            op.draw_weights_,
            (tensors, [0.1, 0.2], 0, 1, None, 2, 0, 3),
        )
    return samples


@pytest.mark.parametrize("name", opcheck_samples())
def test_opcheck(name: str) -> None:
    operator, arguments = opcheck_samples()[name]
    torch.library.opcheck(operator, arguments)


def test_every_operator_is_opchecked() -> None:
    samples = [*opcheck_samples().values(), *block_cases.opcheck_samples().values()]
    checked = {operator._qualified_op_name for operator, _ in samples}
    schemas = torch._C._jit_get_all_schemas()
    ours = {s.name for s in schemas if s.name.startswith("dmfast::")}
    without_tensors = {
        *("_cpu_kernels", "_multiply_adds", "_cuda_architectures", "_fused_block_takes"),
    }
    gpu_only = {"_fused_block", "_fused_block_backward", "_fused_block_pack"}
    assert checked == ours - {f"dmfast::{name}" for name in without_tensors | gpu_only}


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic: bool) -> None:
    images = torch.randint(0, 256, (30, 8, 8, 3), dtype=torch.uint8)
    order, offsets = torch.arange(30), torch.tensor([0, 10, 20, 30])
    batch = torch.tensor([0, 4, 8, 12])
    weight = torch.empty(5, 3, 3, 3)

    def step(syn: Tensor, counter: Tensor) -> Tensor:
        ops.draw_weights_([weight], [0.2], 0, counter, stream=3)
        index = ops.draw_batch(order, offsets, batch, 12, 0, counter, stream=1)
        table = ops.draw_augmentation("color_rotate", 3, (8, 8), 0, counter, stream=2)
        real = ops.gather_augment(images, index, table, MEAN, STD, torch.float32)
        of_real = torch.nn.functional.conv2d(real, weight).flatten(1)
        of_syn = torch.nn.functional.conv2d(ops.siamese_augment(syn, table), weight).flatten(1)
        return ops.class_mean_discrepancy(of_real, of_syn, 3)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    syn = torch.randn(6, 3, 8, 8, requires_grad=True)
    for counter in (torch.tensor([0]), torch.tensor([5])):
        expected = torch.autograd.grad(step(syn, counter), syn)[0]
        torch.testing.assert_close(torch.autograd.grad(compiled(syn, counter), syn)[0], expected)


# ---- bad input ---------------------------------------------------------------------------------

X, ROW = torch.zeros(4, 3, 8, 8), TABLES["all"]
NAN_ROW = rows({"angle": torch.nan})
BAD = {
    "rank": (
        lambda: ops.siamese_augment(X[0], ROW),
        "siamese_augment: x must have shape [images, channels, height, width], got [3, 8, 8]",
    ),
    "dtype": (
        lambda: ops.siamese_augment(X.long(), ROW),
        "siamese_augment: x must be float64, float32, float16 or bfloat16, got int64",
    ),
    "columns": (
        lambda: ops.siamese_augment(X, ROW[:, :12].contiguous()),
        "siamese_augment: params must have 13 columns, got 12",
    ),
    "params dtype": (
        lambda: ops.siamese_augment(X, ROW.double()),
        "siamese_augment: params must be float32, got float64",
    ),
    "uneven": (
        lambda: ops.siamese_augment(X, ROW.repeat(3, 1)),
        "siamese_augment: without offsets the 4 rows must divide evenly into the 3 groups",
    ),
    "no groups": (
        lambda: ops.siamese_augment(X, ROW[:0]),
        "siamese_augment: without offsets the 4 rows must divide evenly into the 0 groups",
    ),
    "NaN": (
        lambda: ops.siamese_augment(X, NAN_ROW),
        "siamese_augment: params must not hold NaN, got one in row 0, column 12",
    ),
    "descending": (
        lambda: ops.siamese_augment(X, ROW.repeat(2, 1), torch.tensor([0, 5, 4])),
        "siamese_augment: offsets must ascend, got 5 before 4 at position 1",
    ),
    "start": (
        lambda: ops.siamese_augment(X, ROW, torch.tensor([1, 4])),
        "siamese_augment: offsets must start at 0, got 1",
    ),
    "end": (
        lambda: ops.siamese_augment(X, ROW, torch.tensor([0, 3])),
        "siamese_augment: offsets must end at the number of rows 4, got 3",
    ),
    "length": (
        lambda: ops.siamese_augment(X, ROW, torch.tensor([0, 2, 4])),
        "siamese_augment: offsets must have 2 elements (groups + 1), got 3",
    ),
    "index": (
        lambda: ops.gather_augment(
            torch.zeros(2, 4, 4, 3), torch.tensor([0, 2]), ROW, MEAN, STD, torch.float32
        ),
        "gather_augment: index must be from 0 to 1, got 2 at position 1",
    ),
    "images": (
        lambda: ops.gather_augment(
            torch.zeros(2, 4, 4, 3).half(), torch.tensor([0]), ROW, MEAN, STD, torch.float32
        ),
        "gather_augment: images must be uint8 or float32, got float16",
    ),
    "negative index": (
        lambda: ops.gather_augment(
            torch.zeros(2, 4, 4, 3), torch.tensor([-1]), ROW, MEAN, STD, torch.float32
        ),
        "gather_augment: index must be from 0 to 1, got -1 at position 0",
    ),
    "strided params": (
        lambda: ops.siamese_augment(X, ROW.repeat(1, 2)[:, ::2]),
        "siamese_augment: params must be contiguous",
    ),
    "strided offsets": (
        lambda: ops.siamese_augment(X, ROW, torch.tensor([0, 9, 4, 9])[::2]),
        "siamese_augment: offsets must be contiguous",
    ),
    "strided index": (
        lambda: ops.gather_augment(
            torch.zeros(2, 4, 4, 3), torch.tensor([0, 9, 1])[::2], ROW, MEAN, STD, torch.float32
        ),
        "gather_augment: index must be contiguous",
    ),
    "strided mean": (
        lambda: ops.gather_augment(
            torch.zeros(2, 4, 4, 3), torch.tensor([0]), ROW, MEAN.repeat(2)[::2], STD, torch.float32
        ),
        "gather_augment: mean must be contiguous",
    ),
    "strided std": (
        lambda: ops.gather_augment(
            torch.zeros(2, 4, 4, 3), torch.tensor([0]), ROW, MEAN, STD.repeat(2)[::2], torch.float32
        ),
        "gather_augment: std must be contiguous",
    ),
    "devices": (
        lambda: ops.siamese_augment(X, ROW.to("meta")),
        "siamese_augment: params is on meta, but x is on cpu; move it",
    ),
    "mean": (
        lambda: ops.gather_augment(
            torch.zeros(2, 4, 4, 3), torch.tensor([0]), ROW, MEAN[:1], STD, torch.float32
        ),
        "gather_augment: mean must have one element a channel (3), got [1]",
    ),
    "features": (
        lambda: ops.class_mean_discrepancy(torch.zeros(4, 3), torch.zeros(2, 5), 2),
        "class_mean_discrepancy: real and syn must have as many features, got 3 and 5",
    ),
    "classes": (
        lambda: ops.class_mean_discrepancy(torch.zeros(4, 3), torch.zeros(3, 3), 2),
        "class_mean_discrepancy: without syn_offsets the 3 rows must divide evenly into",
    ),
    "one side": (
        lambda: ops.class_mean_discrepancy(
            torch.zeros(4, 3), torch.zeros(2, 3), 2, torch.tensor([0, 4, 4])
        ),
        "class_mean_discrepancy: class 1 has rows on one side only",
    ),
    "negative classes": (
        lambda: ops.class_mean_discrepancy(torch.zeros(4, 3), torch.zeros(3, 3), -1),
        "class_mean_discrepancy: classes must be 0 or more, got -1",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name: str) -> None:
    call, message = BAD[name]
    with pytest.raises(RuntimeError, match="^" + re.escape(message)):
        call()


def test_parameters_that_want_a_gradient_are_refused() -> None:
    with pytest.raises(ValueError, match="params must not require a gradient"):
        ops.siamese_augment(X, ROW.clone().requires_grad_())


def test_a_missing_extension_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(_load.importlib, "import_module", fail)
    with pytest.raises(ImportError, match=r"undefined symbol.*make build.*--no-build-isolation"):
        _load.load_extension()
