# SPDX-License-Identifier: MIT
"""Tensors whose elements lie more than 2^31 apart give the values of their compact copies.

The memory between the elements is reserved and never touched; tests of as many elements stand in
test_cuda.py.
"""

from __future__ import annotations

import mmap

import pytest
import torch
from cases import TABLES
from test_ops import MEAN, STD
from torch import Tensor

from dmfast import ops

FAR = 2**31
# Python names it from 3.13 on.
NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)


def untouched(elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros that take up memory only where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NO_RESERVE
    return torch.frombuffer(mmap.mmap(-1, elements * dtype.itemsize, flags=flags), dtype=dtype)


def spread(compact: Tensor, axis: int) -> Tensor:
    """The same values; the last along the axis more than 2^31 elements from the first."""
    inner = compact.select(axis, 0)
    stride = FAR // (compact.shape[axis] - 1) + inner.numel() + 1
    strides = list(inner.contiguous().stride())
    strides.insert(axis, stride)
    last = stride * (compact.shape[axis] - 1)
    memory = untouched(last + inner.numel(), compact.dtype)
    assert last > FAR
    return memory.as_strided(compact.shape, strides).copy_(compact)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("axis", range(4))
def test_siamese_augment(axis: int, dtype: torch.dtype, backward: bool) -> None:
    op = torch.ops.dmfast
    operator = op._siamese_augment_backward if backward else op.siamese_augment
    compact = torch.randn(7, 3, 6, 5).to(dtype)
    table = torch.cat([TABLES["each"], TABLES["all"]])
    far = spread(compact, axis)
    assert torch.equal(operator(far, table, None), operator(compact, table, None))


def test_the_gradient_of_images_that_lie_far_apart() -> None:
    compact = torch.randn(6, 3, 6, 5)
    gradients = []
    for x in (spread(compact, 0).requires_grad_(), compact.clone().requires_grad_()):
        ops.siamese_augment(x, TABLES["each"]).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
@pytest.mark.parametrize("axis", range(4))
def test_gather_augment(axis: int, dtype: torch.dtype) -> None:
    compact = torch.randint(0, 256, (5, 6, 7, 3)).to(dtype)
    index = torch.tensor([4, 0, 4, 2, 1, 3])
    rest = index, TABLES["each"], MEAN, STD, torch.float32
    far = spread(compact, axis)
    assert torch.equal(ops.gather_augment(far, *rest), ops.gather_augment(compact, *rest))


def test_gather_augment_from_more_than_two_to_the_31_images() -> None:
    one = torch.randint(0, 256, (1, 6, 7, 3)).byte()
    rest = TABLES["all"], MEAN, STD, torch.float32
    out = ops.gather_augment(one.expand(FAR + 9, 6, 7, 3), torch.tensor([FAR + 8, 0]), *rest)
    expected = ops.gather_augment(one, torch.tensor([0, 0]), *rest)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("axis", range(2))
def test_class_mean_discrepancy(axis: int, dtype: torch.dtype) -> None:
    real, syn = torch.randn(6, 9).to(dtype), torch.randn(4, 9).to(dtype)
    results = []
    for sides in ((real, syn), (spread(real, axis), spread(syn, axis))):
        inputs = [side.detach().requires_grad_() for side in sides]
        loss = ops.class_mean_discrepancy(*inputs, 2)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for compact, far in zip(*results, strict=True):
        assert torch.equal(compact, far)


def test_draw_batch() -> None:
    """Images whose place in the order, and whose number, pass 2^31."""
    order = untouched(FAR + 20, torch.int64)
    order[FAR - 5 : FAR + 20] = torch.arange(25) + 2**40
    starts, offsets = torch.tensor([FAR - 5, FAR + 4, FAR + 20]), torch.tensor([0, 6, 14])
    drawn = ops.draw_batch(order, starts, offsets, 14, 3, 4, stream=1)
    expected = ops.draw_batch(
        order[FAR - 5 :].clone(), starts - (FAR - 5), offsets, 14, 3, 4, stream=1
    )
    assert torch.equal(drawn, expected)
    assert drawn.min() >= 2**40


@pytest.mark.parametrize("axis", range(2))
def test_draw_weights(axis: int) -> None:
    tensors = [torch.zeros(3, 5), spread(torch.zeros(3, 5), axis)]
    for tensor in tensors:
        ops.draw_weights_([tensor], [1.0], 3, 4, networks=3, stream=3)
    assert torch.equal(*tensors)
    assert tensors[0].all()
