# SPDX-License-Identifier: MIT
"""The one exception that means "the input is at fault"."""

from __future__ import annotations

from collections.abc import Iterable


class InputError(ValueError):
    """Input that cannot be used.

    The message is one line that names the thing and the remedy; the commands print it and exit
    with status 2.
    """


def choose(option: str, value: str, known: Iterable[str]) -> None:
    """Raises :class:`InputError` where the value of an option is none of those known."""
    if value not in known:
        raise InputError(f"{option}: unknown value {value!r}; choose from {', '.join(known)}")


def check_seed(seed: int) -> None:
    """Raises :class:`InputError` where a seed is none that the random numbers have."""
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must be from 0 to 2**63 - 1, got {seed}")


def check_out(out: str | None) -> None:
    """Raises :class:`InputError` where a folder for the results is an empty name."""
    if out == "":
        raise InputError("--out is empty: name a folder, or leave it out")
