# SPDX-License-Identifier: MIT
"""The CUDA kernels on the CPU, thread by thread: their values in several orders of the threads, the
sanitizers' silence, and the planted bugs that must break it.

What it does not show stands in csrc/cuda_emulation.h.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from cases import CASES, COLOR, ROTATE, SCALE, TABLES, Case, rows
from emulated import (
    CODES,
    CSRC,
    PLAYER,
    Call,
    Made,
    Tape,
    build,
    build_with_bug,
    images,
    made_images,
)
from test_norm_pool import away_from_zero
from test_norm_pool import inputs as norm_inputs
from torch import Tensor

from dmfast import ops
from dmfast._operators import images_format
from dmfast.augment import STRENGTH, WORDS

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
OP = torch.ops.dmfast
ORDERS = {"plain": (0, 1, 7), "ucontext": (5,), "address": (0, 9), "thread": (0, 3)}

# More pixels than a block takes, so that the image's mean comes from several; and a table for it.
LARGE = (3, 3, 65, 67)
LARGE_TABLE = rows(COLOR, COLOR | SCALE, ROTATE)


def group_words(params: Tensor, offsets: Tensor | None, count: int) -> list[object]:
    return [params, offsets, len(params), count]


def augment_call(
    x: Tensor, params: Tensor, offsets: Tensor | None, backward: bool, name: str
) -> Call:
    operator = OP._siamese_augment_backward if backward else OP.siamese_augment
    expected = operator(x, params, offsets)
    words = [*images(x), *made_images(expected), *x.shape[1:]]
    words += group_words(params, offsets, len(x))
    op = "siamese_augment" + "_backward" * backward
    return Call(op, words, [expected], name=f"{op} {name}")


def shifted(x: Tensor) -> Tensor:
    """As x, contiguous, from an address that no wide load may be from."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def augment_calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    for dtype in dtypes:
        for backward in (False, True):
            for case in CASES:
                x = case.images(dtype)
                yield augment_call(x, case.params, case.offsets_tensor, backward, str(case))
            x = shifted(Case("each", (6, 3, 8, 8)).images(dtype))
            yield augment_call(x, TABLES["each"], None, backward, "shifted")
    x = torch.randn(LARGE, generator=torch.Generator().manual_seed(0))
    for backward in (False, True):
        yield augment_call(x, LARGE_TABLE, None, backward, "large")


def hostile_calls() -> Iterator[Call]:
    """What the CPU's operators refuse and kernels, which cannot, must survive."""
    x = torch.randn(5, 3, 6, 6)
    nan = rows({"angle": torch.nan}, {}, {"crop_y": torch.nan}, {}, {})
    expected = x.clone()
    expected[[0, 2]] = torch.nan
    for op in ("siamese_augment", "siamese_augment_backward"):
        words = [*images(x), *made_images(x), 3, 6, 6, *group_words(nan, None, 5)]
        yield Call(op, words, [expected], name=f"{op} NaN")
        # Offsets beyond both ends, and rows that no group covers.
        for offsets, covered in (([1, 3, 4], [1, 2, 3]), ([-9, 2, 99], [0, 1, 2, 3, 4])):
            zero = torch.zeros_like(x)
            zero[covered] = x[covered]
            table = rows({}, {})
            words = [*images(x), *made_images(x), 3, 6, 6]
            words += group_words(table, torch.tensor(offsets), 5)
            yield Call(op, words, [zero], name=f"{op} offsets {offsets}")
    real = torch.randn(6, 8)
    for offsets in ([0, 9, 3, -4], [5, 5, 99, 99]):
        tensor = torch.tensor(offsets)
        clamped = tensor.clamp(0, 6).tolist()
        means = torch.zeros(3, 8)
        for k, (first, last) in enumerate(itertools.pairwise(clamped)):
            if last > first:
                means[k] = real[first:last].mean(0)
        words = [real, CODES[real.dtype], 8, tensor, 3, 6, 8, 0, Made(means)]
        yield Call("class_mean", words, [means], name=f"class_mean {offsets}")
    # A class with rows on one side only.
    sides = [torch.tensor([0, 3, 3]), 2, 6]
    loss, difference = torch.tensor(torch.nan), torch.full((2, 8), torch.nan)
    words = [*sides, real, CODES[real.dtype], 8, torch.tensor([0, 0, 6]), 2, 6, 8, 0]
    words += [Made(difference), Made(loss)]
    yield Call("class_mean_discrepancy", words, [difference, loss], name="one side")
    # More rows than images, offsets out of order, a class without images.
    order = torch.arange(40, 50)
    first = ops.draw_batch(order, torch.tensor([0, 3]), torch.tensor([0, 3]), 3, 3, 0, stream=1)
    again = torch.cat([first, first[:2], torch.zeros(2, dtype=torch.int64)])
    for starts, batch, index in (
        ([0, 3, 3], [0, 5, 7], again),
        ([-5, 999, 2], [3, 1, 6], torch.zeros(7, dtype=torch.int64)),
    ):
        words = [3, 0, 1, None, order, torch.tensor(starts), 2, 10, torch.tensor(batch), 2, 7, 0]
        yield Call("draw_batch", [*words, Made(index)], [index], exact=True)


def gather_calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)
    index, offsets = torch.tensor([4, 0, 4, 2, 1, 3, 0]), torch.tensor([0, 2, 2, 3, 5, 6, 7])
    for channels in (1, 3, 6):
        bytes_ = torch.randint(0, 256, (5, 8, 9, channels), generator=generator, dtype=torch.uint8)
        synthetic = torch.randn(5, channels, 8, 9, generator=generator).permute(0, 2, 3, 1)
        mean, std = torch.rand(2, channels, generator=generator).add(0.2).unbind()
        for dtype in dtypes:
            for source in (bytes_, bytes_[:, ::2, 1:], synthetic):
                table = TABLES["each"]
                out = ops.gather_augment(source, index, table, mean, std, dtype, offsets)
                picks = index + torch.tensor([99, -99, 0, 0, 0, 0, 0])  # clamped to 4 and 0
                n, h, w, c = source.shape
                stride = source.stride()
                words = [source, CODES[source.dtype], stride[0], stride[3], *stride[1:3], n, picks]
                words += [mean, std, *made_images(out), c, h, w, *group_words(table, offsets, 7)]
                yield Call("gather_augment", words, [out])


def class_mean_calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    generator = torch.Generator().manual_seed(0)
    splits = [(80, None, 4, None), (45, [0, 1, 40, 40, 45], 7, [0, 2, 3, 3, 7])]
    for width in (1, 37, 64, 280):
        for dtype in dtypes:
            for n, real_split, m, syn_split in splits:
                real = torch.randn(n, width, generator=generator).to(dtype)
                syn = torch.randn(m, width + 8, generator=generator).to(dtype)[:, :width]
                of_real = None if real_split is None else torch.tensor(real_split)
                of_syn = None if syn_split is None else torch.tensor(syn_split)
                loss, difference = OP.class_mean_discrepancy(real, syn, 4, of_real, of_syn)
                doubles, code = loss.dtype == torch.float64, CODES[dtype]
                mean = OP._class_mean(real, 4, of_real)
                words = [real, code, width, of_real, 4, n, width, doubles, Made(mean)]
                yield Call("class_mean", words, [mean])
                of_both = mean.to(loss.dtype).clone()
                words = [of_real, 4, n, syn, code, width + 8, of_syn, 4, m, width, doubles]
                words += [Made(difference, of_both), Made(loss)]
                yield Call("class_mean_discrepancy", words, [difference, loss])
                gradient = OP._class_mean_backward(mean, n, of_real, dtype)
                words = [mean, code, of_real, 4, n, width, Made(gradient)]
                yield Call("class_mean_backward", words, [gradient])


#: Shape, layout and networks. In channels_last threads hold what is small, of several channels a
#: load, and read what is large again; other numbers of channels are loaded one by one.
NORMS = [
    ((2, 32, 8, 8), "channels_last", None),
    ((3, 40, 9, 7), "channels_last", 3),
    ((1, 64, 32, 32), "channels_last", 1),
    ((2, 8, 71, 34), "channels_last", 2),
    ((4, 33, 5, 6), "channels_last", 2),
    ((2, 3, 8, 9), "channels_last", None),
    ((2, 3, 7, 8), "contiguous", 2),
    ((1, 2, 67, 66), "contiguous", None),
    ((40, 2, 2, 2), "contiguous", None),
    ((5, 1, 3, 2), "contiguous", None),
    ((2, 32, 2, 3), "channels_last", None),
]


def norm_calls(
    dtypes: tuple[torch.dtype, ...], norms: list[tuple[tuple[int, ...], str, int | None]] = NORMS
) -> Iterator[Call]:
    for dtype in dtypes:
        for shape, layout, networks in norms:
            tensors = norm_inputs(shape, layout, networks)
            x, weight, bias = (t.to(dtype) for t in tensors)
            yield from norm_call(x, weight, bias, away_from_zero([x, weight, bias]).to(dtype))
        x, weight, bias = (t.to(dtype) for t in norm_inputs((2, 32, 6, 6), "channels_last", None))
        of_out = away_from_zero([x, None, bias]).to(dtype)
        yield from norm_call(x, None, bias, of_out, "bias")
        of_out = away_from_zero([x, None, None]).to(dtype)
        x = shifted(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        yield from norm_call(x, None, None, of_out, "shifted")


def norm_call(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, of_out: Tensor, name: str = ""
) -> Iterator[Call]:
    wide = torch.promote_types(x.dtype, torch.float32)
    parameters = [None if p is None else p.to(wide) for p in (weight, bias)]
    out, statistics = OP.instance_norm_relu_pool(x, *parameters, 1e-5)
    layout = images_format(x)
    of_out = of_out.contiguous(memory_format=layout)
    wanted = [True, *(p is not None for p in parameters)]
    gradients = OP._instance_norm_relu_pool_backward(
        of_out, x, *parameters, statistics, 1e-5, wanted
    )
    networks = next((len(p) for p in parameters if p is not None and p.dim() == 2), 1)
    words = [CODES[x.dtype], *x.shape, networks, layout == torch.channels_last, *parameters]
    name = f"{name} {list(x.shape)} {layout}"
    forward = [*words, Made(statistics), x, 1e-5, Made(out)]
    yield Call("instance_norm_relu_pool", forward, [statistics, out], name=f"norm {name}")
    made = [Made(g) if want else None for g, want in zip(gradients, wanted, strict=True)]
    expected = [g for g, want in zip(gradients, wanted, strict=True) if want]
    backward = [*words, statistics, of_out, x, *made]
    op = "instance_norm_relu_pool_backward"
    yield Call(op, backward, expected, name=f"norm backward {name}")
    # Only the parameters' gradients.
    backward = [*words, statistics, of_out, x, None, *made[1:]]
    yield Call(op, backward, expected[1:], name=f"norm backward {name}, of the parameters")


def draw_calls(dtypes: tuple[torch.dtype, ...]) -> Iterator[Call]:
    seed, step, stream = 2**62 + 12345, 2**32 - 5, 2
    for key in ([seed, step, stream, None], [seed, 0, stream, torch.tensor([step])]):
        for mode in ("single", "all"):
            drawn = ops.draw_augmentation(
                "_".join(WORDS), 7, (9, 14), seed, step, rows=3, first_group=5, stream=2, mode=mode
            )
            strength = [STRENGTH[name] for name in STRENGTH]
            scale = strength[6]
            # As csrc/draw.cpp works them out of the strengths.
            ranges = [*strength[:3], 1, 2, 5, 7, 9, 14, strength[5], 1 / scale, scale - 1 / scale]
            ranges.append(strength[7] / 180 * torch.pi)
            words = [*key, mode == "all", 6, *range(6), *map(float, ranges[:3])]
            words += [*ranges[3:9], *map(float, ranges[9:]), 7, 3, 5, Made(drawn)]
            yield Call("draw_augmentation", words, [drawn], exact=True)
        order = torch.randperm(400, generator=torch.Generator().manual_seed(1))
        starts, batch = torch.tensor([0, 1, 18, 18, 400]), torch.tensor([0, 1, 9, 9, 209])
        index = ops.draw_batch(order, starts, batch, 209, seed, step, first_class=3, stream=2)
        words = [*key, order, starts, 4, 400, batch, 4, 209, 3, Made(index)]
        yield Call("draw_batch", words, [index], exact=True)
        for dtype in dtypes:
            # More tensors than a launch takes.
            tensors = [torch.empty(2, 1 + 5 * t % 37, dtype=dtype) for t in range(35)]
            bounds = [0.1 + t for t in range(35)]
            ops.draw_weights_(tensors, bounds, seed, step, networks=2, first_network=9, stream=2)
            words, block = [*key, 2, 9, 35], 0
            for tensor, bound in zip(tensors, bounds, strict=True):
                words += [Made(tensor), CODES[dtype], bound, tensor.shape[1], block]
                block += -(-tensor.shape[1] // 4)
            yield Call("draw_weights", words, tensors, exact=True)


def all_calls(dtypes: tuple[torch.dtype, ...]) -> list[Call]:
    calls = [*augment_calls(dtypes), *gather_calls(dtypes), *class_mean_calls(dtypes)]
    return [*calls, *norm_calls(dtypes), *draw_calls(dtypes), *hostile_calls()]


@pytest.mark.parametrize("name", ["plain", "address", "thread"])
def test_kernels_match_the_operators_of_the_cpu(name: str, tmp_path: Path) -> None:
    # The sanitizers see one wide and one narrow type: what they look for is no matter of values.
    dtypes = DTYPES if name == "plain" else (torch.float32, torch.bfloat16)
    tape = Tape()
    for call in all_calls(dtypes):
        for order in ORDERS[name]:
            tape.add(call, order)
    tape.check(build(name), tmp_path)


def test_fibers_by_ucontext_give_the_same(tmp_path: Path) -> None:
    """The way of other processors than x86-64."""
    tape = Tape()
    for call in class_mean_calls((torch.float32,)):
        tape.add(call, 5)
    tape.check(build("ucontext"), tmp_path)


#: By name: build, file, kernels made from it, what is replaced, by what, and what is said about it.
BUGS = {
    "read past the end": (
        ("address", "class_mean_cuda.cu", "class_mean_cuda"),
        ("for (; row < count; row += kLanes)", "for (; row <= count; row += kLanes)"),
        "heap-buffer-overflow",
    ),
    "misaligned load": (
        ("address", "cuda_types.h", "class_mean_cuda"),
        (
            "return reinterpret_cast<uintptr_t>(data) %",
            "return true || reinterpret_cast<uintptr_t>(data) %",
        ),
        "misaligned address",
    ),
    "missing barrier": (
        ("thread", "class_mean_cuda.cu", "class_mean_cuda"),
        ("__syncthreads();\n    acc_t squares", "acc_t squares"),
        "data race",
    ),
    "race": (
        ("thread", "class_mean_cuda.cu", "class_mean_cuda"),
        ("if (threadIdx.x < half) partial", "if (threadIdx.x <= half) partial"),
        "data race",
    ),
    "divergent barrier": (
        ("plain", "class_mean_cuda.cu", "class_mean_cuda"),
        ("__syncthreads();  // partial", "if (lane == 0) __syncthreads();  // partial"),
        "different __syncthreads",
    ),
    "half a warp": (
        ("plain", "class_mean_cuda.cu", "class_mean_cuda"),
        ("if (subtracts && lane == 0) {", "if (subtracts && lane == 0 && column < 16) {"),
        "deadlock",
    ),
    "race for the plan": (
        ("thread", "augment_cuda.cu", "augment_cuda"),
        ("if (threadIdx.x == 0) {\n      plan->image", "if (threadIdx.x < 2) {\n      plan->image"),
        "data race",
    ),
    "a row of windows too many": (
        ("address", "norm_pool_cuda.cu", "norm_pool_cuda"),
        ("return row < planes.rows;", "return row <= planes.rows;"),
        "heap-buffer-overflow",
    ),
    "totals read too early": (
        ("thread", "norm_pool_cuda.cu", "norm_pool_cuda"),
        ("+ thread] = terms[t];\n  }\n  __syncthreads();", "+ thread] = terms[t];\n  }"),
        "data race",
    ),
    "the wrong half kept": (
        ("plain", "norm_pool_cuda.cu", "norm_pool_cuda"),
        ("kept = upper ?", "kept = !upper ?"),
        "",
    ),
    "one row too many": (
        ("plain", "clamped_groups.h", "class_mean_cuda"),
        ("return offset < 0 ? 0 :", "return offset < 0 ? 1 :"),
        "",  # seen in the values
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_caught(bug: str, tmp_path: Path) -> None:
    (name, file, compiled), replacement, message = BUGS[bug]
    player = build_with_bug(name, tmp_path, file, compiled, *replacement)
    tape = Tape()
    if compiled == "augment_cuda":
        x = torch.randn(2, 3, 8, 8)
        tape.add(augment_call(x, TABLES["identity"], None, False, "identity"), 0)
    elif compiled == "norm_pool_cuda":
        for call in norm_calls((torch.float32,), NORMS[:2]):
            tape.add(call, 0)
    else:
        # Rows that end where their block of memory does, from an address that packs may not have.
        rows_of_two = shifted(torch.randn(37, 64))
        mean = OP._class_mean(rows_of_two, 1, None)
        words = [rows_of_two, CODES[torch.float32], 64, torch.tensor([-1, 37]), 1, 37, 64, 0]
        tape.add(Call("class_mean", [*words, Made(mean)], [mean]), 0)
        for call in class_mean_calls((torch.float32,)):
            tape.add(call, 0)
    if not message:
        with pytest.raises(AssertionError, match="not close"):
            tape.check(player, tmp_path / "tape")
        return
    done = tape.play(player, tmp_path / "tape")
    assert done.returncode != 0
    assert message in done.stderr


def test_the_clean_kernels_are_those_that_are_built() -> None:
    """Every .cu is played: a new one that is not would go untested."""
    objects = {path.stem for path in build("plain").parent.glob("*.o")}
    of_tests = {"tape", *(path.stem for path in PLAYER.glob("*.cu"))}
    assert objects == of_tests | {path.stem for path in CSRC.glob("*.cu")}
