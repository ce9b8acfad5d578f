# SPDX-License-Identifier: MIT
"""Times condensing and training on this machine, beside two baselines and the machine's ceilings.

``python -m dmfast.profile``, and :func:`run` for the same job from Python. Where an iteration's
time goes, how fast dmfast is beside the published algorithm and beside the same mathematics tidied
(:mod:`dmfast._baselines`), all by turns in this process, and how far all of it is from what the
arithmetic and the memory of the machine allow (:mod:`dmfast.ceilings`, :mod:`dmfast.roofline`).
Without a data set the images are random: their values do not change the time.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.profile")

import datetime
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import ceilings, cli, memory, roofline
from ._profile_job import Job
from ._profile_report import papers_claims, report
from ._timing import LEAST_ROUNDS, OURS, SECONDS, stage_times, time_by_turns, timed
from ._torch_profile import kernels_by_name, write_trace
from .augment import DEFAULT_STRATEGY, DIGITS_STRATEGY, WORDS, parse_strategy
from .data import ImageData, canonical_name
from .data import load as load_data
from .devices import (
    PRECISIONS,
    machine,
    memory_checked,
    peak_memory,
    resolve_device,
    resolve_precision,
    versions,
)
from .errors import InputError, check_seed, choose
from .files import write_bytes
from .graphs import GRAPHS, recorder_of
from .loop import Loop
from .networks import MODELS, has_batch_norm
from .presets import Preset, preset

__all__ = ["ProfileConfig", "random_images", "report", "run", "time_by_turns"]

#: Of the images and the classes where no data set is named.
_IMAGES, _CLASSES = "3x32x32", 10
_ROUNDS = 100  # where iterations are asked for, and as many are made
_VARIABLES = ("DMFAST_CPU", "DMFAST_GPU")  # which choose what is timed


@dataclass(frozen=True)
class ProfileConfig:
    """The options of a profile, named as on the command line.

    Without ``dataset`` the images are random, ``images`` (CxHxW) of ``classes``. Where None,
    ``model``, ``batch_real`` and ``dsa_strategy`` are the presets. With ``iterations`` dmfast makes
    at least so many in all, in up to 100 rounds in which the others take turns; else rounds go on
    for ``seconds`` (10 where None), at least three. On a GPU dmfast's iteration is replayed from a
    CUDA graph, as ``graph`` says (:data:`dmfast.graphs.GRAPHS`), and made eagerly beside that.
    ``json`` and ``trace`` are files to write.

    Raises:
        InputError: on values out of range, or options that exclude each other.
    """

    dataset: str | None = None
    data_root: str | None = None
    images: str | None = None
    classes: int | None = None
    model: str | None = None
    ipc: int = 10
    batch_real: int | None = None
    dsa_strategy: str | None = None
    precision: str = "auto"
    seed: int = 0
    device: str = "auto"
    graph: str = "auto"
    iterations: int | None = None
    seconds: float | None = None
    baselines: bool = True
    json: str | None = None
    trace: str | None = None
    cache: bool = True
    download: bool = False

    def __post_init__(self) -> None:
        for name in ("classes", "ipc", "batch_real", "iterations"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"--{name.replace('_', '-')} must be 1 or more, got {value}")
        check_seed(self.seed)
        if self.seconds is not None and not 0 < self.seconds < math.inf:
            raise InputError(f"--seconds must be a positive number, got {self.seconds}")
        if self.iterations is not None and self.seconds is not None:
            raise InputError("--iterations and --seconds exclude each other: leave one out")
        if self.dataset is not None and (self.images is not None or self.classes is not None):
            raise InputError(
                "--images and --classes are of random images: leave them or --dataset out"
            )
        choose("--precision", self.precision, PRECISIONS)
        choose("--graph", self.graph, GRAPHS)
        cli.parse_shape("--images", self.images or _IMAGES)
        for option, path in (("--json", self.json), ("--trace", self.trace)):
            if path is not None and (path == "" or Path(path).is_dir()):
                raise InputError(f"{option} {path!r} is no file to write: name one")
        if self.trace and not self.trace.endswith((".json", ".json.gz")):
            raise InputError(f"--trace {self.trace}: a trace is a .json or .json.gz file")


def random_images(
    shape: tuple[int, int, int], classes: int, per_class: int, seed: int = 0
) -> ImageData:
    """A set of ``per_class`` random images of each class, of that shape (C, H, W)."""
    channels, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    images = torch.empty(classes * per_class, height, width, channels, dtype=torch.uint8)
    images.random_(0, 256, generator=generator)
    labels = torch.arange(classes).repeat(per_class)
    names = tuple(str(k) for k in range(classes))
    mean, std = (0.5,) * channels, (0.25,) * channels
    return ImageData(images, labels, images[:0], labels[:0], names, mean, std, "random images")


def _job_of(config: ProfileConfig) -> Job:
    """The options with every default in its place, and the data."""
    device = resolve_device(config.device)
    recorder_of(config.graph, device)  # fails at once where it has to
    if config.dataset is not None:
        name = canonical_name(config.dataset)
        presets = preset(name, config.ipc, model=config.model)
    else:
        channels, height, width = cli.parse_shape("--images", config.images or _IMAGES)
        presets = Preset(
            model="ConvNetD4" if min(height, width) >= 64 else "ConvNet",
            dsa_strategy=DIGITS_STRATEGY if channels == 1 else DEFAULT_STRATEGY,
        )
    model = config.model or presets.model
    batch_real = config.batch_real or presets.batch_real
    strategy = presets.dsa_strategy if config.dsa_strategy is None else config.dsa_strategy
    strategy = "_".join(parse_strategy(strategy))
    if config.dataset is None:
        per_class = max(batch_real, config.ipc, 500)
        data = random_images((channels, height, width), config.classes or _CLASSES, per_class)
    else:
        data = load_data(name, config.data_root, cache=config.cache, download=config.download)
        smallest = int(data.by_class()[1].diff().min())
        if config.baselines and smallest < batch_real:
            _note(
                f"the smallest class of {data.name} has {smallest} images, and the baselines "
                f"want as many of each: {smallest} real images a class, not {batch_real}"
            )
            batch_real = smallest
    job = Job(
        data=data,
        device=device,
        precision=resolve_precision(config.precision, device, model),
        model=model,
        ipc=config.ipc,
        batch_real=batch_real,
        strategy=strategy,
        lr=presets.lr_img,
        seed=config.seed,
        graph=config.graph,
        baselines=config.baselines,
        note=_note,
    )
    if config.baselines and has_batch_norm(job.network()):
        raise InputError(
            f"--model {job.model}: the baselines have no branch for batch norm; give "
            "--no-baselines, or a model without it"
        )
    return job


def run(config: ProfileConfig) -> dict[str, Any]:
    """Does what ``python -m dmfast.profile`` does: measures, prints a report, writes the files.

    Returns:
        What the JSON file holds.

    Raises:
        InputError: an option or the data cannot be used, they do not fit each other, or memory does
            not suffice.
        OSError: a file cannot be written.
    """
    for path in (config.json, config.trace):
        if path is not None:  # where that fails it is to fail now
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    with memory_checked(resolve_device(config.device), "what is to be timed", _less(config)):
        result = _measure(config, _job_of(config))
    if config.json:
        write_bytes(Path(config.json), (json.dumps(result, indent=1) + "\n").encode())
    print(report(result))
    return result


def _less(config: ProfileConfig) -> str:
    """What to do where memory does not suffice."""
    options = ["--ipc", "--batch-real", "--model"]
    if config.dataset is None:
        options = ["--images", "--classes", *options]
    remedy = f"choose a smaller {', '.join(options[:-1])} or {options[-1]}"
    return remedy + ", or leave the baselines out by --no-baselines" * config.baselines


def _measure(config: ProfileConfig, job: Job) -> dict[str, Any]:
    device, setting = job.device, job.setting()
    seconds = config.seconds or SECONDS
    _say("measuring what the machine can do")
    rate = ceilings.arithmetic_rate(job.precision, device)
    bandwidth = ceilings.bandwidth(device)
    _say("timing the stages of an iteration")
    parts = _with_counts(stage_times(job.matcher(), device), setting, job.precision)
    of_process = peak_memory(device)  # so far: a CPU's is not known of the ones to come
    rounds, calls = None, 1
    if config.iterations is not None:
        rounds = min(config.iterations, _ROUNDS)
        calls = math.ceil(config.iterations / rounds)
    forms: dict[str, Any] = {}
    loops: list[Loop] = []
    with ExitStack() as stack:
        contenders = job.condensing(stack, loops, forms)
        _say(f"timing iterations of {', '.join(contenders)}")
        condensing, runs = timed(
            contenders,
            device,
            precision=job.precision,
            rounds=rounds,
            seconds=seconds,
            ours=calls,
        )
        _say("naming the kernels")
        names = kernels_by_name(runs[OURS], device)
        captured = loops[0].replays
        if config.trace:
            _say("writing the trace")
            replay = runs[OURS] if captured else None
            write_trace(Path(config.trace), job.matcher(), device, replay)
    if device.type == "cpu":
        condensing["peak_memory_bytes"] = {OURS: of_process}
    steps = 20 if device.type == "cuda" else 2
    _say("timing training steps")
    few = None if rounds is None else min(rounds, 10)
    training, _ = timed(
        job.training(forms, steps),
        device,
        precision=job.precision,
        rounds=few,
        seconds=seconds,
        units=steps,
    )
    training["images"] = len(job.training_set[0])
    if setting is not None:
        condensing["flop"] = setting.iteration_flop
        training["flop"] = setting.training_flop(training["images"])
    data = job.data
    return {
        "command": " ".join(["python -m dmfast.profile", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "machine": machine(device),
        "versions": versions(),
        "environment": {k: os.environ[k] for k in _VARIABLES if k in os.environ},
        "freed_pages_kept": memory.freed_pages_kept() if device.type == "cpu" else None,
        "options": {
            "dataset": data.name,
            "images": "x".join(map(str, (data.channels, *data.size))),
            "classes": data.classes,
            "ipc": config.ipc,
            "batch_real": job.batch_real,
            "real_images": data.batch_offsets(job.batch_real)[1],
            "model": job.model,
            "dsa_strategy": job.strategy,
            "precision": job.precision,
            "seed": config.seed,
            "iterations": config.iterations,
        },
        "ceilings": {"flop_per_second": rate, "bytes_per_second": bandwidth},
        "captured": captured,
        "stages": parts,
        "condensing": condensing,
        "training": training,
        "tidied_forms": forms,
        "kernels": names,
        "paper": papers_claims(data, config.ipc, condensing["seconds"]),
    }


def _with_counts(
    times: dict[str, dict[str, float]], setting: roofline.Setting | None, precision: str
) -> dict[str, dict[str, float]]:
    """The stages' times with the operations and bytes that the roofline counts for them."""
    if setting is None:
        return times
    element = 2 if precision == "bfloat16" else 4
    counts = roofline.by_range(roofline.stages(setting, element))
    counts["all"] = roofline.total("all", counts.values())
    result = {}
    for name, seconds in times.items():
        part, median = counts[name], seconds["median"]
        result[name] = {
            **seconds,
            "flop": part.flop,
            "bytes": part.bytes,
            "flop_per_second": part.flop / median,
            "bytes_per_second": part.bytes / median,
        }
    return result


def _say(line: str) -> None:
    print(f"{line} ...", file=sys.stderr, flush=True)


def _note(text: str) -> None:
    print(f"dmfast.profile: {text}", file=sys.stderr)


def _parser() -> cli.Parser:
    default = ProfileConfig
    parser = cli.Parser(
        "dmfast.profile",
        "Times condensing and training on this machine, beside two baselines and its ceilings.",
    )

    def add(*flags: str, **arguments: Any) -> None:
        name = flags[0].removeprefix("--").replace("-", "_")
        parser.add_argument(*flags, default=getattr(default, name), **arguments)

    add("--dataset", metavar="NAME", help="a known name, a path or hf:owner/name (default: random)")
    add("--data-root", metavar="DIR", help="what holds the data set's folder or files")
    add("--images", metavar="CxHxW", help=f"shape of random images (default: {_IMAGES})")
    add("--classes", metavar="N", type=int, help=f"of random images (default: {_CLASSES})")
    add("--model", metavar="NAME", help=f"{MODELS} (default: the preset)")
    add("--ipc", metavar="N", type=int, help="synthetic images a class")
    add(
        "--batch-real",
        metavar="N",
        type=int,
        help="real images a class and iteration (default: the preset, 256)",
    )
    add(
        "--dsa-strategy",
        metavar="WORDS",
        help=f"{', '.join(WORDS)}, joined by underscores, or none (default: the preset)",
    )
    add(
        "--precision",
        metavar="KIND",
        help=f"of dmfast and the tidied baseline: {', '.join(PRECISIONS)}; auto is bfloat16 on a "
        "GPU, and where the CPU multiplies it; the published baseline is float32",
    )
    add("--seed", metavar="N", type=int, help="of all draws")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:N, or auto (a GPU where there is one)")
    add(
        "--graph",
        metavar="KIND",
        help="whether dmfast's iteration is captured in a CUDA graph: auto (on a GPU, else made "
        "eagerly), required (or fail) or off",
    )
    add(
        "--iterations",
        metavar="N",
        type=int,
        help=f"of dmfast in all, at least; the others take turns in up to {_ROUNDS} rounds",
    )
    add(
        "--seconds",
        metavar="S",
        type=float,
        help=f"of rounds, at least {LEAST_ROUNDS}, for iterations and again for training steps "
        f"(default: {SECONDS:g})",
    )
    parser.add_argument(
        "--no-baselines", dest="baselines", action="store_false", help="time dmfast alone"
    )
    add("--json", metavar="FILE", help="write the result there")
    add("--trace", metavar="FILE", help="write a trace there, .json or .json.gz, for Perfetto")
    parser.add_argument(
        "--no-cache", dest="cache", action="store_false", help="keep no decoded real images"
    )
    add("--download", action="store_true", help="fetch the data set where it is not found")
    return parser


def _main(arguments: Sequence[str]) -> None:
    config = ProfileConfig(**vars(_parser().parse_args(arguments)))
    memory.keep_freed_pages()
    run(config)
