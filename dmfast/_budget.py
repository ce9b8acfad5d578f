# SPDX-License-Identifier: MIT
"""What of a table fits the time there is: nothing here runs or reads anything."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from .errors import InputError

_UNITS = {"s": 1, "m": 60, "h": 3600}
_FEWEST_NETWORKS = 3  # of fewer a spread says nothing
_FEWEST_ITERATIONS = 100  # of how many are asked one is made at least

#: What a kind of work is measured by: its name, then what else its rate depends on.
Key = tuple[str, ...]
Work = tuple[Key, float]


def parse_duration(option: str, text: str) -> float:
    """Seconds, from ``90s``, ``40m`` or ``1.5h``.

    Raises:
        InputError: it is none of these, or nothing.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text.strip())
    seconds = float(match[1]) * _UNITS[match[2]] if match else 0.0
    if not 0 < seconds < math.inf:
        raise InputError(f"{option} must be a time such as 90s, 40m or 1.5h, got {text!r}")
    return seconds


@dataclass(frozen=True)
class Size:
    """How large a cell is made.

    Attributes:
        networks: of each set.
        iterations: of each set's condensation, 0 where there is none.
    """

    sets: int
    networks: int
    iterations: int

    @property
    def smallest(self) -> Size:
        """The smallest form that says anything."""
        return Size(
            1,
            min(self.networks, _FEWEST_NETWORKS),
            math.ceil(self.iterations / _FEWEST_ITERATIONS),
        )


def shortened(asked: Size, seconds: Callable[[Size], float], left: float) -> Size | None:
    """The largest form of a cell that ends within ``left`` seconds; None where none does.

    Sets go first, down to one, then networks, then iterations: a further set or network makes a
    figure surer, and only iterations change what is measured.

    Args:
        seconds: what a form takes; no more for less.
    """
    size, smallest = asked, asked.smallest
    if seconds(smallest) > left:
        return None
    for name in ("sets", "networks", "iterations"):
        fewest = replace(size, **{name: getattr(smallest, name)})
        if seconds(fewest) > left:
            size = fewest
            continue
        low, high = getattr(fewest, name), getattr(size, name)
        while low < high:  # low is known to fit
            middle = (low + high + 1) // 2
            if seconds(replace(size, **{name: middle})) <= left:
                low = middle
            else:
                high = middle - 1
        if name == "iterations" and low < size.iterations:
            low = max(_rounded(low), smallest.iterations)
        return replace(size, **{name: low})
    raise AssertionError("the smallest form fits, and the last one tried is it")


def _rounded(number: int) -> int:
    """Down to two digits."""
    unit = int(10 ** max(len(str(number)) - 2, 0))
    return number // unit * unit


def allotment(left: float, least: Sequence[float]) -> float:
    """What the first of several cells may take of ``left`` seconds.

    Every cell whose smallest form still fits gets the time for that, and an equal share of what is
    over. Where the cheap ones come first, what these do not need goes to the others.

    Args:
        least: seconds of the smallest form of each, in order. Where the first does not fit, it may
            take all, which does not suffice.
    """
    if least[0] > left:
        return left
    reserved, count = 0.0, 0
    for seconds in least:
        if reserved + seconds <= left:
            reserved += seconds
            count += 1
    return least[0] + (left - reserved) / count


class Rates:
    """How fast this machine works, as it was last measured."""

    def __init__(self) -> None:
        self._rates: dict[Key, float] = {}

    def __contains__(self, key: Key) -> bool:
        return key in self._rates

    def measure(self, key: Key, work: float, seconds: float) -> None:
        """Takes note that so much of it took so long; the last time counts."""
        self._rates[key] = work / max(seconds, 1e-9)

    def seconds(self, works: Sequence[Work]) -> float:
        """How long these take, by rates of their own, else of their kind, else of any.

        A rate of something else is a guess, for which the highest is taken: what is left out for
        such an estimate would not have fit.
        """
        total = 0.0
        for key, work in works:
            if work:
                rate = self._rates.get(key) or self._guess(key[0])
                total += work / rate
        return total

    def _guess(self, kind: str) -> float:
        of_kind = [rate for key, rate in self._rates.items() if key[0] == kind]
        return max(of_kind or self._rates.values(), default=math.inf)
