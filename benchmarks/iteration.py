# SPDX-License-Identifier: MIT
"""The time of an iteration, of a training step and of a block, beside two baselines, on the CPU.

``python benchmarks/iteration.py run`` times dmfast, the published algorithm and a tidied one
(:mod:`dmfast._baselines`) by turns in one process, then again in a process that keeps freed pages
(:mod:`dmfast.memory`), and prints medians, ratios, and operations a second beside what the CPU can
do between registers. The images are random: their values do not change the time. Compiling, and
choosing the tidied baseline's fastest form, come before the first round.
``... readme`` puts the tables of ``results/iteration-cpu*.json`` into the README.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from baselines_matching import PublishedGradientMatching, TidiedGradientMatching
from tables import README, RESULTS, markdown, with_content
from torch import nn

from dmfast import _baselines as baselines
from dmfast import ceilings, devices, ops, profile
from dmfast._baselines import CPU
from dmfast._stack import NetworkStack
from dmfast.augment import DEFAULT_STRATEGY, DIGITS_STRATEGY
from dmfast.data import ImageData
from dmfast.gradient_matching import LOOPS, GradientMatcher, Loops
from dmfast.matching import Matcher, initial_images
from dmfast.memory import keep_freed_pages
from dmfast.networks import get_network
from dmfast.profile import time_by_turns
from dmfast.roofline import Block, Setting
from dmfast.training import train

Run = Callable[[], torch.Tensor | None]  # of an iteration: its loss

PUBLISHED = "published"
PAGES = {"as-is": "pages as they are", "kept": "freed pages kept"}
# How far the losses of an iteration may lie apart, the tidied one's and dmfast's.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}
PRECISIONS = ceilings.PRECISIONS
RESULT = RESULTS / "iteration-cpu.json"
_REAL_IMAGES = 1000  # a class, to draw from
_BLOCK_IMAGES = 256


@dataclass(frozen=True)
class Case:
    """Something that is timed.

    Attributes:
        flop: of a unit, its convolutions direct.
        units: how many a call of a contender's run makes.
        contenders: ``published``, and ``tidied`` and ``dmfast`` in each precision: what makes each.
    """

    title: str
    flop: int
    units: int
    contenders: dict[str, Callable[[], Run]]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _both(contender: str, make: Callable[[str], Run]) -> dict[str, Callable[[], Run]]:
    return {f"{contender} {precision}": partial(make, precision) for precision in PRECISIONS}


# ---- the cases ---------------------------------------------------------------------------------


def random_images(setting: Setting) -> ImageData:
    """A training set of that shape, for times: 1,000 images a class."""
    shape = (setting.channels, *setting.size)
    return profile.random_images(shape, setting.classes, _REAL_IMAGES)


def _strategy(setting: Setting) -> str:
    return DIGITS_STRATEGY if setting.channels == 1 else DEFAULT_STRATEGY


def iteration_case(setting: Setting, norm: str = "") -> Case:
    """One iteration of distribution matching."""
    model, strategy = f"ConvNetD{setting.depth}{norm}", _strategy(setting)
    shape = "x".join(map(str, (setting.channels, *setting.size)))
    title = (
        f"iteration, {setting.ipc} images a class of {shape}, {setting.classes} x "
        f"{setting.batch_real} real, ConvNet-{setting.depth}{norm and f' with {norm}'}"
    )

    def start() -> tuple[ImageData, torch.Tensor]:
        data = random_images(setting)
        return data, initial_images(data, setting.ipc, "real", seed=0)

    def published() -> Run:
        data, images = start()
        return baselines.PublishedIteration(
            data, model, images, batch_real=setting.batch_real, strategy=strategy
        ).step

    def tidied(precision: str) -> Run:
        data, images = start()
        options = {"batch_real": setting.batch_real, "strategy": strategy, "seed": 0}
        iteration = baselines.TidiedIteration(data, model, images, precision=precision, **options)
        _say(f"{title}: tidied {precision}: {iteration.forms}")
        steps = itertools.count()
        return lambda: iteration.step(next(steps))

    def ours(precision: str) -> Run:
        data, images = start()
        matcher = Matcher(
            data,
            get_network(model, data.channels, data.classes, data.size, seed=0),
            images,
            batch_real=setting.batch_real,
            strategy=strategy,
            seed=0,
            lr=1.0,
            momentum=0.5,
            precision=precision,
            device=CPU,
        )
        steps = itertools.count()
        return lambda: matcher.step(next(steps))

    contenders = {PUBLISHED: published, **_both("tidied", tidied), **_both("dmfast", ours)}
    return Case(title, setting.iteration_flop, 1, contenders)


def training_case(images: int, networks: int = 1, steps: int = 2) -> Case:
    """A step of training a ConvNet-3 on a set of one batch, augmentation included.

    Args:
        networks: as many are trained at once by dmfast, one after another by the others; the times
            are those of one.
    """
    setting = Setting()
    model, strategy = "ConvNet", _strategy(setting)
    title = f"training step, {images} images of 3x32x32, ConvNet-3"
    if networks > 1:
        title += f", of {networks} networks at once: one of them"

    def start() -> tuple[ImageData, torch.Tensor, torch.Tensor]:
        data = random_images(setting)
        return data, data.normalise(data.train_images[:images]), data.train_labels[:images]

    def repeated(epoch: Run) -> Run:
        def run() -> None:
            for _ in range(steps * networks):
                epoch()

        return run

    def published() -> Run:
        data, *batch = start()
        return repeated(baselines.PublishedTraining(data, model, *batch, strategy).epoch)

    def tidied(precision: str) -> Run:
        data, *batch = start()
        training = baselines.TidiedTraining(data, model, *batch, strategy, precision=precision)
        _say(f"{title}: tidied {precision}: {training.form}")
        return repeated(training.epoch)

    def ours(precision: str) -> Run:
        data, *batch = start()
        network = get_network(model, data.channels, data.classes, data.size, seed=0)
        trained: nn.Module = network
        if networks > 1:
            trained = NetworkStack(network, networks)
            trained.initialise_(0, 0, ops.Stream.EVALUATION_WEIGHTS)
        options = {"epochs": steps - 1, "seed": 0, "strategy": strategy, "precision": precision}
        return lambda: train(trained, *batch, networks=networks, **options)

    contenders = {PUBLISHED: published, **_both("tidied", tidied), **_both("dmfast", ours)}
    return Case(title, setting.training_flop(images), steps * networks, contenders)


def gradient_matching_case(ipc: int, loops: Loops) -> Case:
    """A round of DSA: all classes' gradients are matched, and the network trained for the next."""
    setting = Setting(ipc=ipc)
    model, strategy = "ConvNet", _strategy(setting)
    trained = loops.inner * (loops.outer - 1) / loops.outer
    title = (
        f"round of DSA, {ipc} images a class of 3x32x32, 10 x 256 real, ConvNet-3, "
        f"{trained:g} epochs of training"
    )
    options: dict[str, Any] = {"batch_real": setting.batch_real, "strategy": strategy}
    options["loops"] = loops

    def start() -> tuple[ImageData, torch.Tensor]:
        data = random_images(setting)
        return data, initial_images(data, ipc, "real", seed=0)

    def published() -> Run:
        data, images = start()
        return PublishedGradientMatching(data, model, images, **options).step

    def numbered(matcher: GradientMatcher) -> Run:
        steps = itertools.count()
        return lambda: matcher.step(next(steps))

    rates: dict[str, Any] = {"seed": 0, "lr": 0.1, "momentum": 0.5}

    def tidied(precision: str) -> Run:
        matcher = TidiedGradientMatching(
            start()[0], model, start()[1], precision=precision, **rates, **options
        )
        _say(f"{title}: tidied {precision}: {matcher.form}")
        return numbered(matcher)

    def ours(precision: str) -> Run:
        data, images = start()
        network = get_network(model, data.channels, data.classes, data.size, seed=0)
        return numbered(
            GradientMatcher(
                data, network, images, precision=precision, device=CPU, **rates, **options
            )
        )

    # The synthetic images' pass is differentiated twice: about as much as two trainings.
    synthetic = 2 * setting.training_flop(setting.synthetic)
    flop = setting.training_flop(setting.real) + synthetic
    flop += round(trained * setting.training_flop(setting.synthetic))
    contenders = {PUBLISHED: published, **_both("tidied", tidied), **_both("dmfast", ours)}
    return Case(title, flop, loops.outer, contenders)


class TorchBlock(nn.Module):
    """A block of the ConvNet out of torch's layers."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm = nn.GroupNorm(outputs, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.avg_pool2d(nn.functional.relu_(self.norm(self.convolution(x))), 2)


def block_case(inputs: int, side: int, *, backward: bool, calls: int = 2) -> Case:
    """A block to 128 channels, forward, or forward and backward to images and weights."""
    block = Block(inputs, 128, side * side, side, side)
    way = "forward and backward" if backward else "forward"
    title = f"block {inputs}x{side}x{side} to 128, {way}, {_BLOCK_IMAGES} images"

    def run(precision: str, kind: str) -> Run:
        torch.manual_seed(0)
        layers = TorchBlock(inputs, block.outputs).requires_grad_(backward)
        x = torch.randn(_BLOCK_IMAGES, inputs, side, side, requires_grad=backward)
        upstream = torch.randn(_BLOCK_IMAGES, block.outputs, side // 2, side // 2)

        def of_torch(x: torch.Tensor) -> torch.Tensor:
            with devices.autocast(CPU, precision):
                return layers(x)

        def of_dmfast(x: torch.Tensor) -> torch.Tensor:
            norm = layers.norm
            return ops.conv_norm_relu_pool(
                x, layers.convolution.weight, norm.weight, norm.bias, precision=precision
            )

        def use(form: Callable[[torch.Tensor], torch.Tensor]) -> None:
            out = form(x)
            if backward:
                out.backward(upstream.to(out.dtype))

        form = of_dmfast if kind == "dmfast" else of_torch
        if kind == "tidied":
            name, form = baselines.fastest(of_torch, use, compiled=True)
            _say(f"{title}: tidied {precision}: {name}")

        def repeated() -> None:
            for _ in range(calls):
                use(form)

        return repeated

    contenders = {
        PUBLISHED: partial(run, "float32", PUBLISHED),
        **_both("tidied", partial(run, kind="tidied")),
        **_both("dmfast", partial(run, kind="dmfast")),
    }
    return Case(title, _BLOCK_IMAGES * block.flop * (3 if backward else 1), calls, contenders)


def _cases() -> Iterator[tuple[str, Case]]:
    for ipc in (1, 10, 50):
        yield f"3x32x32-ipc{ipc}", iteration_case(Setting(ipc=ipc))
    yield "3x32x32-ipc10-64", iteration_case(Setting(batch_real=64))  # the fast preset
    yield "3x32x32-ipc10-BN", iteration_case(Setting(), "BN")
    for ipc in (1, 10, 50):
        yield f"1x28x28-ipc{ipc}", iteration_case(Setting(channels=1, size=(28, 28), ipc=ipc))
    for ipc in (1, 10, 50):  # of two classes: an image costs four times one of 32x32
        setting = Setting(size=(64, 64), classes=2, ipc=ipc, depth=4)
        yield f"3x64x64-ipc{ipc}", iteration_case(setting)
    # TinyImageNet's, for its memory: a round of all contenders takes minutes.
    setting = Setting(size=(64, 64), classes=200, depth=4)
    yield "3x64x64-ipc10-200-classes", iteration_case(setting)
    for images in (100, 256):
        yield f"training-{images}", training_case(images)
    for ipc in (1, 10, 50):  # as dmfast.evaluate trains them
        images = min(10 * ipc, 256)
        networks = min(512 // images, 20)
        # As many steps that making an optimizer, once a training, does not count.
        yield f"evaluation-ipc{ipc}", training_case(images, networks, steps=max(2, 100 // images))
    yield "dsa-ipc1", gradient_matching_case(1, LOOPS[1])
    # Of ten rounds two are made, with the training between them.
    yield "dsa-ipc10", gradient_matching_case(10, Loops(2, LOOPS[10].inner))
    for inputs, side in ((3, 32), (128, 16), (128, 8)):
        for backward in (False, True):
            name = f"block-{inputs}x{side}x{side}" + ("-backward" if backward else "")
            yield name, block_case(inputs, side, backward=backward)


CASES = dict(_cases())
# Every ipc of every shape would take longer than the ten minutes that a run may.
_DEFAULT = [
    name for name in CASES if not name.startswith(("1x28x28-ipc", "3x64x64-ipc", "dsa", "eval"))
]
_DEFAULT += ["1x28x28-ipc10", "3x64x64-ipc10"]
_QUICK = ["3x32x32-ipc10", "training-256", "block-128x16x16-backward"]


# ---- timing ------------------------------------------------------------------------------------


def time_case(case: Case, seconds: float) -> dict[str, dict[str, float]]:
    """Median, minimum and maximum of each contender, in seconds a unit.

    All take turns for at least three rounds, and until ``seconds`` are over, after one round that
    is not timed. There the tidied iteration and dmfast's must come to the same loss.
    """
    torch._dynamo.reset()  # else the compiled forms of the cases before count against its limit
    runs = {name: make() for name, make in case.contenders.items()}
    first = {name: run() for name, run in runs.items()}
    for precision, tolerance in _TOLERANCE.items():
        losses = [first[f"{contender} {precision}"] for contender in ("tidied", "dmfast")]
        if None not in losses:
            torch.testing.assert_close(*losses, rtol=tolerance, atol=0)
    times = time_by_turns(runs, CPU, seconds=seconds, units=case.units)
    return {
        name: {key: t[key] for key in ("median", "min", "max", "rounds")}
        for name, t in times.items()
    }


def time_cases(names: list[str], pages: str, seconds: float) -> dict[str, Any]:
    """All of these in this process: ``times`` by case and contender, and ``rate`` of the CPU.

    The rate is the best of measurements before each case, between which other work may come and go.
    """
    if pages == "kept" and not keep_freed_pages():
        raise SystemExit("--pages kept: this C library's allocator cannot; it needs glibc")
    rates: dict[str, list[float]] = {precision: [] for precision in PRECISIONS}
    times = {}
    for name in names:
        for precision, measured in rates.items():
            if rate := ceilings.arithmetic_rate(precision):
                measured.append(rate)
        times[name] = time_case(CASES[name], seconds)
    return {"rate": {p: max(r, default=None) for p, r in rates.items()}, "times": times}


def peak_memory(name: str, contender: str) -> int:
    """Bytes that this process has held at most: do nothing else in it before."""
    CASES[name].contenders[contender]()()
    return devices.peak_memory(CPU)


def _child(*arguments: str) -> Any:
    command = [sys.executable, __file__, *arguments]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def measure(names: list[str], seconds: float, *, memory: bool) -> dict[str, Any]:
    """The result: a process for each way of handling pages, and one for each peak of memory."""
    pages = {}
    for way in PAGES:
        _say(f"timing, {PAGES[way]} ...")
        pages[way] = _child("time", "--pages", way, "--seconds", str(seconds), *names)
    cases: dict[str, Any] = {}
    for name in names:
        times = {way: pages[way]["times"][name] for way in PAGES}
        cases[name] = {"flop": CASES[name].flop, "seconds": times, "ratios": _ratios(times)}
        if memory and not name.startswith("block"):
            cases[name]["peak_memory_bytes"] = {
                contender: _child("memory", name, contender)
                for contender in (PUBLISHED, "dmfast float32")
            }
    return {
        "command": "python benchmarks/iteration.py " + shlex.join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": devices.machine(CPU),
        "versions": devices.versions(),
        "rate": {  # of the machine, whatever the pages
            precision: max(pages[way]["rate"][precision] or 0 for way in PAGES) or None
            for precision in PRECISIONS
        },
        "cases": cases,
    }


def _ratios(times: dict[str, Any]) -> dict[str, dict[str, float]]:
    """By way and contender of dmfast: how many times its median the baselines' are."""
    return {
        way: {
            f"{baseline} / dmfast {precision}": by[baseline]["median"] / by[ours]["median"]
            for precision in PRECISIONS
            for ours in [f"dmfast {precision}"]
            for baseline in (PUBLISHED, f"tidied {precision}")
        }
        for way, by in times.items()
    }


# ---- tables ------------------------------------------------------------------------------------


def _precision(contender: str) -> str:
    return contender.split()[1] if contender != PUBLISHED else "float32"


def _rates(rates: dict[str, float | None]) -> str:
    known = (f"{rate / 1e9:.0f} GFLOP/s in {name}" for name, rate in rates.items() if rate)
    return f"between registers {' and '.join(known)}"


def report(result: dict[str, Any]) -> str:
    """Everything, as text."""
    machine = result["machine"]
    rates = result["rate"]
    lines = [f"{machine['processor']}, {machine['threads']} threads, {_rates(rates)}"]
    for name, case in result["cases"].items():
        lines.append(f"\n{name}: {CASES[name].title}; {case['flop'] / 1e9:.1f} GFLOP")
        for contender, size in case.get("peak_memory_bytes", {}).items():
            lines.append(f"  peak memory of {contender}: {size / 2**20:.0f} MiB")
        for way, times in case["seconds"].items():
            lines.append(f"  {PAGES[way]}")
            for contender, t in times.items():
                speed = case["flop"] / t["median"]
                rate = rates[_precision(contender)]
                share = f"{speed / rate:6.1%}" if rate else ""
                lines.append(
                    f"    {contender:16} {t['median'] * 1e3:8.1f} ms ({t['min'] * 1e3:.1f} to "
                    f"{t['max'] * 1e3:.1f}) {speed / 1e9:7.1f} GFLOP/s {share}"
                )
            ratios = case["ratios"][way].items()
            lines += [f"    {pair}: {ratio:.2f}" for pair, ratio in ratios]
    return "\n".join(lines)


def table(path: Path = RESULT) -> str:
    """The README's table of the committed result, and what it was measured on; "" without one."""
    if not path.exists():
        return ""
    result = json.loads(path.read_text())
    header = ["one", "of dmfast"]
    header += [f"{baseline}, pages {way}" for baseline in (PUBLISHED, "tidied") for way in PAGES]
    rows = []
    for name, case in result["cases"].items():
        for precision in PRECISIONS:
            ours = f"dmfast {precision}"
            time_of = case["seconds"]["kept"][ours]
            low, median, high = (1e3 * time_of[key] for key in ("min", "median", "max"))
            ratios = (
                f"{case['ratios'][way][f'{baseline} / {ours}']:.1f} x"
                for baseline in (PUBLISHED, f"tidied {precision}")
                for way in PAGES
            )
            took = f"{precision}: {median:.1f} ms ({low:.1f} to {high:.1f})"
            rows.append([CASES[name].title, took, *ratios])
    machine, versions = result["machine"], result["versions"]
    note = (
        f"{machine['processor']}, {machine['threads']} threads, {_rates(result['rate'])}, "
        f"torch {versions['torch']}, {result['date']}: `{result['command']}`"
    )
    return f"{markdown(header, rows)}\n{note}\n"


def with_table(readme: str) -> str:
    """The README with the present tables, one a result, between its marks."""
    return with_content(readme, "iteration", "\n".join(table(path) for path in results()))


def results() -> list[Path]:
    """The committed results of this benchmark, the usual cases first."""
    return sorted(RESULTS.glob("iteration-cpu*.json"), key=lambda path: (path != RESULT, path))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    names = {"nargs": "*", "metavar": "CASE", "help": f"of {', '.join(CASES)}"}
    seconds = {"type": float, "default": 4, "help": "of rounds a case, after at least three"}

    runner = commands.add_parser("run", help="time in both ways, print, and write a result")
    runner.add_argument("cases", **names)
    runner.add_argument("--quick", action="store_true", help=f"only {', '.join(_QUICK)}")
    runner.add_argument("--seconds", **seconds)
    runner.add_argument(
        "--memory", action="store_true", help="also peaks of memory, each in its own process"
    )
    runner.add_argument("--json", type=Path, metavar="FILE", help="write the result there")
    timer = commands.add_parser("time", help="time in one process, and print JSON")
    timer.add_argument("cases", **names)
    timer.add_argument("--pages", choices=PAGES, default="as-is")
    timer.add_argument("--seconds", **seconds)
    memory = commands.add_parser("memory", help="print the peak of memory of this process")
    memory.add_argument("cases", nargs=1, metavar="CASE")
    memory.add_argument("contender")
    commands.add_parser("readme", help=f"put the table of {RESULT.name} into the README")

    given = parser.parse_args()
    cases = getattr(given, "cases", [])
    if unknown := [name for name in cases if name not in CASES]:
        parser.error(f"no such case: {', '.join(unknown)}; choose from {', '.join(CASES)}")
    if given.command == "time":
        print(json.dumps(time_cases(cases, given.pages, given.seconds)))
    elif given.command == "memory":
        print(peak_memory(cases[0], given.contender))
    elif given.command == "readme":
        README.write_text(with_table(README.read_text()))
    else:
        cases = cases or (_QUICK if given.quick else _DEFAULT)
        result = measure(cases, given.seconds, memory=given.memory)
        print(report(result))
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
