# SPDX-License-Identifier: MIT
"""The options of a condensation: what is given, what follows from it, and what a run goes on by."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from . import cli
from ._own import model_file
from ._own import short_name as short_model_name
from .augment import WORDS, parse_strategy
from .data import canonical_name
from .devices import PRECISIONS, parse_bytes, resolve_device, resolve_precision
from .errors import InputError, check_out, choose
from .gradient_matching import loops_of
from .graphs import GRAPHS
from .matching import INITS
from .networks import MODELS
from .pool import NetworkPool, parse_band
from .presets import METHODS, PRESETS, preset
from .runs import Checkpoint, RunFolder

EPOCHS = 1000  # of an evaluation, from 0 to that: the published protocol
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
                raise InputError(f"{flag(name)} must be {span}, got {value}")
        if self.batch_real is not None and self.batch_real >= 2**63:
            raise InputError(f"--batch-real {self.batch_real} is beyond any number of images")
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
                    f"{flag(name)} goes with --method {methods}: leave it out for {self.method}"
                )


@dataclass(frozen=True)
class Options(CondenseConfig):
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
    def of(config: CondenseConfig) -> Options:
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
        return Options(
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


def check_resumed(options: Options, checkpoint: Checkpoint, folder: RunFolder) -> None:
    """Checks that a run goes on with the options that it was begun with.

    Raises:
        InputError: one that decides its numbers is another than the checkpoint's.
    """
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
        words = (f"{flag(name)} {old!r}, not {new!r}" for name, (old, new) in others.items())
        raise InputError(
            f"{folder.path} was begun with {'; '.join(words)}: resume it with the same, choose "
            "another --out, or start anew with --overwrite"
        )


def _default(option: str) -> Any:
    return getattr(CondenseConfig, option, getattr(Options, option))


def flag(option: str) -> str:
    """What the command line calls an option."""
    if option == "pool":
        return "--networks-from, a pool of digest"
    return "--" + option.replace("_", "-")


#: Flags of the published script that have no counterpart, and what to do instead.
_REPLACED = {
    "--eval_mode": "python -m dmfast.evaluate SET --eval-mode MODE, or --model NAME",
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


def make_parser() -> cli.Parser:
    """The parser of ``python -m dmfast.condense``, whose options are :class:`CondenseConfig`."""
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
        f"for the full {EPOCHS + 1:,} epochs; 0 for none",
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
