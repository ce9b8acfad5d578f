# SPDX-License-Identifier: MIT
"""The least time that an iteration of distribution matching can take: operations and bytes.

``python benchmarks/roofline.py --images 3x32x32 --ipc 50 --preset h100 --iterations 20000`` prints
every stage's floating-point operations, bytes to and from memory, and the larger of the two times
(:mod:`dmfast.roofline`). ``... readme`` puts the table of predicted times, beside those measured by
``make gpu``, into the README.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tables import README, RESULTS, markdown, with_content

from dmfast import ceilings
from dmfast.roofline import Setting, Stage, stages

#: Measured elsewhere, on an H100: operations a second in bfloat16, bytes a second.
H100 = 798e12, 3.0e12
RESULT = RESULTS / "gpu.json"
ITERATIONS = 20_000  # the paper's
#: Of the README's table, by the names of benchmarks/gpu.py's steps.
CASES = {
    "cifar10-ipc10": ("CIFAR-10", Setting(ipc=10)),
    "cifar10-ipc50": ("CIFAR-10", Setting(ipc=50)),
    "cifar100-ipc10": ("CIFAR-100", Setting(classes=100, ipc=10)),
    "tiny-imagenet-ipc50": (
        "TinyImageNet",
        Setting(size=(64, 64), classes=200, ipc=50, depth=4),
    ),
    "mnist-ipc10": ("MNIST", Setting(channels=1, size=(28, 28), ipc=10)),
}


def stage_table(parts: list[Stage], flops: float, bandwidth: float, iterations: int) -> str:
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


def options(setting: Setting) -> str:
    """Those of ``python -m dmfast.profile`` for random images of that setting."""
    images = "x".join(map(str, (setting.channels, *setting.size)))
    return f"--images {images} --classes {setting.classes} --ipc {setting.ipc}"


def table(path: Path = RESULT) -> str:
    """The README's: what an H100 would take at least, and what was measured if anything was."""
    result = json.loads(path.read_text()) if path.exists() else {"steps": {}}
    header = ("set", "images a class", "network", "an iteration, at least", "20,000 iterations")
    rows = []
    for name, (title, setting) in CASES.items():
        parts = list(stages(setting, element=2))
        seconds = sum(part.seconds(*H100) for part in parts)
        products = sum(part.products for part in parts) / H100[0]
        rows.append(
            (
                *(title, str(setting.ipc), f"ConvNet-{setting.depth}", f"{seconds * 1e3:.2f} ms"),
                f"{ITERATIONS * seconds:.1f} s, of that products {ITERATIONS * products:.1f} s",
                _measured(result["steps"].get(name, {}).get("result")),
            )
        )
    note = (
        "At least: on an H100 of 798 TFLOP/s in bfloat16, taken for every operation, and 3.0 TB/s "
        "(both measured elsewhere), each stage at the larger of its two times, operations and "
        "bytes perfectly overlapped, and nothing between the stages; 256 real images a class. "
        "`python benchmarks/roofline.py` has the stages."
    )
    if path.exists():
        note += (
            f" Measured: {result['machine']['gpu']}, torch {result['versions']['torch']}, "
            f"{result['date']}: `{result['command']}`."
        )
    return f"{markdown((*header, 'measured'), rows)}\n{note}\n"


def _measured(result: dict[str, Any] | None) -> str:
    if result is None:
        return "not yet measured"
    made = result["iterations"]
    if made >= ITERATIONS:
        return f"{result['seconds'] * ITERATIONS / made:.1f} s"
    return f"{result['median'] * ITERATIONS:.1f} s, from the time of {made} iterations"


def with_table(readme: str) -> str:
    """The README with the present table between its marks."""
    return with_content(readme, "roofline", table())


def _shape(text: str) -> tuple[int, int, int]:
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise argparse.ArgumentTypeError(f"an image's shape is CxHxW, as 3x32x32, got {text!r}")
    channels, height, width = (int(side) for side in text.split("x"))
    return channels, height, width


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs="?", choices=("print", "readme"), default="print")
    parser.add_argument("--images", type=_shape, default="3x32x32", metavar="CxHxW")
    for option, default in (
        *(("--classes", 10), ("--ipc", 10), ("--batch-real", 256)),
        *(("--depth", 3), ("--width", 128), ("--iterations", ITERATIONS)),
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

    if given.command == "readme":
        README.write_text(with_table(README.read_text()))
        return
    flops = given.tflops and given.tflops * 1e12
    bandwidth = given.bandwidth and given.bandwidth * 1e12
    if given.preset == "cpu":
        flops = flops or ceilings.arithmetic_rate(given.precision)
        bandwidth = bandwidth or ceilings.bandwidth()
    elif given.precision == "bfloat16":
        flops = flops or H100[0]
    bandwidth = bandwidth or H100[1]
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
    print(stage_table(parts, flops, bandwidth, given.iterations))


if __name__ == "__main__":
    main()
