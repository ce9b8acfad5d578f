# SPDX-License-Identifier: MIT
"""The operations and bytes of an iteration of distribution matching, stage by stage.

Bytes are those of fused blocks, each of which reads its input and writes its pooled output once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil

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
    """The shape of an iteration.

    ``real_rows`` are all its real images, where some classes have fewer than ``batch_real``.
    """

    channels: int = 3
    size: tuple[int, int] = (32, 32)
    classes: int = 10
    ipc: int = 10
    batch_real: int = 256
    depth: int = 3
    width: int = 128
    real_rows: int | None = None

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
        return self.classes * self.batch_real if self.real_rows is None else self.real_rows

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

    ``of`` is the stage of :data:`dmfast._ranges.STAGES` that it belongs to, ``products`` are the
    convolutions' operations, ``other`` all others, ``bytes`` are read or written.
    """

    of: str
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

    def block_stage(
        of: str, name: str, block: Block, images: int, values: int, *, backward: bool
    ) -> Stage:
        tail = (_TAIL_BACKWARD if backward else _TAIL_FORWARD) * block.convolved_values
        products, other = block.flop, tail
        of_weights = 0
        if winograd:
            products = block.winograd_flop
            other += block.transforms_flop(backward=backward)
            of_weights = block.inputs * block.outputs * _OF_WEIGHTS
        read_and_written = images * values + block.weights
        return Stage(
            of, name, images * products, images * other + of_weights, element * read_and_written
        )

    weights = sum(block.weights + 2 * block.outputs for _, block in blocks)
    yield Stage("weights", "weights", 0, 0, 4 * weights)
    # Of each real image its place in the order and its index; of each class a row of 13 numbers.
    yield Stage("draw", "draw", 0, 0, 16 * real + 4 * 13 * setting.classes)

    pixels = real * setting.image_values
    yield Stage("real pass", "gather and augment real", 0, _GATHER * pixels, (1 + element) * pixels)
    for number, block in blocks:
        values = block.input_values + block.pooled_values
        name = f"block {number} real"
        yield block_stage("real pass", name, block, real, values, backward=False)

    pixels = synthetic * setting.image_values
    augment = 0, _SAMPLE * pixels, (4 + element) * pixels
    yield Stage("synthetic forward", "augment synthetic", *augment)
    for number, block in blocks:
        # The convolution's output is kept for the way back.
        values = block.input_values + block.pooled_values + block.convolved_values
        name = f"block {number} synthetic"
        yield block_stage("synthetic forward", name, block, synthetic, values, backward=False)

    # Sums of all rows, and of each class the difference, its square and, backward, its gradient.
    rows, features = real + synthetic, setting.features
    of_means = 3 * setting.classes * features
    operations = rows * features + of_means
    yield Stage("discrepancy", "discrepancy", 0, operations, element * rows * features)
    moved = element * synthetic * features
    yield Stage("backward", "discrepancy, backward", 0, of_means, moved)

    for number, block in reversed(blocks):
        values = block.pooled_values + block.convolved_values + block.input_values
        name = f"block {number} synthetic, backward"
        yield block_stage("backward", name, block, synthetic, values, backward=True)
    yield Stage("backward", "augment synthetic, backward", *augment)
    # Gradient read, momentum and images read and written.
    yield Stage("update", "update", 0, 4 * pixels, 5 * 4 * pixels)


def by_range(parts: Iterable[Stage]) -> dict[str, Stage]:
    """The stages of each range (:data:`dmfast._ranges.STAGES`) as one, in their order."""
    groups: dict[str, list[Stage]] = {}
    for part in parts:
        groups.setdefault(part.of, []).append(part)
    return {of: total(of, group) for of, group in groups.items()}


def total(name: str, parts: Iterable[Stage]) -> Stage:
    """The stages as one of that name."""
    counts = [(part.products, part.other, part.bytes) for part in parts]
    products, other, moved = (sum(column) for column in zip(*counts, strict=True))
    return Stage(name, name, products, other, moved)
