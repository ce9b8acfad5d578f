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
import itertools
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _ranges, ceilings, cli, memory, roofline
from ._baselines import PublishedIteration, PublishedTraining, TidiedIteration, TidiedTraining
from .augment import DEFAULT_STRATEGY, DIGITS_STRATEGY, WORDS, parse_strategy
from .data import ImageData, canonical_name
from .data import load as load_data
from .devices import (
    PRECISIONS,
    machine,
    peak_memory,
    resolve_device,
    resolve_precision,
    synchronise,
    versions,
)
from .errors import InputError, check_seed, choose
from .files import atomic_path, write_bytes
from .graphs import GRAPHS, recorder_of
from .loop import Loop
from .matching import Matcher, initial_images
from .networks import MODELS, ConvNet, get_network, has_batch_norm
from .presets import Preset, preset
from .training import train

OURS, EAGER, PUBLISHED, TIDIED = "dmfast", "eager", "published", "tidied"
#: Of the images and the classes where no data set is named.
_IMAGES, _CLASSES = "3x32x32", 10
_SECONDS = 10.0
_ROUNDS = 100  # where iterations are asked for, and as many are made
_LEAST_ROUNDS = 3
_STAGE_ROUNDS = 10
_TRACED = 3  # iterations
_TURN = 0.05  # seconds that a contender's turn takes at least
_VARIABLES = ("DMFAST_CPU", "DMFAST_GPU")  # which choose what is timed
_WARM_UP = {"cpu": 1, "cuda": 5}  # calls; a loop's recording is among them
_TRAINING_BATCH = 256
_PAPERS_ITERATIONS = 20_000
#: How far the first losses may lie apart, the tidied one's and dmfast's.
_TOLERANCE = {"float32": 1e-3, "bfloat16": 5e-2}

Run = Callable[[], Tensor | None]  # of an iteration: its loss


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


# ---- what is timed -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """The options with every default in its place, and the data."""

    config: ProfileConfig
    data: ImageData
    device: torch.device
    precision: str
    model: str
    batch_real: int
    strategy: str
    lr: float

    @staticmethod
    def of(config: ProfileConfig) -> _Job:
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
        job = _Job(
            config,
            data,
            device,
            resolve_precision(config.precision, device, model),
            model,
            batch_real,
            strategy,
            presets.lr_img,
        )
        if config.baselines and has_batch_norm(job.network()):
            raise InputError(
                f"--model {job.model}: the baselines have no branch for batch norm; give "
                "--no-baselines, or a model without it"
            )
        return job

    def network(self) -> Any:
        data = self.data
        return get_network(self.model, data.channels, data.classes, data.size, self.config.seed)

    @cached_property
    def images(self) -> Tensor:
        return initial_images(self.data, self.config.ipc, "real", self.config.seed)

    @cached_property
    def training_set(self) -> tuple[Tensor, Tensor]:
        """The synthetic images and their labels, of these at most a batch, from every class."""
        labels = torch.arange(self.data.classes).repeat_interleave(self.config.ipc)
        chosen = torch.linspace(0, len(labels) - 1, min(len(labels), _TRAINING_BATCH)).long()
        return self.images[chosen], labels[chosen]

    def matcher(self) -> Matcher:
        return Matcher(
            self.data,
            self.network(),
            self.images,
            batch_real=self.batch_real,
            strategy=self.strategy,
            seed=self.config.seed,
            lr=self.lr,
            momentum=0.5,
            precision=self.precision,
            device=self.device,
        )

    def setting(self) -> roofline.Setting | None:
        """What the roofline counts by; None where it does not know the network."""
        network = self.network()
        if not isinstance(network, ConvNet) or not network.plain:
            return None
        convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        return roofline.Setting(
            self.data.channels,
            self.data.size,
            self.data.classes,
            self.config.ipc,
            self.batch_real,
            len(convolutions),
            convolutions[0].out_channels,
            self.data.batch_offsets(self.batch_real)[1],
        )

    def loop(self, graph: str) -> Loop:
        return Loop(
            self.matcher(),
            recorder=recorder_of(graph, self.device),
            required=graph == "required",
            note=_note,
        )

    def condensing(
        self, stack: ExitStack, loops: list[Loop], forms: dict[str, Any]
    ) -> dict[str, Callable[[], Run]]:
        """What makes each contender.

        Args:
            stack: what the loops are entered into.
            loops: is given those that are made, that of dmfast first.
            forms: is told what the tidied one chose.
        """

        def advancing(graph: str) -> Run:
            loop = stack.enter_context(self.loop(graph))
            loops.append(loop)

            def run() -> Tensor | None:
                loop.advance()
                return torch.tensor(loop.read()().losses[0]) if loop.iteration == 1 else None

            return run

        options: dict[str, Any] = {"batch_real": self.batch_real, "strategy": self.strategy}

        def published() -> Run:
            return PublishedIteration(
                self.data, self.model, self.images, **options, device=self.device
            ).step

        def tidied() -> Run:
            iteration = TidiedIteration(
                *(self.data, self.model, self.images),
                **options,
                seed=self.config.seed,
                precision=self.precision,
                device=self.device,
            )
            forms.update(iteration.forms)
            steps = itertools.count()
            return lambda: iteration.step(next(steps))

        graph = self.config.graph
        contenders = self._with_baselines(partial(advancing, graph), published, tidied)
        if self.config.baselines and self.device.type == "cuda" and graph != "off":
            contenders[EAGER] = partial(advancing, "off")
        return contenders

    def training(self, forms: dict[str, Any], steps: int) -> dict[str, Callable[[], Run]]:
        images, labels = (tensor.to(self.device) for tensor in self.training_set)

        def ours() -> Run:
            network = self.network().to(self.device)
            return partial(
                train,
                *(network, images, labels),
                epochs=steps - 1,
                seed=self.config.seed,
                strategy=self.strategy,
                precision=self.precision,
            )

        def repeated(epoch: Callable[[], None]) -> Run:
            def run() -> None:
                for _ in range(steps):
                    epoch()

            return run

        def published() -> Run:
            return repeated(
                PublishedTraining(self.data, self.model, images, labels, self.strategy).epoch
            )

        def tidied() -> Run:
            training = TidiedTraining(
                *(self.data, self.model, images, labels, self.strategy), precision=self.precision
            )
            forms["training"] = training.form
            return repeated(training.epoch)

        return self._with_baselines(ours, published, tidied)

    def _with_baselines(
        self, ours: Callable[[], Run], published: Callable[[], Run], tidied: Callable[[], Run]
    ) -> dict[str, Callable[[], Run]]:
        baselines = {PUBLISHED: published, TIDIED: tidied} if self.config.baselines else {}
        return {OURS: ours, **baselines}


# ---- timing ------------------------------------------------------------------------------------


def time_by_turns(
    runs: Mapping[str, Callable[[], object]],
    device: torch.device,
    *,
    rounds: int | None = None,
    seconds: float = 0.0,
    calls: Mapping[str, int] | None = None,
    units: int = 1,
) -> dict[str, dict[str, float]]:
    """Times contenders by turns, in seconds a unit: median, least and most over the rounds.

    Args:
        runs: what each does in a call, of ``units`` units. They have been called before: compiling
            and warming up are done.
        rounds: how many; None: at least three, and until ``seconds`` are over.
        calls: how many a turn each makes in a row, before the device is waited for; else one.

    Returns:
        Of each contender ``median``, ``min``, ``max``, ``rounds``, ``units`` (in all), ``total``
        (the sum of its times), and ``host``: the median of the time until the calls had returned,
        on a GPU less than that until they were done.
    """
    calls = calls or {}
    times: dict[str, list[float]] = {name: [] for name in runs}
    host: dict[str, list[float]] = {name: [] for name in runs}
    begin = time.perf_counter()
    for done in itertools.count():
        enough = done >= (_LEAST_ROUNDS if rounds is None else rounds)
        if enough and (rounds is not None or time.perf_counter() - begin >= seconds):
            break
        for name, run in runs.items():
            count = calls.get(name, 1)
            synchronise(device)
            start = time.perf_counter()
            for _ in range(count):
                run()
            returned = time.perf_counter()
            synchronise(device)
            times[name].append((time.perf_counter() - start) / count / units)
            host[name].append((returned - start) / count / units)
    return {
        name: {
            "median": statistics.median(t),
            "min": min(t),
            "max": max(t),
            "rounds": len(t),
            "units": len(t) * calls.get(name, 1) * units,
            "total": sum(t) * calls.get(name, 1) * units,
            "host": statistics.median(host[name]),
        }
        for name, t in times.items()
    }


def _timed(
    contenders: Mapping[str, Callable[[], Run]],
    job: _Job,
    *,
    rounds: int | None,
    ours: int = 1,
    units: int = 1,
) -> tuple[dict[str, Any], dict[str, Run]]:
    """Makes each contender, times them by turns, and gives the result and what ran.

    Args:
        ours: least calls a turn of dmfast; else as many as take :data:`_TURN`, like the others.
    """
    device = job.device
    runs: dict[str, Run] = {}
    calls: dict[str, int] = {}
    losses: dict[str, float | None] = {}
    peaks: dict[str, int] = {}
    for name, make in contenders.items():
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        runs[name] = run = make()
        loss = run()
        losses[name] = None if loss is None else loss.item()
        for _ in range(_WARM_UP[device.type]):
            run()
        synchronise(device)
        start = time.perf_counter()
        run()
        synchronise(device)
        calls[name] = max(1, math.ceil(_TURN / (time.perf_counter() - start)))
        if device.type == "cuda":
            peaks[name] = peak_memory(device) - held
    calls[OURS] = max(calls[OURS], ours)
    seconds = job.config.seconds or _SECONDS
    times = time_by_turns(runs, device, rounds=rounds, seconds=seconds, calls=calls, units=units)
    result: dict[str, Any] = {"seconds": times, "peak_memory_bytes": peaks}
    if len(times) > 1:
        result["ratios"] = {
            name: times[name]["median"] / times[OURS]["median"] for name in times if name != OURS
        }
    ours_lost, others = losses[OURS], losses.get(TIDIED)
    if ours_lost is not None:
        result["first_loss"] = losses
    if ours_lost is not None and others is not None:
        tolerance = _TOLERANCE[job.precision]
        result["losses_agree"] = math.isclose(ours_lost, others, rel_tol=tolerance)
    return result, runs


class _Clock:
    """The seconds of the stages of an iteration, by the device's own clock.

    On a GPU the events of a stage lie between its kernels, whenever these run. NVTX ranges go with
    it where the package ``nvtx`` is installed.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[str, Any, Any]] = []
        self._nvtx = _nvtx()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        with ExitStack() as ranges:
            if self._nvtx is not None:
                ranges.enter_context(self._nvtx.annotate(name, domain="dmfast"))
            begin = self._mark()
            yield
            self._marks.append((name, begin, self._mark()))

    def _mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = ceilings.cuda_event()
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """By name, the sums since the last reading."""
        synchronise(self._device)
        sums: dict[str, float] = {}
        for name, begin, end in self._marks:
            on_cpu = self._device.type != "cuda"
            took = end - begin if on_cpu else begin.elapsed_time(end) / 1e3
            sums[name] = sums.get(name, 0.0) + took
        self._marks.clear()
        return sums


def _nvtx() -> Any:
    try:
        return import_module("nvtx")
    except ImportError:
        return None


def _stage_times(job: _Job) -> dict[str, dict[str, float]]:
    """The median, least and most seconds of each stage of an eager iteration, and of all of it."""
    matcher, clock = job.matcher(), _Clock(job.device)
    found: list[dict[str, float]] = []
    start = time.perf_counter()
    with _ranges.watched(clock):
        for step in range(_STAGE_ROUNDS + 1):
            with clock("all"):
                _, gradient = matcher.gradient(step)
                matcher.update(gradient)
            sums = clock.read()
            if step:  # the first one warms up
                found.append(sums)
            if step >= _LEAST_ROUNDS and time.perf_counter() - start > _SECONDS / 2:
                break
    return {
        name: {
            key: of([sums[name] for sums in found])
            for key, of in (("median", statistics.median), ("min", min), ("max", max))
        }
        for name in (*_ranges.STAGES, "all")
        if name in found[0]
    }


# ---- torch.profiler ----------------------------------------------------------------------------


def _profiler(device: torch.device) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def _by_name(run: Run, device: torch.device) -> list[dict[str, Any]]:
    """The kernels (of a CPU: the operators) of an iteration, the longest first.

    Of each ``name``, ``calls`` and ``seconds`` an iteration, of a CPU without what it calls.
    """
    run()
    synchronise(device)
    with _profiler(device) as profiler:
        for _ in range(_TRACED):
            run()
        synchronise(device)
    kind = torch._C._autograd.DeviceType.CUDA if device.type == "cuda" else None
    rows = []
    for event in profiler.key_averages():
        if kind is None:
            microseconds = event.self_cpu_time_total
        elif event.device_type == kind:
            microseconds = event.self_device_time_total
        else:
            continue
        rows.append(
            {
                "name": event.key,
                "calls": event.count / _TRACED,
                "seconds": microseconds / 1e6 / _TRACED,
            }
        )
    return sorted(rows, key=lambda row: -row["seconds"])


def _write_trace(job: _Job, path: Path, replay: Run | None) -> None:
    """A trace of eager iterations with their stages, as Perfetto and chrome://tracing read it.

    Args:
        replay: makes an iteration without the host, so without stages; it follows in the trace.
    """
    matcher = job.matcher()

    def iteration(step: int) -> None:
        _, gradient = matcher.gradient(step)
        matcher.update(gradient)

    iteration(0)
    synchronise(job.device)
    with _profiler(job.device) as profiler, _ranges.watched(torch.profiler.record_function):
        for step in range(1, 1 + _TRACED):
            with torch.profiler.record_function("iteration"):
                iteration(step)
        if replay is not None:
            for _ in range(_TRACED):
                with torch.profiler.record_function("replayed iteration"):
                    replay()
        synchronise(job.device)
    with atomic_path(path) as temporary:
        profiler.export_chrome_trace(str(temporary))


# ---- the job -----------------------------------------------------------------------------------


def run(config: ProfileConfig) -> dict[str, Any]:
    """Does what ``python -m dmfast.profile`` does: measures, prints a report, writes the files.

    Returns:
        What the JSON file holds.

    Raises:
        InputError: an option or the data cannot be used, or they do not fit each other.
        OSError: a file cannot be written.
    """
    for path in (config.json, config.trace):
        if path is not None:  # where that fails it is to fail now
            Path(path).parent.mkdir(parents=True, exist_ok=True)
    job = _Job.of(config)
    result = _measure(job)
    if config.json:
        write_bytes(Path(config.json), (json.dumps(result, indent=1) + "\n").encode())
    print(report(result))
    return result


def _measure(job: _Job) -> dict[str, Any]:
    config, device, setting = job.config, job.device, job.setting()
    _say("measuring what the machine can do")
    rate = ceilings.arithmetic_rate(job.precision, device)
    bandwidth = ceilings.bandwidth(device)
    _say("timing the stages of an iteration")
    parts = _with_counts(_stage_times(job), setting, job.precision)
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
        condensing, runs = _timed(contenders, job, rounds=rounds, ours=calls)
        _say("naming the kernels")
        names = _by_name(runs[OURS], device)
        captured = loops[0].replays
        if config.trace:
            _say("writing the trace")
            _write_trace(job, Path(config.trace), runs[OURS] if captured else None)
    if device.type == "cpu":
        condensing["peak_memory_bytes"] = {OURS: of_process}
    steps = 20 if device.type == "cuda" else 2
    _say("timing training steps")
    few = None if rounds is None else min(rounds, 10)
    training, _ = _timed(job.training(forms, steps), job, rounds=few, units=steps)
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
        "paper": _papers_claims(data, config.ipc, condensing["seconds"]),
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


def _papers_claims(
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


# ---- the report --------------------------------------------------------------------------------


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
    if unit == "an iteration" and case["seconds"][OURS]["units"] > _LEAST_ROUNDS:
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
        help=f"of rounds, at least {_LEAST_ROUNDS}, for iterations and again for training steps "
        f"(default: {_SECONDS:g})",
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
