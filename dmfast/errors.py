# SPDX-License-Identifier: MIT
"""The one exception that means "the input is at fault"."""

from __future__ import annotations


class InputError(ValueError):
    """Input that cannot be used.

    The message is one line that names the thing and the remedy; the commands print it and exit
    with status 2.
    """
