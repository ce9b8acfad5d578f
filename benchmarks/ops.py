# SPDX-License-Identifier: MIT
"""The time of the operators on images and embeddings, beside two ways to write them in plain torch.

``python benchmarks/ops.py run [NAME ...]`` times dmfast, the published way and a tidied one
(:mod:`baselines_ops`) by turns, with a plain copy of the images among them, and puts what it finds
into ``results/ops.json``; ``... table`` prints the table, ``... readme`` puts it into the README.
Freed pages are kept (:mod:`dmfast.memory`), or the kernel's zeroing of new ones would be most of
what is timed. ``pytest benchmarks --benchmark-only -k ops`` runs the same cases, and with a GPU
more of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import baselines_ops
import torch
from tables import README, RESULTS, markdown, with_content
from torch import Tensor

from dmfast import ops
from dmfast.augment import IDENTITY, Column
from dmfast.devices import machine, versions
from dmfast.memory import keep_freed_pages

RESULT = RESULTS / "ops.json"
MEAN, STD = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2023, 0.1994, 0.2010])
REAL_IMAGES = 10000  # that gather_augment picks from
FEATURES, REAL_ROWS, SYN_ROWS = 2048, 2560, 500

#: A row of each transform at a strength that is drawn often; the hole is half as wide as the image.
ROWS: dict[str, dict[Column, float]] = {
    "color": {Column.BRIGHTNESS: 0.3, Column.SATURATION: 1.4, Column.CONTRAST: 0.8},
    "crop": {Column.CROP_Y: -3, Column.CROP_X: 2},
    "cutout": {Column.CUT_TOP: 5, Column.CUT_LEFT: -2},
    "flip": {Column.FLIP: 1},
    "scale": {Column.SCALE_X: 1.1, Column.SCALE_Y: 0.9},
    "rotate": {Column.ANGLE: 0.2},
}

#: The dtype that the README's table shows; the results have both.
SHOWN = {
    "siamese_augment": torch.float32,
    "gather_augment": torch.bfloat16,
    "class_mean_discrepancy": torch.float32,
}

Run = Callable[[], Tensor]


def table_of(word: str, groups: int, size: int, device: str) -> Tensor:
    """The rows of one transform for images of that width, a group each."""
    params = torch.tensor(IDENTITY).repeat(groups, 1)
    for column, value in ROWS[word].items():
        params[:, column] = value
    if word == "cutout":
        params[:, [Column.CUT_HEIGHT, Column.CUT_WIDTH]] = size / 2
    return params.to(device)


@dataclass(frozen=True)
class Case:
    """An operator on one shape.

    Attributes:
        direction: ``forward``, or ``forward+backward``.
    """

    operator: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    direction: str
    device: str = "cpu"

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        shape = "x".join(map(str, self.shape))
        return f"{self.operator}-{shape}-{dtype}-{self.direction}-{self.device}"

    def contenders(self) -> Iterator[tuple[str, int, dict[str, Run]]]:
        """For each part (a transform): its name, the bytes that it must move, and who does it:
        ``dmfast``, ``published``, ``tidied``, and ``copy``, which moves other images than these."""
        return {
            "siamese_augment": self._siamese,
            "gather_augment": self._gather,
            "class_mean_discrepancy": self._discrepancy,
        }[self.operator]()

    @property
    def groups(self) -> int:
        return 10 if self.shape[0] % 10 == 0 else 8

    @property
    def tolerance(self) -> float:
        """How far results may lie apart; sampling grids of torch's round more coarsely."""
        return 1e-4 if self.dtype == torch.float32 else 6e-2

    def _siamese(self) -> Iterator[tuple[str, int, dict[str, Run]]]:
        backward = self.direction == "forward+backward"
        x = torch.randn(self.shape, device=self.device).to(self.dtype).requires_grad_(backward)
        gradient = torch.randn(self.shape, device=self.device).to(self.dtype)
        for word in ROWS:
            params = table_of(word, self.groups, self.shape[3], self.device)

            def run(augment: baselines_ops.Augment, params: Tensor = params) -> Run:
                if not backward:
                    return lambda: augment(x, params)

                def both() -> Tensor:
                    out = augment(x, params)
                    return torch.autograd.grad(out, x, gradient.to(out.dtype))[0]

                return both

            augments = {
                "dmfast": ops.siamese_augment,
                "published": baselines_ops.published(word),
                "tidied": baselines_ops.tidied(word),
            }
            runs = {name: run(augment) for name, augment in augments.items()}
            moved = 2 * x.numel() * x.element_size() * (2 if backward else 1)
            yield word, moved, runs | {"copy": gradient.clone}

    def _gather(self) -> Iterator[tuple[str, int, dict[str, Run]]]:
        count, channels, height, width = self.shape
        images = torch.randint(0, 256, (REAL_IMAGES, height, width, channels), dtype=torch.uint8)
        normalised = ((images.float() / 255 - MEAN) / STD).permute(0, 3, 1, 2).contiguous()
        images, normalised = images.to(self.device), normalised.to(self.device)
        mean, std = MEAN.to(self.device), STD.to(self.device)
        index = torch.randint(0, REAL_IMAGES, (count,), device=self.device)
        out = torch.randn(self.shape, device=self.device).to(self.dtype)
        for word in ROWS:
            params = table_of(word, self.groups, width, self.device)
            published = baselines_ops.published_gather(word, normalised)
            tidied = baselines_ops.tidied_gather(word, images, mean, std)

            def dmfast(params: Tensor = params) -> Tensor:
                return ops.gather_augment(images, index, params, mean, std, self.dtype)

            yield (
                word,
                out.numel() * (1 + out.element_size()),
                {
                    "dmfast": dmfast,
                    "published": lambda p=params, f=published: f(index, p, self.dtype),
                    "tidied": lambda p=params, f=tidied: f(index, p, self.dtype),
                    "copy": out.clone,
                },
            )

    def _discrepancy(self) -> Iterator[tuple[str, int, dict[str, Run]]]:
        rows, features = self.shape
        real = torch.randn(rows, features, device=self.device).to(self.dtype)
        syn = torch.randn(SYN_ROWS, features, device=self.device).to(self.dtype)
        syn.requires_grad_(True)

        def run(loss: Callable[[Tensor, Tensor, int], Tensor]) -> Run:
            return lambda: torch.autograd.grad(loss(real, syn, self.groups), syn)[0]

        filled = torch.empty_like(syn)

        def floor() -> Tensor:
            with torch.no_grad():
                real.sum(0)
                syn.sum(0)
                return filled.fill_(1.0)

        runs = {
            "dmfast": run(ops.class_mean_discrepancy),
            "published": run(baselines_ops.published_discrepancy),
            "tidied": run(baselines_ops.tidied_discrepancy),
            "sums and fill": floor,
            "copy": real.clone,
        }
        yield "loss", (real.numel() + 2 * syn.numel()) * real.element_size(), runs


def cases(device: str = "cpu") -> list[Case]:
    found = []
    shapes = [(2560, 3, 32, 32), (500, 3, 32, 32), (512, 3, 64, 64)]
    if device == "cuda":
        shapes.append((25600, 3, 32, 32))
    for shape in shapes:
        for dtype in (torch.float32, torch.bfloat16):
            for direction in ("forward", "forward+backward"):
                found.append(Case("siamese_augment", shape, dtype, direction, device))
            found.append(Case("gather_augment", shape, dtype, "forward", device))
    for dtype in (torch.float32, torch.bfloat16):
        shape = (REAL_ROWS, FEATURES)
        found.append(Case("class_mean_discrepancy", shape, dtype, "forward+backward", device))
    return found


# ---- timing ------------------------------------------------------------------------------------


def _seconds(run: Run, device: str) -> float:
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin_time = time.perf_counter()
    run()
    return time.perf_counter() - begin_time


def measure(case: Case, rounds: int = 3, calls: int = 5, seconds: float = 1.0) -> dict[str, Any]:
    """Times the contenders of each part by turns; their results must agree.

    Args:
        rounds: at least so many; in each the published way has one call, every other contender
            ``calls``.
        seconds: rounds go on for so long.

    Returns:
        ``bytes``, and for each part, for each contender ``min``, ``median``, ``max`` in ms.
    """
    torch.manual_seed(0)
    parts, moved = {}, 0
    for part, part_moved, runs in case.contenders():
        times: dict[str, list[float]] = {name: [] for name in runs}
        results = {name: run().detach() for name, run in runs.items()}  # the first call warms up
        begin, done = time.perf_counter(), 0
        while done < rounds or time.perf_counter() - begin < seconds:
            done += 1
            for turn in range(calls):
                for name, run in runs.items():
                    if name != "published" or turn == 0:
                        times[name].append(_seconds(run, case.device) * 1e3)
        for name in ("published", "tidied"):
            torch.testing.assert_close(
                *(results[which].float() for which in ("dmfast", name)),
                rtol=case.tolerance,
                atol=case.tolerance,
            )
        moved += part_moved
        parts[part] = {
            name: {
                "min": round(min(of_name), 4),
                "median": round(statistics.median(of_name), 4),
                "max": round(max(of_name), 4),
            }
            for name, of_name in times.items()
        }
    return {"bytes": moved, "parts": parts}


def summary(case: Case, result: dict[str, Any]) -> dict[str, float]:
    """Summed over the parts: ms, ratios to dmfast, and its share of what a copy moves a second.

    Of each contender the least time: other processes only ever add to it.
    """
    parts = result["parts"].values()
    total = {name: sum(p[name]["min"] for p in parts) for name in next(iter(parts))}
    elements = torch.Size(case.shape).numel()
    copied = 2 * elements * case.dtype.itemsize * len(parts)
    of_copy = (result["bytes"] / total["dmfast"]) / (copied / total["copy"])
    return {
        "ms": total["dmfast"],
        "share_of_copy": of_copy,
        **{name: total[name] / total["dmfast"] for name in total if name != "dmfast"},
    }


def run(names: list[str], device: str, seconds: float, path: Path) -> None:
    keep_freed_pages()
    results = json.loads(path.read_text()) if path.exists() else {"cases": {}}
    results |= {
        "command": f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/ops.py run",
        "machine": machine(torch.device(device)),
        "threads": torch.get_num_threads(),
        "versions": versions(),
    }
    for case in cases(device):
        if names and not any(name in str(case) for name in names):
            continue
        results["cases"][str(case)] = result = measure(case, seconds=seconds)
        line = ", ".join(f"{name} {value:.2f}" for name, value in summary(case, result).items())
        print(f"{case}: {line}", flush=True)
        path.write_text(_one_line_a_case(results))


def _one_line_a_case(results: dict[str, Any]) -> str:
    lines = [f"  {json.dumps(name)}: {json.dumps(of)}" for name, of in results["cases"].items()]
    head = json.dumps({key: value for key, value in results.items() if key != "cases"}, indent=1)
    return head.removesuffix("\n}") + ',\n "cases": {\n' + ",\n".join(lines) + "\n }\n}\n"


# ---- the table ---------------------------------------------------------------------------------


def table() -> str:
    """The table of the results that are there, in Markdown, and what they were measured on."""
    if not RESULT.exists():
        return ""
    results = json.loads(RESULT.read_text())
    header = ("operator", "shape", "dtype", "dmfast", "published", "tidied", "of a copy's rate")
    rows = []
    for case in cases():
        result = results["cases"].get(str(case))
        if result is None or case.dtype != SHOWN[case.operator]:
            continue
        of = summary(case, result)
        both = " and backward" if case.direction == "forward+backward" else ""
        rows.append(
            (
                *(f"`{case.operator}`{both}", "x".join(map(str, case.shape))),
                *(str(case.dtype).removeprefix("torch."), f"{of['ms']:.1f} ms"),
                *(f"{of[name]:.1f} x" for name in ("published", "tidied")),
                f"{of['share_of_copy']:.0%}",
            )
        )
    note = (
        f"{results['machine']['processor']}, threads: {results['threads']}, torch "
        f"{results['versions']['torch']}: `{results['command']}`."
    )
    return f"{markdown(header, rows)}\n{note}\n"


def with_table(readme: str) -> str:
    """The README with the present table between its marks."""
    return with_content(readme, "ops", table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="time the operators")
    runner.add_argument("names", nargs="*", metavar="NAME", help="parts of cases' names, or all")
    runner.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    runner.add_argument("--seconds", type=float, default=1.0, help="of a part of a case, about")
    runner.add_argument("--json", type=Path, default=RESULT, help="what the results are put into")
    commands.add_parser("table", help="print the table")
    commands.add_parser("readme", help="put the table into the README")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments.names, arguments.device, arguments.seconds, arguments.json)
    elif arguments.command == "table":
        print(table(), end="")
    else:
        README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    main()
