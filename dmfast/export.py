# SPDX-License-Identifier: MIT
"""Turns a condensed set into another format: ``python -m dmfast.export SET --format F --out PATH``.

For the formats, and from Python: :mod:`dmfast.synthetic`.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.export")

from collections.abc import Sequence

from . import cli
from .synthetic import FORMATS, SyntheticSet


def _main(arguments: Sequence[str]) -> None:
    parser = cli.Parser(
        "dmfast.export", "Turns a condensed set into another format, and says what that changes."
    )
    parser.add_argument("set", metavar="SET", help="a set in any of the formats, or a run folder")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help="where: a new folder for mtt and png"
    )
    parser.add_argument(
        "--experiment", type=int, default=-1, help="which set of a res_*.pt file; -1 is the last"
    )
    for name in ("mean", "std"):
        parser.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="X",
            help=f"{name} of each channel of images in [0, 1], where SET does not say",
        )
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="let SET run the code it asks for (trusted files only)",
    )
    options = parser.parse_args(arguments)
    condensed = SyntheticSet.load(
        options.set,
        options.experiment,
        options.unsafe,
        mean=options.mean or (),
        std=options.std or (),
    )
    report = condensed.export(options.out, options.format)
    print(f"{options.out}: {len(condensed.labels)} images, {options.format}: {report}")
