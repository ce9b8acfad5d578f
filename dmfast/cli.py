# SPDX-License-Identifier: MIT
"""What the commands share: a parser that fails in one line, and exit statuses."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from .errors import InputError

_ROOM = "free some space or choose another folder"
_DISK_REMEDIES = {
    errno.ENOSPC: _ROOM,
    errno.EDQUOT: _ROOM,
    errno.EFBIG: _ROOM,
    errno.EIO: "check the disk or choose another folder",
    errno.EROFS: "choose a folder that can be written to",
    errno.EACCES: "choose a folder that you may use, or change its permissions",
    errno.EPERM: "choose a folder that you may use, or change its permissions",
}


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default only where there is one to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default is False or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit status 2."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=f"python -m {prog}",
            description=description,
            formatter_class=_HelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def main(prog: str, command: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs ``command(sys.argv[1:])`` and exits with its status.

    0: done. 2: a wrong option, unusable input (:class:`InputError`) or a disk that is full or
    cannot be written, with one line on stderr. 130: interrupted.
    """
    try:
        command(sys.argv[1:])
    except InputError as error:
        sys.exit(_fail(prog, str(error)))
    except OSError as error:
        remedy = _DISK_REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        sys.exit(_fail(prog, f"{where}{error.strerror}; {remedy}"))
    except KeyboardInterrupt:
        print(f"python -m {prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _fail(prog: str, message: str) -> int:
    print(f"python -m {prog}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2
