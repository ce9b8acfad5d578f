# SPDX-License-Identifier: MIT
"""Condenses a real image set into a few images a class, by distribution matching or a rival.

``python -m dmfast.condense --dataset NAME --ipc N``, and :func:`run` for the same job from Python.
A run is a pure function of its options and the data: killed at any moment and resumed, it comes to
the same bits, on the same machine, as one that was left alone.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.condense")

import math
import re
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import charts, cli
from ._own import model_file
from ._own import short_name as short_model_name
from .augment import WORDS, parse_strategy
from .data import ImageData, canonical_name
from .data import load as load_data
from .devices import (
    PRECISIONS,
    format_bytes,
    free_memory,
    is_out_of_memory,
    memory_budget,
    parse_bytes,
    peak_memory,
    resolve_device,
    resolve_precision,
)
from .errors import InputError, check_out, choose
from .evaluator import evaluate_set
from .gradient_matching import GradientMatcher, loops_of
from .graphs import GRAPHS, Recorder, recorder_of
from .loop import Loop, Reading
from .matching import INITS, Matcher, Matching, initial_images, placed
from .memory import keep_freed_pages
from .networks import MODELS, Network, get_network, has_batch_norm
from .pool import NetworkPool, parse_band
from .presets import METHODS, PRESETS, caution, preset
from .runs import Checkpoint, RunFolder, interrupts_deferred, locked
from .synthetic import SyntheticSet, save_grid

_EPOCHS = 1000  # of an evaluation, from 0 to that: the published protocol
_MAX_ITERATIONS = 2**32  # the number of an iteration is a 32-bit word of the random numbers
#: Options that may change from one session of a run to the next; all else decides its numbers.
_FREE_OPTIONS = frozenset(
    {
        *("iterations", "device", "data_root", "out", "resume", "overwrite", "cache", "download"),
        *("report_every", "checkpoint_every", "evaluate_every", "graph", "memory_budget"),
        "networks_from",  # what is in it counts, not where it is
        "preset",  # only what follows from it counts
    }
)


@dataclass(frozen=True)
class CondenseConfig:
    """The options of a run, named as on the command line.

    ``method`` is a name of :data:`dmfast.presets.METHODS`, ``preset`` one of
    :data:`dmfast.presets.PRESETS`. What is None is what they say for the data set and ``ipc``;
    ``outer_loops`` and ``inner_loops`` are those of :data:`dmfast.gradient_matching.LOOPS`, and
    ``out`` is a folder in ``runs`` named after the run. ``dsa_strategy`` has words joined by
    underscores, "" for no augmentation. ``classes_per_step`` is a number or ``auto``,
    ``memory_budget`` a size as ``8G`` or ``auto``. ``networks_from`` is the folder of a pool
    (:mod:`dmfast.pool`), of which ``band`` says what networks are drawn, as ``40-50``; all where
    None.

    Raises:
        InputError: on values out of range, or options that exclude each other.
    """

    dataset: str = "digits"
    method: str = "dm"
    data_root: str | None = None
    model: str | None = None
    ipc: int = 10
    iterations: int | None = None
    lr_img: float | None = None
    momentum: float = 0.5
    preset: str = "paper"
    batch_real: int | None = None
    outer_loops: int | None = None
    inner_loops: int | None = None
    init: str | None = None
    dsa_strategy: str | None = None
    precision: str = "auto"
    seed: int = 0
    device: str = "auto"
    out: str | None = None
    resume: bool = False
    overwrite: bool = False
    report_every: int | None = None
    checkpoint_every: int | None = None
    evaluate_every: int = 0
    classes_per_step: int | str = "auto"
    graph: str = "auto"
    memory_budget: str = "auto"
    networks_from: str | None = None
    band: str | None = None
    cache: bool = True
    download: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("ipc", 1, None),
            ("iterations", 1, _MAX_ITERATIONS),
            ("batch_real", 1, None),
            ("seed", 0, 2**63 - 1),
            ("report_every", 1, None),
            ("checkpoint_every", 1, None),
            ("evaluate_every", 0, None),
            ("outer_loops", 1, None),
            ("inner_loops", 0, None),
        ):
            value = getattr(self, name)
            if value is not None and (value < low or (high is not None and value > high)):
                span = f"{low} or more" if high is None else f"from {low} to {high}"
                raise InputError(f"{_flag(name)} must be {span}, got {value}")
        if self.lr_img is not None and not 0 < self.lr_img < math.inf:
            raise InputError(f"--lr-img must be a positive number, got {self.lr_img}")
        if not 0 <= self.momentum < 1:
            raise InputError(f"--momentum must be from 0 to below 1, got {self.momentum}")
        per_step = self.classes_per_step
        if per_step != "auto" and not (isinstance(per_step, int) and per_step >= 1):
            raise InputError(f"--classes-per-step must be auto, or 1 or more, got {per_step}")
        choose("--method", self.method, METHODS)
        choose("--preset", self.preset, PRESETS)
        if self.init is not None:
            choose("--init", self.init, INITS)
        choose("--precision", self.precision, PRECISIONS)
        choose("--graph", self.graph, GRAPHS)
        if self.memory_budget != "auto":
            parse_bytes("--memory-budget", self.memory_budget)
        if self.method == "dm":
            self._check_unused("dc or dsa", outer_loops=None, inner_loops=None)
        else:
            self._check_unused(
                "dm", classes_per_step="auto", memory_budget="auto", networks_from=None
            )
            if self.graph == "required":
                raise InputError(f"--graph required: --method {self.method} cannot be captured")
        if self.band is not None:
            if self.networks_from is None:
                raise InputError("--band goes with --networks-from: leave it out, or name a pool")
            parse_band(self.band)
        if self.method == "dc" and self.dsa_strategy and parse_strategy(self.dsa_strategy):
            raise InputError("--dsa-strategy: --method dc augments nothing; --method dsa does")
        check_out(self.out)
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other: leave one out")

    def _check_unused(self, methods: str, **defaults: object) -> None:
        for name, default in defaults.items():
            if getattr(self, name) != default:
                raise InputError(
                    f"{_flag(name)} goes with --method {methods}: leave it out for {self.method}"
                )


@dataclass(frozen=True)
class _Options(CondenseConfig):
    """The options with every default in its place."""

    model: str = ""
    iterations: int = 0
    lr_img: float = 0.0
    batch_real: int = 0
    init: str = ""
    dsa_strategy: str = ""
    report_every: int = 0
    checkpoint_every: int = 0
    out: str = ""
    pool: str = ""  # a digest of what networks are drawn from
    model_file: str | None = None  # the digest of a user's, without which a name says little

    @staticmethod
    def of(config: CondenseConfig) -> _Options:
        name = canonical_name(config.dataset)
        given = {option: value for option, value in asdict(config).items() if value is not None}
        usual = preset(name, config.ipc, config.preset, config.method, config.model)
        options = {**asdict(usual), **given}
        device = resolve_device(config.device)
        if config.method != "dm":
            loops = loops_of(config.ipc, config.outer_loops, config.inner_loops)
            options |= {"outer_loops": loops.outer, "inner_loops": loops.inner}
            if options["iterations"] * loops.outer * max(1, loops.inner) > _MAX_ITERATIONS:
                raise InputError(
                    f"--iterations {options['iterations']} of {loops.outer} x {loops.inner} loops "
                    f"are more than {_MAX_ITERATIONS}"
                )
        if config.networks_from is not None:
            options |= {
                "band": config.band or "all",
                "pool": NetworkPool.digest(config.networks_from),
            }
        method = "" if config.method == "dm" else f"{config.method}-"
        short_name = re.sub(r"[^\w-]+", "-", Path(name).name)
        model = short_model_name(options["model"])
        out = f"runs/{short_name}-{method}{model}-ipc{config.ipc}-seed{config.seed}"
        return _Options(
            **{
                "out": out,
                **options,
                "dataset": name,
                "dsa_strategy": "_".join(parse_strategy(options["dsa_strategy"])),
                "device": str(device),
                "precision": resolve_precision(config.precision, device, options["model"]),
                "model_file": model_file(options["model"]),
            }
        )

    def known(self) -> dict[str, Any]:
        """All, but for what there is of users' models only."""
        options = asdict(self)
        if self.model_file is None:
            del options["model_file"]
        return options

    def fixed(self) -> dict[str, Any]:
        """Those that decide the numbers of the run."""
        return {name: value for name, value in self.known().items() if name not in _FREE_OPTIONS}


def run(config: CondenseConfig) -> SyntheticSet:
    """Does what ``python -m dmfast.condense`` does: leaves a run in its folder.

    A run that has made its iterations already is not continued; what it came to is returned.

    Raises:
        InputError: an option or the data cannot be used, or they do not fit each other, which
            leaves nothing behind; or the folder holds another run; or the disk fails or the loss
            is no longer finite, which leaves the last checkpoint.
        KeyboardInterrupt: on Ctrl-C, which leaves a checkpoint and the set so far.
    """
    options = _Options.of(config)
    folder = RunFolder(options.out)
    with locked(folder.path):
        return _run(config, options, folder)


def _run(config: CondenseConfig, options: _Options, folder: RunFolder) -> SyntheticSet:
    if folder.holds_run() and not (options.resume or options.overwrite):
        raise InputError(
            f"{folder.path} holds another run: --resume continues it, --overwrite replaces it; or "
            "choose another --out"
        )
    checkpoint = folder.read_checkpoint() if options.resume else None
    if checkpoint is not None:
        if config.precision == "auto":  # on another device, too, a run goes on as it began
            options = replace(options, precision=checkpoint.options["precision"])
        _check_options(options, checkpoint, folder)
    graph = options.graph if options.method == "dm" else "off"
    recorder = recorder_of(graph, torch.device(options.device))
    source = load_data(
        options.dataset, options.data_root, cache=options.cache, download=options.download
    )
    with _memory_checked(options):
        condensation = _Condensation(options, source, folder, checkpoint, recorder)
    condensation.prepare_folder()
    _mention_small_classes(source, options.batch_real)
    if words := caution(options.dataset, options.model, options.method):
        _note(words)
    return condensation.run()


class _Condensation:
    """A run in progress: how far it is, and what of it is not written down yet."""

    def __init__(
        self,
        options: _Options,
        source: ImageData,
        folder: RunFolder,
        checkpoint: Checkpoint | None,
        recorder: Recorder | None,
    ) -> None:
        self._options, self._source, self._folder = options, source, folder
        self._resumed = checkpoint
        self._data = _checksum(source)
        if checkpoint is None:
            images = initial_images(source, options.ipc, options.init, options.seed)
            iteration, self._seconds = 0, 0.0
        else:
            if checkpoint.data != self._data:
                raise InputError(
                    f"the images of {source.name} are not those that {folder.path} was begun with: "
                    "name theirs by --data-root, or choose another --out"
                )
            images, iteration = checkpoint.images, checkpoint.iteration
            self._seconds = checkpoint.seconds
        network = get_network(
            options.model, source.channels, source.classes, source.size, options.seed
        )
        if has_batch_norm(network) and options.classes_per_step != "auto":
            raise InputError(
                f"--classes-per-step: {options.model} normalises over all classes at once, so they "
                "cannot be divided; leave the option out, or choose a model without batch norm"
            )
        self._matcher = _matching(options, source, network, images)
        if checkpoint is not None:
            self._matcher.momentum_buffer.copy_(checkpoint.momentum)
        self._loop = Loop(
            self._matcher,
            iteration,
            recorder=recorder,
            required=options.graph == "required",
            note=_note,
        )
        self._loss = math.nan  # the last one read
        self._unfinished: Callable[[], None] | None = None  # the report that is begun
        self._evaluated = 0
        self._begun_at = iteration  # of this session
        self._reported_at = iteration
        self._started = self._reported = time.perf_counter()

    def prepare_folder(self) -> None:
        """Starts the run's folder, or takes it back to the checkpoint."""
        options = self._options.known()
        if self._resumed is not None:
            for record in self._folder.resume(options, self._resumed):
                if "accuracy_mean" in record:
                    self._evaluated = record["iteration"]
            return
        if self._folder.holds_run():
            if self._options.resume:
                _note(f"{self._folder.path} has no checkpoint yet: starting over")
            self._folder.clear()
        elif self._options.resume:
            _note(f"{self._folder.path} holds no run yet: starting one")
        self._folder.start(options, self._checkpoint())

    def run(self) -> SyntheticSet:
        """Makes the iterations that are left and writes the results."""
        from tqdm import tqdm

        options = self._options
        if self._iteration >= options.iterations:
            print(f"{self._folder.path} has made its {self._iteration} iterations already")
        self._started = self._reported = time.perf_counter()
        # On a terminal only; a log has a line at each checkpoint.
        bar = tqdm(total=options.iterations, initial=self._iteration, unit="it", disable=None)
        try:
            with bar, self._loop:
                while True:
                    if self._evaluation_is_due():
                        self._evaluate()
                    if self._iteration >= options.iterations:
                        break
                    end_iteration = self._begin_iteration()
                    with interrupts_deferred():
                        end_iteration()
                        self._write_what_is_due(bar)
                    bar.update()
        except KeyboardInterrupt:
            with interrupts_deferred():
                self._finish_readings()
                self._write_checkpoint()
                self._write_results()
            print(f"stopped after iteration {self._iteration}; --resume continues from there")
            raise
        synthetic = self._write_results()
        print(f"{len(synthetic.images)} images: {self._folder.synthetic}, {self._folder.grid}")
        return synthetic

    @property
    def _iteration(self) -> int:
        return self._loop.iteration

    def _begin_iteration(self) -> Callable[[], None]:
        try:
            return self._loop.prepare()
        except InputError as error:
            raise InputError(f"{error}; {self._folder.kept}") from error

    def _write_what_is_due(self, bar: Any) -> None:
        options, iteration = self._options, self._iteration
        last = iteration == options.iterations
        self._finish_report()
        if last or iteration % options.report_every == 0:
            self._unfinished = partial(self._report, iteration, self._loop.read(), bar)
            # A GPU is to have the next iteration by the time that the host writes.
            if not self._loop.replays:
                self._finish_report()
        if last or iteration % options.checkpoint_every == 0 or self._evaluation_is_due():
            self._finish_readings()
            with self._uncounted():
                self._write_checkpoint()
            if bar.disable:
                self._print_progress()

    def _finish_report(self) -> None:
        finish, self._unfinished = self._unfinished, None
        if finish is not None:
            finish()

    def _finish_readings(self) -> None:
        """Waits for the device, and checks that the run is sound so far."""
        self._finish_report()
        self._check(self._loop.read()())

    def _check(self, reading: Reading) -> None:
        """Checks that the run was still sound.

        Raises:
            InputError: a loss, or an image, is not finite.
        """
        for iteration, loss in enumerate(reading.losses, reading.first + 1):
            if not math.isfinite(loss):
                self._fail(f"the loss is {loss} at iteration {iteration}")
            self._loss = loss
        if not reading.images_are_finite:
            made = reading.first + len(reading.losses)
            self._fail(f"the images are not finite after iteration {made}")

    def _fail(self, what: str) -> NoReturn:
        raise InputError(
            f"{what}: choose a smaller --lr-img than {self._options.lr_img:g}; {self._folder.kept}"
        )

    def _report(self, iteration: int, read: Callable[[], Reading], bar: Any) -> None:
        self._check(read())
        now = time.perf_counter()
        images = (iteration - self._reported_at) * self._matcher.real_images_per_step
        rate = images / (now - self._reported)
        self._reported_at, self._reported = iteration, now
        record = {
            "iteration": iteration,
            "loss": self._loss,
            "seconds": round(self._elapsed(), 3),
            "images_per_second": round(rate, 1),
            "peak_memory_bytes": peak_memory(self._matcher.images.device),
        }
        self._folder.append_metrics(record)
        bar.set_postfix(loss=f"{self._loss:.5g}", refresh=False)

    def _evaluation_is_due(self) -> bool:
        """Whether this iteration is to be evaluated and was not, by this session or another."""
        every, iteration = self._options.evaluate_every, self._iteration
        return every > 0 and 0 < iteration != self._evaluated and iteration % every == 0

    def _evaluate(self) -> None:
        from tqdm import tqdm

        synthetic, options = self._synthetic_set(), self._options
        tqdm.write(f"iteration {self._iteration}: training a network for {_EPOCHS + 1} epochs")
        bar = tqdm(total=_EPOCHS + 1, desc="evaluation", unit="epoch", leave=False, disable=None)
        with self._uncounted(), bar:
            result = evaluate_set(
                synthetic.images,
                synthetic.labels,
                self._source,
                model=options.model,
                networks=1,
                epochs=_EPOCHS,
                seed=options.seed,
                strategy=options.dsa_strategy,
                precision=options.precision,
                device=options.device,
                graph="off" if options.graph == "off" else "auto",
                on_epoch=bar.update,
            )
        record = {
            "iteration": self._iteration,
            "accuracy_mean": result.accuracy_mean,
            "accuracy_std": result.accuracy_std,
            "accuracies": list(result.accuracies),
        }
        with interrupts_deferred():
            self._folder.append_metrics(record)
            self._evaluated = self._iteration
        tqdm.write(f"iteration {self._iteration}: accuracy {result.accuracy_mean:.2f} %")

    def _write_checkpoint(self) -> None:
        self._folder.write_checkpoint(self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            iteration=self._iteration,
            images=self._matcher.images,
            momentum=self._matcher.momentum_buffer,
            seconds=self._elapsed(),
            options=self._options.fixed(),
            data=self._data,
        )

    def _write_results(self) -> SyntheticSet:
        synthetic, folder = self._synthetic_set(), self._folder
        with folder.writing():
            synthetic.save(folder.synthetic)
            save_grid(folder.grid, synthetic)
            reports = [record for record in folder.read_metrics() if "loss" in record]
            charts.save_loss(
                folder.loss, [r["iteration"] for r in reports], [r["loss"] for r in reports]
            )
        return synthetic

    def _synthetic_set(self) -> SyntheticSet:
        return SyntheticSet(
            images=self._matcher.images.to("cpu", copy=True).contiguous(),
            labels=torch.arange(self._source.classes).repeat_interleave(self._options.ipc),
            mean=self._source.mean,
            std=self._source.std,
            class_names=self._source.class_names,
            config={**self._options.fixed(), "iterations": self._iteration},
        )

    def _elapsed(self) -> float:
        return self._seconds + time.perf_counter() - self._started

    @contextmanager
    def _uncounted(self) -> Iterator[None]:
        """Keeps what is no iteration out of the rate that is reported."""
        start = time.perf_counter()
        yield
        self._reported += time.perf_counter() - start

    def _print_progress(self) -> None:
        iteration, iterations = self._iteration, self._options.iterations
        rate = (iteration - self._begun_at) / (time.perf_counter() - self._started)
        left = timedelta(seconds=round((iterations - iteration) / rate))
        print(
            f"iteration {iteration}/{iterations}: loss {self._loss:.5g}, {rate:.3g} iterations/s, "
            f"{left} left",
            flush=True,
        )


def _matching(options: _Options, source: ImageData, network: Network, images: Tensor) -> Matching:
    """What the method makes of the images."""
    device = torch.device(options.device)
    shared: dict[str, Any] = {
        **{"batch_real": options.batch_real, "strategy": options.dsa_strategy},
        **{"seed": options.seed, "lr": options.lr_img, "momentum": options.momentum},
        **{"precision": options.precision, "device": device},
    }
    if options.method != "dm":
        loops = loops_of(options.ipc, options.outer_loops, options.inner_loops)
        return GradientMatcher(source, network, images, loops=loops, **shared)
    budget = memory_budget(options.memory_budget, device)
    pool = None
    if options.networks_from is not None:
        assert options.band is not None
        network = placed(network, device)
        pool = NetworkPool(options.networks_from, options.band, network, options.model)
    per_step = options.classes_per_step
    matcher = Matcher(
        source,
        network,
        images,
        classes_per_step=None if per_step == "auto" else int(per_step),
        memory_budget=budget,
        pool=pool,
        **shared,
    )
    if matcher.streams:
        _note(
            f"the real images take {format_bytes(source.train_images.nbytes)}, and "
            f"--memory-budget leaves {format_bytes(budget or 0)} of {device} to them: they "
            "stay on the host, which sends each batch"
        )
    return matcher


def _check_options(options: _Options, checkpoint: Checkpoint, folder: RunFolder) -> None:
    others = {
        name: (before, value)
        for name, value in options.fixed().items()
        # A run from before there was an option has its default.
        if (before := checkpoint.options.get(name, _default(name))) != value
    }
    if list(others) == ["model_file"]:
        raise InputError(
            f"the file of --model {options.model} is not what it was when {folder.path} was begun: "
            "restore it, choose another --out, or start anew with --overwrite"
        )
    others.pop("model_file", None)
    if others:
        words = (f"{_flag(name)} {old!r}, not {new!r}" for name, (old, new) in others.items())
        raise InputError(
            f"{folder.path} was begun with {'; '.join(words)}: resume it with the same, choose "
            "another --out, or start anew with --overwrite"
        )


def _default(option: str) -> Any:
    return getattr(CondenseConfig, option, getattr(_Options, option))


@contextmanager
def _memory_checked(options: _Options) -> Iterator[None]:
    """Turns a lack of memory into an :class:`InputError`."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for this on a CPU.
        short = isinstance(error, MemoryError) or is_out_of_memory(error)
        if not (short or re.search("alloc|overflow|of mem", str(error))):
            raise
        device = torch.device(options.device)
        if device.type == "cuda":
            raise InputError(
                f"{device} has no memory for the images{free_memory(device)}: choose a smaller "
                f"--ipc than {options.ipc}" + ", or --memory-budget 0" * (options.method == "dm")
            ) from error
        raise InputError(
            f"--ipc {options.ipc} takes more memory than there is: choose a smaller one"
        ) from error


def _mention_small_classes(source: ImageData, batch_real: int) -> None:
    sizes = source.by_class()[1].diff()
    small = int((sizes < batch_real).sum())
    if small:
        smallest = int(sizes.argmin())
        _note(
            f"{small} of {source.classes} classes have fewer images than --batch-real "
            f"{batch_real} (the smallest, {source.class_names[smallest]!r}, has "
            f"{int(sizes[smallest])}): all of theirs are used in every iteration"
        )


def _checksum(source: ImageData) -> str:
    checksum = 0
    for tensor in (source.train_images, source.train_labels):
        checksum = zlib.crc32(tensor.contiguous().numpy().data, checksum)
    return f"{checksum:08x}"


def _flag(option: str) -> str:
    if option == "pool":
        return "--networks-from, a pool of digest"
    return "--" + option.replace("_", "-")


def _note(text: str) -> None:
    print(f"dmfast.condense: {text}", file=sys.stderr)


#: Flags of the published script that have no counterpart, and what to do instead.
_REPLACED = {
    "--eval_mode": "python -m dmfast.evaluate SET --model NAME tests on any network",
    "--num_exp": "run the command once for each --seed",
    "--num_eval": "python -m dmfast.evaluate SET --networks N",
    "--epoch_eval_train": "python -m dmfast.evaluate SET --epochs E",
    "--lr_net": "python -m dmfast.evaluate SET --protocol NAME fixes it",
    "--batch_train": "python -m dmfast.evaluate SET --protocol NAME fixes it",
    "--dis_metric": "leave it out, gradients are matched by the published distance, 'ours'",
}


def _number_or_word(text: str) -> int | str:
    try:
        return int(text)
    except ValueError:
        return text


def _parser() -> cli.Parser:
    default = CondenseConfig
    parser = cli.Parser(
        "dmfast.condense",
        "Condenses a real image set into a few images a class.",
    )

    def add(*flags: str, **arguments: Any) -> None:
        name = flags[0].removeprefix("--").replace("-", "_")
        parser.add_argument(*flags, default=getattr(default, name), **arguments)

    add("--dataset", metavar="NAME", help="a known name, a path or hf:owner/name")
    add(
        *("--data-root", "--data_path"),
        metavar="DIR",
        help="what holds the data set's folder or files (default: ./data, then $DMFAST_DATA)",
    )
    add(
        "--method",
        metavar="NAME",
        help="; ".join(f"{name}: {what}" for name, what in METHODS.items()),
    )
    add(
        "--preset",
        metavar="NAME",
        help="; ".join(f"{name}: {what}" for name, what in PRESETS.items()),
    )
    add("--model", metavar="NAME", help=f"{MODELS} (default: the preset)")
    add("--ipc", metavar="N", type=int, help="synthetic images a class")
    add(
        *("--iterations", "--Iteration"),
        metavar="N",
        type=int,
        help="updates of the images, of dc and dsa networks; the published loop makes N + 1 "
        "(default: the preset: 20000, of dc and dsa 1000)",
    )
    add(
        *("--lr-img", "--lr_img"),
        metavar="RATE",
        type=float,
        help="learning rate of the images, for the summed loss (default: the preset: 1, but on "
        "ConvNets 10 for digits, and for cifar10 from 100 images a class; on ResNet18 0.1, with "
        "_AP 0.01; of dc and dsa 0.1)",
    )
    add("--momentum", metavar="SHARE", type=float, help="of the images' SGD, 0 to below 1")
    add(
        *("--batch-real", "--batch_real"),
        metavar="N",
        type=int,
        help="real images a class and iteration (default: the preset, 256)",
    )
    for name, what in (
        ("--outer-loops", "rounds of an iteration"),
        ("--inner-loops", "epochs of training after each round but the last"),
    ):
        add(
            name,
            metavar="N",
            type=int,
            help=f"{what}, of dc and dsa (default: the published ones for --ipc)",
        )
    add(
        "--init",
        metavar="KIND",
        help=f"what the images start from: {' or '.join(INITS)} (default: the preset: real, of dc "
        "noise)",
    )
    add(
        *("--dsa-strategy", "--dsa_strategy"),
        metavar="WORDS",
        help=f"{', '.join(WORDS)}, joined by underscores, or none (default: the preset)",
    )
    add(
        "--precision",
        metavar="KIND",
        help=f"of the network's passes: {', '.join(PRECISIONS)}; auto is bfloat16 on a GPU, "
        "and on a CPU that has its instructions where the model is made of fused blocks",
    )
    add("--seed", metavar="N", type=int, help="of all draws")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:N, or auto (a GPU where there is one)")
    add(
        *("--out", "--save_path"),
        metavar="DIR",
        help="the run's folder (default: runs/NAME-MODEL-ipcN-seedN)",
    )
    add("--resume", action="store_true", help="continue the run in the folder")
    add("--overwrite", action="store_true", help="replace the run in the folder")
    add(
        "--report-every",
        metavar="N",
        type=int,
        help="iterations between lines of metrics.jsonl (default: the preset: 10, of dc and dsa 1)",
    )
    add(
        "--checkpoint-every",
        metavar="N",
        type=int,
        help="iterations between checkpoints (default: the preset: 200, of dc and dsa 10 below 10 "
        "images a class, else 1)",
    )
    add(
        "--evaluate-every",
        metavar="N",
        type=int,
        help="iterations between evaluations of the set so far, each of which trains one network "
        f"for the full {_EPOCHS + 1:,} epochs; 0 for none",
    )
    add(
        "--classes-per-step",
        metavar="N",
        type=_number_or_word,
        help="classes forwarded at once, to bound memory; auto goes by the size of the images",
    )
    add(
        "--graph",
        metavar="KIND",
        help="whether an iteration is captured once in a CUDA graph and then replayed: auto (on a "
        "GPU, else made eagerly), required (or fail) or off",
    )
    add(
        "--networks-from",
        metavar="POOL",
        help="draw the networks from this folder of python -m dmfast.pretrain (default: random)",
    )
    add(
        "--band",
        metavar="LOW-HIGH",
        help="those of an accuracy in %% from LOW to below HIGH, as 40-50 or 70-; or all",
    )
    add(
        "--memory-budget",
        metavar="SIZE",
        help="what the real images may take of the device, as 8G or 512M: if they are larger they "
        "stay on the host, which sends each batch; auto is half of what is free on a GPU",
    )
    parser.add_argument(
        "--no-cache", dest="cache", action="store_false", help="keep no decoded real images"
    )
    add("--download", action="store_true", help="fetch the data set where it is not found")
    parser.add_replaced("flags of the published script that have no counterpart", _REPLACED)
    return parser


def _main(arguments: Sequence[str]) -> None:
    config = CondenseConfig(**vars(_parser().parse_args(arguments)))
    keep_freed_pages()
    run(config)
