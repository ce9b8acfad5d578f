# SPDX-License-Identifier: MIT
"""A profile in words, beside the times that the paper names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ._timing import LEAST_ROUNDS, OURS
from .data import ImageData

_PAPERS_ITERATIONS = 20_000


@dataclass(frozen=True)
class _Claim:
    """A time that the paper names, and the setting that it is for."""

    text: str
    shape: tuple[int, int, int]
    classes: int
    ipcs: tuple[int, ...]
    options: str


_CLAIMS = (
    _Claim(
        "Fig. 4: CIFAR-10, 50 a class, the accuracy of DSA in under 20 minutes, one GTX 1080",
        *((3, 32, 32), 10, (50,)),
        "--ipc 50",
    ),
    _Claim(
        "Section 4.2: TinyImageNet, the sets of 1, 10 and 50 a class in about 27 hours, one V100",
        *((3, 64, 64), 200, (1, 10, 50)),
        "--images 3x64x64 --classes 200 --ipc 50",
    ),
)


def papers_claims(
    data: ImageData, ipc: int, seconds: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    """The paper's claims of time, each with the seconds that its iterations would take here.

    They are extrapolated from an iteration's, and None for claims of another setting.
    """
    claims = []
    for claim in _CLAIMS:
        shape = (data.channels, *data.size)
        fits = shape == claim.shape and data.classes == claim.classes and ipc in claim.ipcs
        would_take = {name: _PAPERS_ITERATIONS * t["median"] for name, t in seconds.items()}
        claims.append(
            {
                "claim": claim.text,
                "iterations": _PAPERS_ITERATIONS,
                "seconds_extrapolated": would_take if fits else None,
                "options": claim.options,
            }
        )
    return claims


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _share(value: float, ceiling: float | None) -> str:
    return f"{value / ceiling:4.0%}" if ceiling else "   ?"


def report(result: dict[str, Any]) -> str:
    """Everything, as text."""
    of, at, ceiling = result["machine"], result["options"], result["ceilings"]
    rate, bandwidth = ceiling["flop_per_second"], ceiling["bytes_per_second"]
    device = of["gpu"] or f"{of['processor']}, {of['threads']} threads"
    pages = {None: "", True: ", freed pages kept", False: ", freed pages not kept"}
    known = f"{rate / 1e12:.3g} TFLOP/s" if rate else "an unknown rate"
    variables = "".join(f", {name}={value}" for name, value in result["environment"].items())
    kept = pages[result["freed_pages_kept"]]
    lines = [
        f"{device}{kept}; torch {result['versions']['torch']}{variables}",
        f"at most {known} in {at['precision']}, and {bandwidth / 1e9:.3g} GB/s copied",
        f"{at['dataset']}, {at['classes']} x {at['ipc']} images of {at['images']}, "
        f"{at['real_images']} real ones an iteration, {at['model']}, {at['precision']}",
        "",
        "stages of an eager iteration, medians",
    ]
    counted = "flop" in result["stages"]["all"]
    head = f"  {'':18}{'ms':>9}{'share':>7}"
    of_counts = f"{'GFLOP':>10}{'TFLOP/s':>9}{'':5}{'MB':>9}{'GB/s':>8}"
    lines.append(head + (of_counts if counted else ""))
    whole = result["stages"]["all"]["median"]
    for name, stage in result["stages"].items():
        line = f"  {name:18}{stage['median'] * 1e3:9.3f}{stage['median'] / whole:7.0%}"
        if counted:
            flops, moved = stage["flop_per_second"], stage["bytes_per_second"]
            line += (
                f"{stage['flop'] / 1e9:10.3f}{flops / 1e12:9.3f} {_share(flops, rate)}"
                f"{stage['bytes'] / 1e6:9.1f}{moved / 1e9:8.1f} {_share(moved, bandwidth)}"
            )
        lines.append(line)
    if counted:
        lines.append(
            "  operations are those of direct convolutions, and shares are of the machine's: the "
            "fused blocks of a CPU need fewer"
        )
    else:
        lines.append("  operations are counted for a ConvNet of IN, ReLU and mean pooling only")
    for what, unit in (("condensing", "an iteration"), ("training", "a step")):
        lines += ["", *_times(result[what], what, unit, rate, of["gpu"] is not None)]
    if of["gpu"]:
        replayed = "was replayed from a CUDA graph" if result["captured"] else "was made eagerly"
        lines.append(f"  dmfast's iteration {replayed}")
    if result["tidied_forms"]:
        chosen = (f"{part}: {form}" for part, form in result["tidied_forms"].items())
        lines.append(f"  tidied, chosen for speed: {'; '.join(chosen)}")
    kind = "kernels" if of["gpu"] else "operators"
    lines += ["", f"{kind} of an iteration, the longest"]
    lines += [
        f"  {row['seconds'] * 1e3:9.3f} ms {row['calls']:7.1f} x {row['name'][:70]}"
        for row in result["kernels"][:12]
    ]
    lines += ["", "the paper's times"]
    for claim in result["paper"]:
        lines += [f"  {claim['claim']}", f"    {_beside(claim)}"]
    return "\n".join(lines)


def _times(
    case: dict[str, Any], what: str, unit: str, rate: float | None, on_gpu: bool
) -> Iterator[str]:
    images = f" of {case['images']} images" if "images" in case else ""
    yield f"{what}, seconds of {unit}{images}, by turns"
    for name, t in case["seconds"].items():
        line = (
            f"  {name:10}{t['median'] * 1e3:10.3f} ms ({t['min'] * 1e3:.3f} to "
            f"{t['max'] * 1e3:.3f}), {t['units']} in {t['rounds']} rounds"
        )
        if "flop" in case:
            speed = case["flop"] / t["median"]
            line += f", {speed / 1e12:.3g} TFLOP/s {_share(speed, rate).strip()}"
        if name in case.get("ratios", {}):
            line += f", {case['ratios'][name]:.1f} x dmfast's time"
        if name == OURS and on_gpu:
            line += f", host {t['host'] / t['median']:.1%}"
        if name in case["peak_memory_bytes"]:
            line += f", peak memory {case['peak_memory_bytes'][name] / 2**20:.0f} MiB"
        yield line
    if unit == "an iteration" and case["seconds"][OURS]["units"] > LEAST_ROUNDS:
        ours = case["seconds"][OURS]
        yield f"  dmfast made {ours['units']} iterations in {_duration(ours['total'])}"
    if not case.get("losses_agree", True):
        yield f"  THE LOSSES OF THE FIRST ITERATION DISAGREE: {case['first_loss']}"


def _beside(claim: dict[str, Any]) -> str:
    would_take = claim["seconds_extrapolated"]
    if would_take is None:
        return f"another setting than this: {claim['options']} measures it"
    times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in would_take.items())
    return (
        f"here {claim['iterations']:,} iterations would take {times}: extrapolated from an "
        "iteration's time, not run, and the accuracy not measured"
    )
