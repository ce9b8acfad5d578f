# SPDX-License-Identifier: MIT
"""Where the time of an iteration on the CPU goes, block by block, beside the least it could take.

``python benchmarks/stages.py run --json FILE`` times the parts of an iteration by themselves, and
the iteration, by turns, with freed pages kept. The parts of the real pass are differences: of the
pass through one block, two and three. The floor is that of :mod:`dmfast.roofline`: the products and
the transforms at the rate between registers of that precision and of float32, overlapped with the
bytes at a copy's rate. ``... readme`` puts the table of ``results/stages-cpu.json`` in the README.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from iteration import PRECISIONS, random_images
from tables import README, RESULTS, markdown, with_content

from dmfast import ceilings, devices, ops, roofline
from dmfast._baselines import CPU
from dmfast.augment import DEFAULT_STRATEGY
from dmfast.matching import Matcher, descend_, initial_images
from dmfast.memory import keep_freed_pages
from dmfast.networks import get_network, initialise_

RESULT = RESULTS / "stages-cpu.json"
SETTING = roofline.Setting()
_STREAM = ops.Stream.AUGMENTATION


def parts(precision: str) -> dict[str, Callable[[], object]]:
    """The parts of an iteration by name, each to be timed; and ``iteration``, the whole."""
    data = random_images(SETTING)
    network, drawn, matched = (
        get_network("ConvNet", data.channels, data.classes, data.size, seed=0).requires_grad_(False)
        for _ in range(3)
    )
    images = initial_images(data, SETTING.ipc, "real", seed=0)
    order, class_offsets = data.by_class()
    offsets, rows = data.batch_offsets(SETTING.batch_real)
    mean, std = torch.tensor(data.mean), torch.tensor(data.std)
    index = ops.draw_batch(order, class_offsets, offsets, rows, 0, 0, stream=ops.Stream.REAL_BATCH)
    params = ops.draw_augmentation(DEFAULT_STRATEGY, data.classes, data.size, 0, 0, stream=_STREAM)
    blocks = network.fused_blocks(CPU)
    if blocks is None:
        raise SystemExit("stages: DMFAST_CPU has the blocks go by torch's layers")
    real = (data.train_images, index, offsets, params, mean, std)

    def draw() -> None:
        initialise_(drawn, 0, 1)
        ops.draw_batch(order, class_offsets, offsets, rows, 0, 1, stream=ops.Stream.REAL_BATCH)
        ops.draw_augmentation(DEFAULT_STRATEGY, data.classes, data.size, 0, 1, stream=_STREAM)

    def gather() -> torch.Tensor:
        return ops.gather_augment(*real[:2], params, mean, std, torch.float32, offsets)

    def real_pass(depth: int) -> Callable[[], torch.Tensor]:
        weights = [weight for block in blocks[:depth] for weight in block.weights]
        return lambda: ops.convnet_class_mean(*real, weights, precision=precision)

    # Of the synthetic images: every block's forward, and the backward of its own graph.
    inputs = [images]
    for block in blocks:
        inputs.append(ops.conv_norm_relu_pool(inputs[-1], *block.weights, precision=precision))

    def forward(number: int) -> torch.Tensor:
        x = inputs[number].detach().requires_grad_()
        weights = blocks[number].weights
        return ops.conv_norm_relu_pool(x, *weights, precision=precision)

    means = torch.randn(data.classes, inputs[-1][0].numel())
    ends = torch.arange(data.classes + 1)

    def loss() -> None:
        embedded = inputs[-1].flatten(1).detach().requires_grad_()
        ops.class_mean_discrepancy(means, embedded, data.classes, ends).backward()

    def augment() -> torch.Tensor:
        return ops.siamese_augment(images.detach().requires_grad_(), params)

    def backward(make: Callable[[], torch.Tensor]) -> Callable[[], None]:
        out = make()
        gradient = torch.randn_like(out)
        return lambda: out.backward(gradient, retain_graph=True)

    moved, momentum, gradient = (torch.randn_like(images) for _ in range(3))
    matcher = Matcher(
        data,
        matched,
        images,
        **{"batch_real": SETTING.batch_real, "strategy": DEFAULT_STRATEGY, "seed": 0},
        **{"lr": 1.0, "momentum": 0.5, "precision": precision, "device": CPU},
    )
    steps = itertools.count()
    made: dict[str, Callable[[], object]] = {"draw": draw, "gather and augment real": gather}
    depths = range(1, len(blocks) + 1)
    made |= {f"through block {depth} real": real_pass(depth) for depth in depths}
    made["augment synthetic"] = augment
    for number in range(len(blocks)):
        made[f"block {number + 1} synthetic"] = lambda number=number: forward(number)
    made["discrepancy"] = loss
    for number in reversed(range(len(blocks))):
        made[f"block {number + 1} synthetic, backward"] = backward(
            lambda number=number: forward(number)
        )
    made["augment synthetic, backward"] = backward(augment)
    made["update"] = lambda: descend_(moved, momentum, gradient, 1e-3, 0.5)
    made["iteration"] = lambda: matcher.step(next(steps))
    return made


def measure(precision: str, seconds: float) -> dict[str, float]:
    """Median seconds of each part and of the iteration, which take turns."""
    made = parts(precision)
    times: dict[str, list[float]] = {name: [] for name in made}
    for run in made.values():
        run()
    begin = time.perf_counter()
    while len(times["iteration"]) < 5 or time.perf_counter() - begin < seconds:
        for name, run in made.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(of_part) for name, of_part in times.items()}
    found = {"draw": medians.pop("draw")}
    before = medians.pop("gather and augment real")
    found["gather and augment real"] = before
    for depth in range(1, SETTING.depth + 1):
        through = medians.pop(f"through block {depth} real")
        found[f"block {depth} real"] = through - before
        before = through
    return found | medians


def floors(precision: str, rates: dict[str, float | None], bandwidth: float) -> dict[str, float]:
    """Seconds that the parts take at least: products in ``precision``, all else in float32."""
    products, other = rates[precision], rates["float32"]
    if products is None or other is None:
        raise SystemExit(f"stages: this CPU has no products of {precision}")
    measured_with = {"weights": "draw", "discrepancy, backward": "discrepancy"}
    found: dict[str, float] = {}
    for stage in roofline.stages(SETTING, 4, winograd=True):
        name = measured_with.get(stage.name, stage.name)
        arithmetic = stage.products / products + stage.other / other
        found[name] = found.get(name, 0.0) + max(arithmetic, stage.bytes / bandwidth)
    return found


def run(seconds: float) -> dict[str, Any]:
    """Of both precisions the measured and the least seconds of each part."""
    if not keep_freed_pages():
        raise SystemExit("stages: this C library's allocator cannot keep freed pages")
    rates = {precision: ceilings.arithmetic_rate(precision) for precision in PRECISIONS}
    bandwidth = ceilings.bandwidth()
    return {
        "command": "python benchmarks/stages.py " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": devices.machine(CPU),
        "versions": devices.versions(),
        "rate": rates,
        "bandwidth": bandwidth,
        "seconds": {precision: measure(precision, seconds) for precision in PRECISIONS},
        "floor": {precision: floors(precision, rates, bandwidth) for precision in PRECISIONS},
    }


def table(path: Path = RESULT) -> str:
    """The README's table of the committed result; "" without one."""
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    seconds, floor = result["seconds"], result["floor"]
    names = [name for name in seconds["float32"] if name != "iteration"]
    header = ["part", *(f"{p}: {what}" for p in PRECISIONS for what in ("measured", "least"))]

    def cells(measured: dict[str, float], least: dict[str, float]) -> list[str]:
        return [
            f"{1e3 * of_precision:.1f} ms"
            for p in PRECISIONS
            for of_precision in (measured[p], least[p])
        ]

    rows = [
        [name, *cells(*({p: by[p].get(name, 0.0) for p in PRECISIONS} for by in (seconds, floor)))]
        for name in names
    ]
    sums = {p: sum(seconds[p][name] for name in names) for p in PRECISIONS}
    least = {p: sum(floor[p].values()) for p in PRECISIONS}
    rows.append(["sum of the parts", *cells(sums, least)])
    rows.append(["the iteration", *cells({p: seconds[p]["iteration"] for p in PRECISIONS}, least)])
    note = (
        f"{result['machine']['processor']}, {result['machine']['threads']} threads, "
        f"{result['date']}: `{result['command']}`"
    )
    return f"{markdown(header, rows)}\n{note}\n"


def with_table(readme: str) -> str:
    """The README with the present table between its marks."""
    return with_content(readme, "stages", table())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="time, and print or write the result")
    runner.add_argument("--seconds", type=float, default=20, help="of rounds a precision")
    runner.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    commands.add_parser("readme", help=f"put the table of {RESULT.name} into the README")
    given = parser.parse_args()
    if given.command == "readme":
        README.write_text(with_table(README.read_text()))
        return
    result = json.dumps(run(given.seconds), indent=1) + "\n"
    if given.json:
        given.json.write_text(result)
    else:
        print(result, end="")


if __name__ == "__main__":
    main()
