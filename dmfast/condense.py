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
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from . import charts, cli
from ._condense_options import EPOCHS, CondenseConfig, Options, check_resumed
from ._condense_options import make_parser as _parser
from ._own import is_own
from ._sources import digest
from .data import ImageData
from .data import load as load_data
from .devices import (
    format_bytes,
    memory_budget,
    memory_checked,
    peak_memory,
)
from .errors import InputError
from .evaluator import evaluate_set
from .gradient_matching import GradientMatcher, loops_of
from .graphs import Recorder, recorder_of
from .loop import Loop, Reading
from .matching import Matcher, Matching, initial_images, placed
from .memory import keep_freed_pages
from .networks import Network, get_network, has_batch_norm
from .pool import NetworkPool
from .presets import caution
from .runs import Checkpoint, RunFolder, interrupts_deferred, locked
from .synthetic import SyntheticSet, save_grid

__all__ = ["CondenseConfig", "run"]


def run(config: CondenseConfig) -> SyntheticSet:
    """Does what ``python -m dmfast.condense`` does: leaves a run in its folder.

    A run that has made its iterations already is not continued; what it came to is returned.

    Raises:
        InputError: an option or the data cannot be used, or they do not fit each other, which
            leaves nothing behind; or the folder holds another run; or the disk fails or the loss
            is no longer finite, which leaves the last checkpoint.
        KeyboardInterrupt: on Ctrl-C, which leaves a checkpoint and the set so far.
    """
    options = Options.of(config)
    folder = RunFolder(options.out)
    with locked(folder.path):
        return _run(config, options, folder)


def _run(config: CondenseConfig, options: Options, folder: RunFolder) -> SyntheticSet:
    if folder.holds_run() and not (options.resume or options.overwrite):
        raise InputError(
            f"{folder.path} holds another run: --resume continues it, --overwrite replaces it; or "
            "choose another --out"
        )
    checkpoint = folder.read_checkpoint() if options.resume else None
    if checkpoint is not None:
        if config.precision == "auto":  # on another device, too, a run goes on as it began
            options = replace(options, precision=checkpoint.options["precision"])
        check_resumed(options, checkpoint, folder)
    graph = options.graph if options.method == "dm" else "off"
    device = torch.device(options.device)
    recorder = recorder_of(graph, device)
    source = load_data(
        options.dataset, options.data_root, cache=options.cache, download=options.download
    )
    remedy = f"choose a smaller --ipc than {options.ipc}"
    if options.method == "dm" and device.type == "cuda":
        remedy += ", or --memory-budget 0"
    with memory_checked(device, "the images", remedy):
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
        options: Options,
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
        model, lr = self._options.model, self._options.lr_img
        own = f", or have {model} keep its embedding in bounds, as by a norm" * is_own(model)
        raise InputError(f"{what}: choose a smaller --lr-img than {lr:g}{own}; {self._folder.kept}")

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
        tqdm.write(f"iteration {self._iteration}: training a network for {EPOCHS + 1} epochs")
        bar = tqdm(total=EPOCHS + 1, desc="evaluation", unit="epoch", leave=False, disable=None)
        with self._uncounted(), bar:
            result = evaluate_set(
                synthetic.images,
                synthetic.labels,
                self._source,
                model=options.model,
                networks=1,
                epochs=EPOCHS,
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


def _matching(options: Options, source: ImageData, network: Network, images: Tensor) -> Matching:
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
        _mention_other_images(pool, options.networks_from, source)
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


def _mention_other_images(pool: NetworkPool, folder: str, source: ImageData) -> None:
    if pool.real_images == digest(source.train_images, source.train_labels):
        return
    same_name = pool.dataset == source.name
    trained_on = "other images of the same name" if same_name else pool.dataset
    _note(
        f"the networks of {folder} were trained on {trained_on}, and what is condensed is "
        f"{source.name}: if that is not meant, name a pool of python -m dmfast.pretrain --dataset "
        f"{source.name}"
    )


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


def _note(text: str) -> None:
    print(f"dmfast.condense: {text}", file=sys.stderr)


def _main(arguments: Sequence[str]) -> None:
    config = CondenseConfig(**vars(_parser().parse_args(arguments)))
    keep_freed_pages()
    run(config)
