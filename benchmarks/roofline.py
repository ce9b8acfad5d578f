# SPDX-License-Identifier: MIT
"""The least time that an iteration of distribution matching can take: operations and bytes.

``python benchmarks/roofline.py --images 3x32x32 --ipc 50 --preset h100 --iterations 20000`` prints
every stage's floating-point operations, bytes to and from memory, and the larger of the two times.
Bytes are those of fused blocks, each of which reads its input and writes its pooled output once.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import ceilings

# Operations a value besides the convolutions' products, a multiply-add counting two. Of a
# convolution's output, forward: the sums for mean and variance (3), scale and shift (2), ReLU,
# pooling; backward: pooling, ReLU, two sums (3), three terms (4).
_TAIL_FORWARD, _TAIL_BACKWARD = 7, 9
# Of an image: normalisation (2) and a bilinear sample (7), or the sample's adjoint.
_GATHER, _SAMPLE = 9, 7

# Winograd's F(4x4, 3x3): operations of its transforms of 6 or 3 numbers, common sums shared. Input:
# [4 0 -5 0 1 0] and its mirror (4 each), (d4 - 4 d2) +- (d3 - 4 d1) (6) and
# (d4 - d2) +- 2 (d3 - d1) (5). Output: m1 +- m2, m3 +- m4 (4), then four sums of them (9). Weights:
# g0/4, (g0 + g2)/6 +- g1/6 (5), (g0/24 + g2/6) +- g1/12 (6), g2. In two dimensions on columns, then
# on rows.
_OF_INPUT, _OF_OUTPUT, _OF_WEIGHTS = 19 * (6 + 6), 13 * (6 + 4), 12 * (3 + 6)
_TILE = 4


@dataclass(frozen=True)
class Block:
    """A 3x3 convolution from ``inputs`` to ``outputs`` channels, norm, ReLU and 2x2 pooling.

    ``input_pixels`` are an image's before the convolution, ``rows`` x ``columns`` after it.
    """

    inputs: int
    outputs: int
    input_pixels: int
    rows: int
    columns: int

    @property
    def input_values(self) -> int:
        return self.inputs * self.input_pixels

    @property
    def convolved_values(self) -> int:
        return self.outputs * self.rows * self.columns

    @property
    def pooled_values(self) -> int:
        return self.outputs * (self.rows // 2) * (self.columns // 2)

    @property
    def weights(self) -> int:
        return 9 * self.inputs * self.outputs

    @property
    def flop(self) -> int:
        """Of the direct convolution of an image; as many again for either gradient."""
        return 2 * self.weights * self.rows * self.columns

    @property
    def tiles(self) -> int:
        return ceil(self.rows / _TILE) * ceil(self.columns / _TILE)

    @property
    def winograd_flop(self) -> int:
        """Of the products between transformed inputs and weights, of an image."""
        return 2 * 36 * self.inputs * self.outputs * self.tiles

    def transforms_flop(self, *, backward: bool = False) -> int:
        """Of an image's transforms, to Winograd's domain and back; backward, to the input."""
        before, after = self.inputs, self.outputs
        if backward:
            before, after = after, before
        return self.tiles * (before * _OF_INPUT + after * _OF_OUTPUT)


@dataclass(frozen=True)
class Setting:
    """The shape of an iteration."""

    channels: int = 3
    size: tuple[int, int] = (32, 32)
    classes: int = 10
    ipc: int = 10
    batch_real: int = 256
    depth: int = 3
    width: int = 128

    @property
    def blocks(self) -> list[Block]:
        """The ConvNet's: images of one channel are padded by 3 in its first convolution."""
        blocks = []
        inputs, (rows, columns) = self.channels, self.size
        for index in range(self.depth):
            grown = 4 if self.channels == 1 and index == 0 else 0
            block = Block(inputs, self.width, rows * columns, rows + grown, columns + grown)
            blocks.append(block)
            inputs, rows, columns = self.width, block.rows // 2, block.columns // 2
        return blocks

    @property
    def real(self) -> int:
        return self.classes * self.batch_real

    @property
    def synthetic(self) -> int:
        return self.classes * self.ipc

    @property
    def image_values(self) -> int:
        return self.channels * self.size[0] * self.size[1]

    @property
    def features(self) -> int:
        return self.blocks[-1].pooled_values

    @property
    def forward_flop(self) -> int:
        """Of the direct convolutions of an image."""
        return sum(block.flop for block in self.blocks)

    @property
    def iteration_flop(self) -> int:
        """Of the direct convolutions: real images forward, synthetic ones back to their pixels."""
        return (self.real + 2 * self.synthetic) * self.forward_flop

    def training_flop(self, images: int) -> int:
        """Of the direct convolutions and the linear layer: forward, and back to the weights.

        The first convolution needs no gradient of its input.
        """
        linear = 2 * self.features * self.classes
        return images * (3 * (self.forward_flop + linear) - self.blocks[0].flop)


@dataclass(frozen=True)
class Stage:
    """A part of an iteration.

    ``products`` are the convolutions' operations, ``other`` all others, ``bytes`` are read or
    written.
    """

    name: str
    products: int
    other: int
    bytes: int

    @property
    def flop(self) -> int:
        return self.products + self.other

    def seconds(self, flops: float, bandwidth: float) -> float:
        """At ``flops`` operations and ``bandwidth`` bytes a second, perfectly overlapped."""
        return max(self.flop / flops, self.bytes / bandwidth)


def stages(setting: Setting, element: int, *, winograd: bool = False) -> Iterator[Stage]:
    """The stages of an iteration.

    Real images come from uint8, the synthetic ones and their momentum are float32.

    Args:
        element: bytes a value of activations and weights: 2 for bfloat16, 4 for float32.
        winograd: by F(4x4, 3x3) in place of direct convolutions; the transforms count as ``other``.
    """
    real, synthetic = setting.real, setting.synthetic
    blocks = list(enumerate(setting.blocks, 1))

    def block_stage(name: str, block: Block, images: int, values: int, *, backward: bool) -> Stage:
        tail = (_TAIL_BACKWARD if backward else _TAIL_FORWARD) * block.convolved_values
        products, other = block.flop, tail
        of_weights = 0
        if winograd:
            products = block.winograd_flop
            other += block.transforms_flop(backward=backward)
            of_weights = block.inputs * block.outputs * _OF_WEIGHTS
        read_and_written = images * values + block.weights
        return Stage(
            name, images * products, images * other + of_weights, element * read_and_written
        )

    pixels = real * setting.image_values
    yield Stage("gather and augment real", 0, _GATHER * pixels, (1 + element) * pixels)
    for number, block in blocks:
        values = block.input_values + block.pooled_values
        yield block_stage(f"block {number} real", block, real, values, backward=False)

    pixels = synthetic * setting.image_values
    yield Stage("augment synthetic", 0, _SAMPLE * pixels, (4 + element) * pixels)
    for number, block in blocks:
        # The convolution's output is kept for the way back.
        values = block.input_values + block.pooled_values + block.convolved_values
        yield block_stage(f"block {number} synthetic", block, synthetic, values, backward=False)

    # Sums of all rows, and of each class the difference, its square and its gradient.
    rows, features = real + synthetic, setting.features
    values = (rows + synthetic) * features
    yield Stage("discrepancy", 0, (rows + 6 * setting.classes) * features, element * values)

    for number, block in reversed(blocks):
        values = block.pooled_values + block.convolved_values + block.input_values
        name = f"block {number} synthetic, backward"
        yield block_stage(name, block, synthetic, values, backward=True)
    yield Stage("augment synthetic, backward", 0, _SAMPLE * pixels, (4 + element) * pixels)
    # Gradient read, momentum and images read and written.
    yield Stage("update", 0, 4 * pixels, 5 * 4 * pixels)


def table(parts: list[Stage], flops: float, bandwidth: float, iterations: int) -> str:
    """Of each stage the operations, the bytes and the time, and the sum of the times."""
    lines = [f"{'stage':30} {'GFLOP':>9} {'of products':>11} {'MB':>9} {'ms':>9}  bound by"]
    for part in parts:
        bound = "arithmetic" if part.flop / flops > part.bytes / bandwidth else "bytes"
        lines.append(
            f"{part.name:30} {part.flop / 1e9:9.3f} {part.products / 1e9:11.3f} "
            f"{part.bytes / 1e6:9.1f} {part.seconds(flops, bandwidth) * 1e3:9.3f}  {bound}"
        )
    total = sum(part.seconds(flops, bandwidth) for part in parts)
    flop, products = sum(p.flop for p in parts), sum(p.products for p in parts)
    moved = sum(p.bytes for p in parts)
    lines += [
        f"{'an iteration':30} {flop / 1e9:9.3f} {products / 1e9:11.3f} {moved / 1e6:9.1f} "
        f"{total * 1e3:9.3f}",
        f"{iterations} iterations: {iterations * total:.1f} s, of products alone "
        f"{iterations * products / flops:.1f} s",
    ]
    return "\n".join(lines)


def _shape(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"an image's shape is CxHxW, as 3x32x32, got {text!r}")
    channels, height, width = (int(side) for side in text.split("x"))
    return channels, height, width


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=_shape, default="3x32x32", metavar="CxHxW")
    for option, default in (
        *(("--classes", 10), ("--ipc", 10), ("--batch-real", 256)),
        *(("--depth", 3), ("--width", 128), ("--iterations", 20000)),
    ):
        parser.add_argument(option, type=int, default=default, help="default %(default)s")
    parser.add_argument("--precision", choices=ceilings.PRECISIONS, default="bfloat16")
    parser.add_argument("--winograd", action="store_true", help="F(4x4, 3x3), not direct")
    parser.add_argument(
        "--preset",
        choices=("h100", "cpu"),
        default="h100",
        help="h100: 798 TFLOP/s in bfloat16 and 3.0 TB/s, as measured; cpu: measured here and now",
    )
    parser.add_argument("--tflops", type=float, help="10^12 operations a second, for the preset's")
    parser.add_argument("--bandwidth", type=float, help="10^12 bytes a second, for the preset's")
    given = parser.parse_args(arguments)

    flops = given.tflops and given.tflops * 1e12
    bandwidth = given.bandwidth and given.bandwidth * 1e12
    if given.preset == "cpu":
        flops = flops or ceilings.arithmetic_rate(given.precision)
        bandwidth = bandwidth or ceilings.bandwidth()
    elif given.precision == "bfloat16":
        flops = flops or 798e12
    bandwidth = bandwidth or 3.0e12
    if flops is None:
        parser.error(f"no {given.precision} rate is known for {given.preset}; give --tflops")

    channels, *size = given.images
    setting = Setting(
        channels,
        tuple(size),
        given.classes,
        given.ipc,
        given.batch_real,
        given.depth,
        given.width,
    )
    element = 2 if given.precision == "bfloat16" else 4
    print(f"{flops / 1e12:.3f} TFLOP/s ({given.precision}), {bandwidth / 1e12:.3f} TB/s")
    parts = list(stages(setting, element, winograd=given.winograd))
    print(table(parts, flops, bandwidth, given.iterations))


if __name__ == "__main__":
    main()
