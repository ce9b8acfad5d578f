# SPDX-License-Identifier: MIT
"""The operators' benchmark: its contenders agree, its figures are what they say, and the README's
table is that of the results."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import baselines_ops
import ops
import pytest
import torch

import dmfast.ops
import dmfast.reference

README = Path(__file__).resolve().parent.parent / "README.md"


@pytest.mark.parametrize("word", ops.ROWS)
@pytest.mark.parametrize("make", [baselines_ops.published, baselines_ops.tidied])
def test_the_baselines_are_the_reference(make, word: str) -> None:
    x = torch.randn(20, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    params = ops.table_of(word, 10, 16, "cpu")
    expected = dmfast.reference.siamese_augment(x, params)
    torch.testing.assert_close(make(word)(x, params), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("operator", "direction"),
    [
        ("siamese_augment", "forward"),
        ("siamese_augment", "forward+backward"),
        ("gather_augment", "forward"),
    ],
)
def test_each_contender_is_timed_and_they_agree(operator: str, direction: str) -> None:
    case = ops.Case(operator, (20, 3, 16, 16), torch.bfloat16, direction)
    result = ops.measure(case, rounds=2, calls=2, seconds=0)
    assert list(result["parts"]) == list(ops.ROWS)
    for part in result["parts"].values():
        assert set(part) == {"dmfast", "published", "tidied", "copy"}
        assert all(0 < t["min"] <= t["median"] <= t["max"] for t in part.values())


def test_contenders_that_disagree_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ops.ROWS, "flip", {})
    monkeypatch.setattr(baselines_ops, "_tidied_flip", lambda x, params: x.flip(3))
    case = ops.Case("siamese_augment", (20, 3, 16, 16), torch.float32, "forward")
    with pytest.raises(AssertionError, match="not close"):
        ops.measure(case, rounds=1, calls=1, seconds=0)


def test_the_summary_adds_the_least_times() -> None:
    times = {"dmfast": 2.0, "published": 40.0, "tidied": 10.0, "copy": 1.0}
    parts = {
        word: {name: {"min": t, "median": 9 * t, "max": 99 * t} for name, t in times.items()}
        for word in ("one", "two")
    }
    case = ops.Case("siamese_augment", (5, 2, 2, 2), torch.float32, "forward")
    summary = ops.summary(case, {"bytes": 2 * 2 * 40 * 4, "parts": parts})
    assert summary == {"ms": 4, "share_of_copy": 0.5, "published": 20, "tidied": 5, "copy": 0.5}


def test_names_of_cases_differ() -> None:
    names = [str(case) for case in itertools.chain(ops.cases(), ops.cases("cuda"))]
    assert len(set(names)) == len(names)


def test_the_table_is_that_of_the_results() -> None:
    readme = README.read_text()
    assert ops.with_table(readme) == readme
    results = json.loads(ops.RESULT.read_text())["cases"]
    assert set(results) == {str(case) for case in ops.cases()}, "not every case has a result"
