# SPDX-License-Identifier: MIT
"""The fused ConvNet block's CUDA kernels on the CPU, thread by thread, and the tensor cores'
product that they stand on: values against float64, the sanitizers' silence, planted bugs.

What the emulation does not show stands in csrc/cuda_emulation.h.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from block_cases import Block, per_image, randn
from emulated import Call, Made, Tape, build, build_with_bug
from torch import Tensor

ORDERS = {"plain": (0, 1, 7), "address": (0, 9), "thread": (0, 3)}


def integers(*shape: int, seed: int) -> Tensor:
    """Small enough for products and sums without rounding, so that results are compared to the
    bit."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-8, 9, shape, generator=generator).bfloat16()


def product_call(depth: int) -> Call:
    a, b = integers(32, depth, seed=0), integers(16, depth, seed=1)
    c = a.float() @ b.float().T
    return Call("matrix_product", [a, b, depth, Made(c)], [c], exact=True, name=f"depth {depth}")


@pytest.mark.parametrize("name", ORDERS)
def test_matrix_product(name: str, tmp_path: Path) -> None:
    tape = Tape()
    for depth in (16, 32, 48, 128):
        for order in ORDERS[name]:
            tape.add(product_call(depth), order)
    tape.check(build(name), tmp_path)


#: By name: build, file, what is replaced, by what, what is said about it ("": seen in the values).
PRODUCT_BUGS = {
    "a wait for too few copies": (
        ("plain", "matrix_product.cu"),
        (
            "wait_for_copies<kStages - 2>();",
            "step + 1 < steps ? wait_for_copies<kStages - 1>() : wait_for_copies<0>();",
        ),
        "",
    ),
    "no barrier after the wait": (
        ("thread", "matrix_product.cu"),
        ("__syncthreads();  // the stage", "// the stage"),
        "data race",
    ),
    "a ring that is a stage too short": (
        ("plain", "matrix_product.cu"),
        (
            "ring + step % kStages * kStageCells;\n    for",
            "ring + step % 2 * kStageCells;\n    for",
        ),
        "",
    ),
    "the halves of the depth exchanged": (
        ("plain", "matrix_product.cu"),
        ("const int half = lane / 16, row", "const int half = 1 - lane / 16, row"),
        "",
    ),
    "rows in the wrong order": (
        ("plain", "matrix_product.cu"),
        ("row = warp * 16 + lane % 16;", "row = warp * 16 + (lane % 16 + 8) % 16;"),
        "",
    ),
    "past the end of shared memory": (
        ("address", "matrix_product.cu"),
        ("const int bytes = kStages *", "const int bytes = (kStages - 1) *"),
        "heap-buffer-overflow",
    ),
    "misaligned rows": (
        ("plain", "matrix_product.cu"),
        (
            "reinterpret_cast<Cell*>(shared);",
            "reinterpret_cast<Cell*>(shared + 8);",
        ),
        "misaligned",
    ),
    "a copy that nothing waits for": (
        ("plain", "matrix_product.cu"),
        (
            "if (step + kStages - 1 < steps) fetch(step + kStages - 1);",
            "fetch((step + kStages - 1) % steps);",
        ),
        "before its copies had landed",
    ),
}


@pytest.mark.parametrize("bug", PRODUCT_BUGS)
def test_a_planted_bug_in_a_product_is_caught(bug: str, tmp_path: Path) -> None:
    (name, file), replacement, message = PRODUCT_BUGS[bug]
    player = build_with_bug(name, tmp_path, file, "matrix_product", *replacement)
    tape = Tape()
    tape.add(product_call(80), 0)
    assert_caught(tape, player, tmp_path / "tape", message)


def assert_caught(tape: Tape, player: Path, folder: Path, message: str) -> None:
    if not message:
        with pytest.raises(AssertionError, match=r"order \d"):
            tape.check(player, folder)
        return
    done = tape.play(player, folder)
    assert done.returncode != 0
    assert message in done.stderr


# ---- The blocks --------------------------------------------------------------------------------

EPS = 1e-5
FLOAT32 = 2.0**-24  # the rounding of one operation
BFLOAT16 = 2.0**-8
SHARED = {"H100": 228 << 10, "A100": 164 << 10, "L40": 100 << 10}  # bytes of a multiprocessor


def channels_last(x: Tensor) -> Tensor:
    return x.bfloat16().permute(0, 2, 3, 1).contiguous()


@dataclass
class Exact:
    """A block in float64 on operands rounded to bfloat16, and what errors its float32 parts may
    have: n products that are summed are off by n roundings of the sum of their sizes, and so are
    means of such sums."""

    case: Block
    x: Tensor
    weights: Tensor  # [R, K, C, 3, 3]
    scale: Tensor  # [N or 1, K, 1, 1]
    shift: Tensor

    @classmethod
    def of(cls, case: Block, x: Tensor | None = None) -> Exact:
        conv_weight, weight, bias = case.parameters()
        images = (case.x() if x is None else x).bfloat16().double()
        rounded = conv_weight.bfloat16().double()
        like = images.new_empty(case.images, case.filters, 1, 1)
        parameters = [None if p is None else p.double() for p in (weight, bias)]
        return cls(
            case,
            images,
            rounded if rounded.dim() == 5 else rounded[None],
            per_image(like, parameters[0], 1),
            per_image(like, parameters[1], 0),
        )

    def convolve(self, x: Tensor, weights: Tensor) -> Tensor:
        parts = zip(x.tensor_split(len(weights)), weights, strict=True)
        return torch.cat([F.conv2d(part, w, padding=self.case.padding) for part, w in parts])

    def adjoint(self, dz: Tensor, weights: Tensor) -> Tensor:
        parts = zip(dz.tensor_split(len(weights)), weights, strict=True)
        padding = self.case.padding
        return torch.cat([F.conv_transpose2d(part, w, padding=padding) for part, w in parts])

    @property
    def z(self) -> Tensor:
        return self.convolve(self.x, self.weights)

    @property
    def z_error(self) -> Tensor:
        """With its mean taken off."""
        sizes = self.convolve(self.x.abs(), self.weights.abs())
        return 9 * self.case.channels * FLOAT32 * (sizes + sizes.mean((2, 3), keepdim=True))

    def statistics(self) -> tuple[Tensor, Tensor]:
        z = self.z
        variance = z.var((2, 3), correction=0, keepdim=True)
        return z.mean((2, 3), keepdim=True), (variance + EPS).rsqrt()

    def forward(self) -> tuple[list[Tensor], list[Tensor]]:
        """out and statistics as the kernels lay them out, and the bounds of their errors."""
        z, z_error = self.z, self.z_error
        mean, rstd = self.statistics()
        normal = (z - mean) * rstd
        out = F.avg_pool2d(F.relu(normal * self.scale + self.shift), 2)
        # rstd is off by what moves the deviation, which is at most the largest error of z; and a
        # few roundings.
        off = (z_error.amax((2, 3), keepdim=True) * rstd).clamp(max=1) + 8 * FLOAT32
        y_error = self.scale.abs() * (z_error * rstd + normal.abs() * off) + 4 * FLOAT32
        bound = F.avg_pool2d(y_error, 2) + BFLOAT16 * out.abs()
        statistics = torch.stack([mean, rstd], 1).flatten(2)
        mean_error = z_error.mean((2, 3), keepdim=True) + 4 * FLOAT32 * mean.abs()
        return (
            [out.permute(0, 2, 3, 1), statistics],
            [bound.permute(0, 2, 3, 1), torch.stack([mean_error, rstd * off], 1).flatten(2)],
        )

    def gradient(self) -> Tensor:
        """Of out, in bfloat16 [N, K, H'/2, W'/2]: zero where an error decides of a value before
        ReLU whether it passes."""
        mean, rstd = self.statistics()
        y = (self.z - mean) * rstd * self.scale + self.shift
        near = y.abs() <= self.scale.abs() * (self.z_error * rstd) + 8 * FLOAT32 * (1 + y.abs())
        gradient = randn(*F.avg_pool2d(y, 2).shape, seed=4).bfloat16().double()
        return gradient * (F.max_pool2d(near.double(), 2) == 0)

    def backward(self, gradient: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The gradients of x and z and of each image's weight and bias, and the bounds."""
        z, z_error = self.z, self.z_error
        mean, rstd = self.statistics()
        pixels = z.shape[2] * z.shape[3]
        normal = (z - mean) * rstd
        normal_error = (z_error + FLOAT32 * mean.abs()) * rstd + 4 * FLOAT32 * normal.abs()
        y = normal * self.scale + self.shift
        dy = torch.where(y <= 0, 0, F.interpolate(gradient, scale_factor=2) / 4)
        bias_mean, weight_mean = (v.mean((2, 3), keepdim=True) for v in (dy, dy * normal))
        dz = rstd * self.scale * (dy - bias_mean - normal * weight_mean)
        dx = self.adjoint(dz, self.weights)

        sizes = dy.abs().mean((2, 3), keepdim=True), (dy * normal).abs().mean((2, 3), keepdim=True)
        bias_error = pixels * FLOAT32 * sizes[0]
        weight_error = pixels * FLOAT32 * sizes[1]
        weight_error = weight_error + (dy.abs() * normal_error).mean((2, 3), keepdim=True)
        error = bias_error + normal.abs() * weight_error + normal_error * weight_mean.abs()
        error = error + 8 * FLOAT32 * (dy.abs() + bias_mean.abs() + (normal * weight_mean).abs())
        dz_error = (rstd * self.scale).abs() * error + 1.01 * BFLOAT16 * dz.abs()
        terms = self.weights.abs()
        dx_error = self.adjoint(dz_error, terms) + BFLOAT16 * dx.abs()
        dx_error += 9 * self.case.filters * FLOAT32 * self.adjoint(dz.abs(), terms)
        norm = torch.stack([weight_mean, bias_mean], 1).flatten(2) * pixels
        norm_error = torch.stack([weight_error, bias_error], 1).flatten(2) * pixels
        last = (0, 2, 3, 1)
        return (
            [dx.permute(last), dz.permute(last), norm],
            [1.01 * dx_error.permute(last), dz_error.permute(last), norm_error],
        )


def problem_words(case: Block, device: str) -> list[object]:
    sizes = [case.images, case.networks or 1, case.channels, case.filters, *case.size]
    return [SHARED[device], *sizes, case.padding, EPS]


def operand_words(case: Block, x: Tensor) -> list[object]:
    conv_weight, weight, bias = case.parameters()
    words: list[object] = [channels_last(x), conv_weight]
    for parameter in (weight, bias):
        several = parameter is not None and parameter.dim() == 2
        words += [parameter, case.filters if several else 0]
    return words


def forward_call(
    case: Block, device: str = "H100", x: Tensor | None = None, wgmma: bool = False
) -> Call:
    x = case.x() if x is None else x
    expected, bounds = Exact.of(case, x).forward()
    made = [Made(expected[0].bfloat16().contiguous()), Made(expected[1].float().contiguous())]
    words = [*problem_words(case, device), *operand_words(case, x), *made, wgmma]
    name = f"forward {case} {device}{' wgmma' * wgmma}"
    return Call("fused_block", words, expected, name=name, bounds=bounds)


def backward_call(
    case: Block, device: str = "H100", x: Tensor | None = None, wanted: str = "xzn"
) -> Call:
    x = case.x() if x is None else x
    exact = Exact.of(case, x)
    gradient = exact.gradient()
    assert gradient.count_nonzero() > 0.9 * gradient.numel()
    expected, bounds = exact.backward(gradient)
    statistics = torch.stack(exact.statistics(), 1).flatten(2).float()
    dtypes = {"x": torch.bfloat16, "z": torch.bfloat16, "n": torch.float32}
    made = [
        Made(tensor.to(dtype).contiguous()) if name in wanted else None
        for (name, dtype), tensor in zip(dtypes.items(), expected, strict=True)
    ]
    words = [*problem_words(case, device), *operand_words(case, x)]
    words += [channels_last(gradient), statistics, *made]
    kept = [number for number, word in enumerate(made) if word is not None]
    return Call(
        "fused_block_backward",
        words,
        [expected[number] for number in kept],
        name=f"backward {case} {device} {wanted}",
        bounds=[bounds[number] for number in kept],
        rms=BFLOAT16,
    )


SMALL = [
    Block(3, 32, (8, 8), images=2),
    Block(1, 32, (4, 4), images=3, padding=3, networks=3),
    Block(32, 32, (4, 4), images=17),
    Block(32, 32, (8, 8), images=5),
    Block(32, 64, (8, 8), images=6, networks=2),
    Block(32, 32, (16, 16), images=1),
]
LARGE = [
    Block(3, 128, (32, 32)),
    Block(1, 128, (28, 28), images=1, padding=3),
    Block(4, 64, (16, 26), images=1, padding=0, affine="none"),
    Block(2, 32, (10, 24), images=3, padding=1, affine="weight"),
    Block(3, 32, (64, 64), images=1, affine="bias"),
    Block(128, 128, (16, 16), images=2, networks=2),
    Block(128, 128, (8, 8), images=5),
    Block(64, 128, (4, 4), images=3, affine="none"),
    Block(256, 64, (8, 8), images=1),
]


def is_backward_fused(case: Block) -> bool:
    return case.channels <= 4 or (case.size[0] > 4 and case.channels < 256)


@pytest.mark.parametrize("name", ORDERS)
def test_forward(name: str, tmp_path: Path) -> None:
    tape = Tape()
    for case in SMALL:
        for order in ORDERS[name]:
            tape.add(forward_call(case), order)
    if name == "plain":
        for case in LARGE:
            tape.add(forward_call(case), 7)
        # Those that have room for two blocks of 64 filters, for one of 128, and for one of 64.
        for device in SHARED:
            tape.add(forward_call(Block(128, 128, (16, 16), images=1), device), 1)
    tape.check(build(name), tmp_path)


@pytest.mark.parametrize("name", ORDERS)
def test_backward(name: str, tmp_path: Path) -> None:
    tape = Tape()
    for case in filter(is_backward_fused, SMALL):
        for order in ORDERS[name]:
            tape.add(backward_call(case), order)
    if name == "plain":
        for case in filter(is_backward_fused, LARGE):
            tape.add(backward_call(case), 7)
    for case in (SMALL[0], SMALL[3]):
        for wanted in ("x", "z", "n", "zn"):
            tape.add(backward_call(case, wanted=wanted), 0)
    tape.check(build(name), tmp_path)


@pytest.mark.parametrize("name", ORDERS)
def test_forward_by_wgmma(name: str, tmp_path: Path) -> None:
    """What a product of a warpgroup does is this project's reading of it, not a GPU's."""
    tape = Tape()
    for case in (Block(32, 128, (16, 16), images=1), Block(32, 128, (8, 8), images=3)):
        for order in ORDERS[name][:2]:
            tape.add(forward_call(case, wgmma=True), order)
    if name == "plain":
        case = Block(64, 256, (8, 8), images=6, networks=2, affine="none")
        tape.add(forward_call(case, wgmma=True), 1)
    tape.check(build(name), tmp_path)


@pytest.mark.parametrize(
    ("case", "device", "backward"),
    [
        (Block(5, 32, (8, 8)), "H100", False),
        (Block(3, 48, (8, 8)), "H100", False),
        (Block(3, 32, (8, 12)), "H100", False),
        (Block(3, 32, (7, 8)), "H100", False),
        (Block(32, 32, (32, 32)), "H100", False),
        (Block(32, 32, (8, 16)), "H100", False),
        (Block(32, 32, (8, 8), padding=2), "H100", False),
        (Block(48, 32, (8, 8)), "H100", False),
        (Block(32, 256, (8, 8)), "H100", True),
        (Block(32, 32, (4, 4)), "H100", True),
        (Block(128, 128, (16, 16)), "L40", True),
    ],
    ids=str,
)
def test_what_is_not_fused_is_refused(
    case: Block, device: str, backward: bool, tmp_path: Path
) -> None:
    call = backward_call(case, device) if backward else forward_call(case, device)
    tape = Tape()
    tape.add(call, 0)
    done = tape.play(build("plain"), tmp_path)
    assert done.returncode != 0
    assert "the fused kernels do not take the block" in done.stderr


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0])
@pytest.mark.parametrize("case", [SMALL[0], SMALL[3]], ids=str)
def test_what_is_not_finite_stays_in_its_image(case: Block, value: float, tmp_path: Path) -> None:
    """And an image of zeros has variance 0."""
    x = case.x()
    if value == 0:
        x[1] = 0
    else:
        x[1, 1, 3, 2] = value
    forward, backward = forward_call(case, x=x), backward_call(case, x=x)
    out = forward.expected[0]
    assert out[0].isfinite().all()
    assert out[1].isnan().all() if value != 0 else out[1].isfinite().all()
    if value == torch.inf:
        # Whether a mean is NaN or infinite is nobody's concern: the result is NaN.
        forward = replace(forward, words=[*forward.words[:-2], None, False], expected=[out])
    tape = Tape()
    for call in (forward, backward):
        tape.add(replace(call, rms=None), 5)
    tape.check(build("plain"), tmp_path)


@pytest.mark.parametrize("case", [SMALL[0], SMALL[3]], ids=str)
def test_a_weight_that_is_not_finite_stays_in_its_filter(case: Block, tmp_path: Path) -> None:
    call = forward_call(NanWeights(**vars(case)))
    assert call.expected[0][..., 5].isnan().all()
    assert call.expected[0][..., :5].isfinite().all()
    tape = Tape()
    tape.add(call, 5)
    tape.check(build("plain"), tmp_path)


@dataclass(frozen=True)
class NanWeights(Block):
    def parameters(self) -> list[Tensor | None]:
        conv_weight, *norm = super().parameters()
        conv_weight[5, 1, 2, 0] = torch.nan
        return [conv_weight, *norm]


#: By name: build, file, kernels made from it, what is replaced, by what, what is said about it.
BLOCK_BUGS = {
    "a neighbour's pooled pair": (
        ("plain", "wide_block_cuda.cu", "wide_block_cuda"),
        ("right ? early : late, 4);", "right ? early : late, 8);"),
        "",
    ),
    "no barrier before the ring is used again": (
        ("thread", "wide_block_cuda.cu", "wide_block_cuda"),
        ("__syncthreads();  // the ring has been read", ""),
        "data race",
    ),
    "a stage that is fetched too early": (
        ("thread", "wide_tile_cuda.h", "wide_block_cuda"),
        ("fetch(step + kStages - 1);", "fetch(step + kStages);"),
        "data race",
    ),
    "images without a border": (
        ("plain", "wide_tile_cuda.h", "wide_block_cuda"),
        ("i < planes * Tile::kImages * kBorder;", "i < 0 * planes;"),
        "",
    ),
    "a tap too far": (
        ("plain", "wide_tile_cuda.h", "wide_block_cuda"),
        ("tap / 3 * Tile::kPitch + tap % 3;", "tap % 3 * Tile::kPitch + tap / 3;"),
        "",
    ),
    "sums of half the image": (
        ("plain", "wide_tile_cuda.h", "wide_block_cuda"),
        (
            "for (int warp = 1; warp < kWarps; ++warp) {",
            "for (int warp = 1; warp < kWarps - 1; ++warp) {",
        ),
        "",
    ),
    "a gradient with the mean's twice": (
        ("plain", "wide_block_cuda.cu", "wide_block_cuda"),
        ("- bias_mean - value * weight_mean", "+ bias_mean - value * weight_mean"),
        "",
    ),
    "weights that are not turned": (
        ("plain", "conv_block_cuda.cu", "conv_block_cuda"),
        ("(turned ? 8 - tap : tap)", "tap"),
        "",
    ),
    "a stage that products still read": (
        ("plain", "wgmma_block_cuda.cu", "wgmma_block_cuda"),
        ("fetch(step + kAhead);", "fetch(step + kAhead + 1);"),
        "shared memory changed under a product",
    ),
    "columns that are not there yet": (
        ("thread", "thin_block_cuda.cu", "thin_block_cuda"),
        ("__syncthreads();  // the columns are there", ""),
        "data race",
    ),
    "a mean without what rounding left": (
        ("plain", "thin_block_cuda.cu", "thin_block_cuda"),
        ("deviations[i] += upper + lower;", "deviations[i] += upper;"),
        "",
    ),
}


@pytest.mark.parametrize("bug", BLOCK_BUGS)
def test_a_planted_bug_in_a_block_is_caught(bug: str, tmp_path: Path) -> None:
    (name, file, compiled), replacement, message = BLOCK_BUGS[bug]
    player = build_with_bug(name, tmp_path, file, compiled, *replacement)
    case = Block(3, 32, (8, 8)) if compiled == "thin_block_cuda" else Block(32, 32, (16, 16), 1)
    tape = Tape()
    if compiled == "wgmma_block_cuda":
        tape.add(forward_call(Block(32, 128, (16, 16), 1), wgmma=True), 0)
    else:
        tape.add(forward_call(case), 0)
        tape.add(backward_call(case), 0)
    assert_caught(tape, player, tmp_path / "tape", message)
