# SPDX-License-Identifier: MIT
"""What the commands share: a parser that fails in one line, and exit statuses."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from .errors import InputError

_ROOM = "free some space or choose another folder"
_PERMISSION = "choose a folder that you may use, or change its permissions"
_FILE_IN_THE_WAY = "a file is in the place of a folder: remove it or choose another folder"
_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EIO: "check the disk or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.ENOTDIR: _FILE_IN_THE_WAY,
    errno.EEXIST: _FILE_IN_THE_WAY,
    errno.ENAMETOOLONG: "choose a shorter name",
}


def disk_words(error: OSError) -> tuple[str, str]:
    """What the system says went wrong, and what the user can do about it."""
    remedy = _REMEDIES.get(error.errno or 0, "check that it is there and may be used")
    return error.strerror or str(error), remedy


def parse_shape(option: str, text: str) -> tuple[int, int, int]:
    """The shape of an image, (C, H, W).

    Raises:
        InputError: it is not written as ``3x32x32``.
    """
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*x[1-9]\d*", text):
        raise InputError(f"{option}: a shape is CxHxW, as 3x32x32, got {text!r}")
    channels, height, width = (int(side) for side in text.split("x"))
    return channels, height, width


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


class _Replaced(argparse.Action):
    """A flag of another program: its help says what to do instead."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> NoReturn:
        parser.error(f"{option_string} has no counterpart here: {self.help}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit status 2."""

    def __init__(self, prog: str, description: str, **options: Any) -> None:
        """``options`` are what argparse hands on to the parser of a subcommand."""
        super().__init__(
            prog=f"python -m {prog}",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
            **options,
        )

    def add_replaced(self, title: str, flags: dict[str, str]) -> None:
        """Adds flags of another program that are errors here, and what to do in their place."""
        group = self.add_argument_group(title)
        for flag, instead in flags.items():
            group.add_argument(
                flag, action=_Replaced, default=argparse.SUPPRESS, metavar="X", help=instead
            )

    def add_data_root(self) -> None:
        """Adds where the real images are."""
        self.add_argument(
            "--data-root",
            metavar="DIR",
            help="what holds the data set's folder or files (default: ./data, then $DMFAST_DATA)",
        )

    def add_loading(self) -> None:
        """Adds how the real images are come by."""
        self.add_argument(
            "--download", action="store_true", help="fetch a data set where it is not found"
        )
        self.add_argument(
            "--no-cache",
            dest="cache",
            action="store_false",
            help="keep no decoded images of a data set",
        )

    def add_augmentation(self, words: Sequence[str], of: str, without: str) -> None:
        """Adds the strategy of a training: ``of`` and ``without`` end the helps of its options."""
        strategy = self.add_mutually_exclusive_group()
        strategy.add_argument(
            "--dsa-strategy",
            metavar="WORDS",
            help=f"{', '.join(words)}, joined by underscores, or none ({of})",
        )
        strategy.add_argument(
            "--no-augmentation",
            dest="dsa_strategy",
            action="store_const",
            const="none",
            help=without,
        )

    def add_passes(self, precisions: Sequence[str], default: Any) -> None:
        """Adds how and where networks' passes are made; ``default`` has what is left out."""
        self.add_argument(
            "--precision",
            choices=precisions,
            default=default.precision,
            help="of the networks' passes; auto is bfloat16 on a GPU, and on a CPU that has its "
            "instructions where the model is made of fused blocks",
        )
        self.add_argument(
            "--device",
            metavar="NAME",
            default=default.device,
            help="cpu, cuda, cuda:N, or auto (a GPU where there is one)",
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def main(prog: str, command: Callable[[Sequence[str]], None] | None = None) -> NoReturn:
    """Runs ``command(sys.argv[1:])`` and exits with its status.

    0: done. 2: a wrong option, unusable input (:class:`InputError`) or a disk or file that fails,
    with one line on stderr. 130: interrupted. 141: nobody reads the output any more.

    Args:
        command: left out, it is ``_main`` of the module ``prog``, imported here: a command that
            calls this before its other imports can be interrupted in them, too.
    """
    try:
        try:
            if command is None:
                command = _import(prog)
            command(sys.argv[1:])
        finally:
            sys.stdout.flush()
    except InputError as error:
        sys.exit(_fail(prog, str(error)))
    except BrokenPipeError:
        # So that the interpreter, on its way out, does not meet the same again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(prog, where + "; ".join(disk_words(error))))
    except KeyboardInterrupt:
        sys.exit(_interrupted(prog))
    sys.exit(0)


def _import(module: str) -> Callable[[Sequence[str]], None]:
    def stop(*_: object) -> NoReturn:
        # An exception in the midst of an import comes out as any other; nothing is begun yet.
        os._exit(_interrupted(module))

    handler = signal.signal(signal.SIGINT, stop)
    try:
        command: Callable[[Sequence[str]], None] = importlib.import_module(module)._main
        return command
    finally:
        signal.signal(signal.SIGINT, handler)


def _interrupted(prog: str) -> int:
    print(f"python -m {prog}: interrupted", file=sys.stderr, flush=True)
    return 130


def _fail(prog: str, message: str) -> int:
    print(f"python -m {prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
