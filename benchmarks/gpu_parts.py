# SPDX-License-Identifier: MIT
"""Programs that benchmarks/gpu.py runs, each in a process of its own.

``operators`` calls every operator at small and odd sizes, for a tool of compute-sanitizer to watch;
what they give is the tests' to check. ``blocks`` times the blocks of the ConvNet, forward and
backward.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dmfast import ops
from dmfast.augment import DEFAULT_STRATEGY
from dmfast.matching import Matcher, initial_images
from dmfast.networks import get_network
from dmfast.profile import random_images, time_by_turns
from dmfast.roofline import Setting


def operators(device: torch.device) -> None:
    """Calls each operator, forward and backward where it has one, in float32 and bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        augment(device, dtype)
        discrepancy(device, dtype)
        blocks_of(device, dtype)
    draws(device)
    for precision in ("float32", "bfloat16"):
        iterations(device, precision)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def augment(device: torch.device, dtype: torch.dtype) -> None:
    groups, rows, size = 12, 3, (13, 9)
    params = ops.draw_augmentation(
        DEFAULT_STRATEGY, groups, size, 0, 0, stream=ops.Stream.AUGMENTATION, device=device
    )
    x = torch.randn(groups * rows, 3, *size, device=device).to(dtype).requires_grad_()
    for layout in (torch.contiguous_format, torch.channels_last):
        out = ops.siamese_augment(x.contiguous(memory_format=layout), params)
        torch.autograd.grad(out.float().sum(), x)
    images = torch.randint(0, 256, (20, *size, 3), dtype=torch.uint8, device=device)
    index = torch.arange(groups * rows, device=device) % len(images)
    mean, std = torch.full((2, 3), 0.5, device=device)
    ops.gather_augment(images, index, params, mean, std, dtype)


def discrepancy(device: torch.device, dtype: torch.dtype) -> None:
    for features in (7, 2048):
        real = torch.randn(50, features, device=device).to(dtype)
        synthetic = torch.randn(15, features, device=device).to(dtype).requires_grad_()
        loss = ops.class_mean_discrepancy(real, synthetic, 5)
        torch.autograd.grad(loss, synthetic)


def blocks_of(device: torch.device, dtype: torch.dtype) -> None:
    """The blocks at sizes that are no multiples of a tile, and the tail alone."""
    for channels, filters, size in ((3, 128, (32, 32)), (128, 128, (16, 16)), (128, 128, (9, 7))):
        x = torch.randn(3, channels, *size, device=device).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        weight, scale, bias = (
            torch.randn(shape, device=device).requires_grad_()
            for shape in ((filters, channels, 3, 3), (filters,), (filters,))
        )
        out = ops.conv_norm_relu_pool(x, weight, scale, bias)
        torch.autograd.grad(out.float().sum(), (x, weight, scale, bias))
    x = torch.randn(3, 128, 9, 7, device=device).to(dtype).requires_grad_()
    torch.autograd.grad(ops.instance_norm_relu_pool(x).float().sum(), x)


def draws(device: torch.device) -> None:
    step = torch.tensor([3], device=device)
    order = torch.arange(100, device=device)
    class_offsets = torch.tensor([0, 60, 100], device=device)
    offsets = torch.tensor([0, 20, 40], device=device)
    ops.draw_batch(order, class_offsets, offsets, 40, 0, step, stream=ops.Stream.REAL_BATCH)
    tensors = [torch.empty(7, 3, 3, 3, device=device), torch.empty(5, device=device)]
    ops.draw_weights_(tensors, [0.1, 0.2], 0, step, stream=ops.Stream.WEIGHTS)


def iterations(device: torch.device, precision: str) -> None:
    """Two of a small set, in a network of the full width, with ``convnet_class_mean`` in it."""
    data = random_images((3, 16, 16), classes=2, per_class=9)
    matcher = Matcher(
        data,
        get_network("ConvNetD2", data.channels, data.classes, data.size, seed=0),
        initial_images(data, 3, "real", seed=0),
        batch_real=7,
        strategy=DEFAULT_STRATEGY,
        seed=0,
        lr=1.0,
        momentum=0.5,
        precision=precision,
        device=device,
    )
    for step in range(2):
        matcher.step(step)


def blocks(device: torch.device, images: int, calls: int) -> dict[str, Any]:
    """Of each block of the CIFAR-10 ConvNet: ms forward, and forward and backward to the images.

    In bfloat16 and channels_last, the network's weights float32 and fixed, as in an iteration.
    """
    found: dict[str, Any] = {}
    for number, block in enumerate(Setting().blocks, 1):
        shape = (images, block.inputs, block.rows, block.columns)
        x = torch.randn(shape, device=device).to(torch.bfloat16)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(block.outputs, block.inputs, 3, 3, device=device) / 9
        scale, bias = (
            torch.ones(block.outputs, device=device),
            torch.zeros(block.outputs).to(device),
        )

        def forward(x: Tensor = x, rest: tuple[Tensor, ...] = (weight, scale, bias)) -> Tensor:
            return ops.conv_norm_relu_pool(x, *rest, precision="bfloat16")

        of_images = x.detach().requires_grad_()
        upstream = torch.randn_like(forward())

        def backward(
            x: Tensor = of_images,
            run: Callable[[Tensor], Tensor] = forward,
            upstream: Tensor = upstream,
        ) -> None:
            torch.autograd.grad(run(x), x, upstream)

        runs = {"forward": forward, "forward and backward": backward}
        for run in runs.values():
            run()
        times = time_by_turns(runs, device, rounds=10, calls=dict.fromkeys(runs, calls))
        for way, passes in (("forward", 1), ("forward and backward", 2)):
            seconds = times[way]["median"]
            found[f"block {number} {way}"] = {
                "ms": seconds * 1e3,
                "flop_per_second": passes * images * block.flop / seconds,
            }
    return {"images": images, "blocks": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_operators = commands.add_parser("operators", help="call every operator")
    of_blocks = commands.add_parser("blocks", help="time the ConvNet's blocks")
    for command in (of_operators, of_blocks):
        command.add_argument("--device", type=torch.device, default="cuda")
    of_blocks.add_argument("--images", type=int, default=2560)
    of_blocks.add_argument("--calls", type=int, default=20)
    of_blocks.add_argument("--json", type=Path, required=True)
    given = parser.parse_args()
    if given.command == "operators":
        operators(given.device)
    else:
        found = blocks(given.device, given.images, given.calls)
        given.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
