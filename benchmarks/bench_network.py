# SPDX-License-Identifier: MIT
"""The cases of iteration.py under pytest-benchmark: ``pytest benchmarks --benchmark-only``.

Choose by name, as ``-k "training-256 and dmfast"``. The time is that of ``units`` iterations, steps
or passes (in the extra information); contenders do not take turns here, as they do in iteration.py.
"""

from __future__ import annotations

import pytest
import torch
from iteration import CASES
from pytest_benchmark.fixture import BenchmarkFixture


@pytest.mark.parametrize("contender", next(iter(CASES.values())).contenders)
@pytest.mark.parametrize("name", CASES)
def bench_network(benchmark: BenchmarkFixture, name: str, contender: str) -> None:
    case = CASES[name]
    torch._dynamo.reset()
    run = case.contenders[contender]()
    benchmark.group = name
    benchmark.extra_info |= {"units": case.units, "flop": case.units * case.flop}
    benchmark.pedantic(run, rounds=3, warmup_rounds=1)
