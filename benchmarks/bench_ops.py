# SPDX-License-Identifier: MIT
"""The cases of ops.py under pytest-benchmark: ``pytest benchmarks --benchmark-only -k ops``.

Contenders take turns before pytest-benchmark's own rounds, which are dmfast's alone; ratios, and
the share of a copy's rate, come from the former and stand in the extra information.
"""

from __future__ import annotations

import ops
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from dmfast import _load
from dmfast.memory import keep_freed_pages

CASES = [
    *(pytest.param(case, id=str(case)) for case in ops.cases()),
    *(pytest.param(case, id=str(case), marks=pytest.mark.cuda) for case in ops.cases("cuda")),
]


@pytest.mark.parametrize("case", CASES)
def bench_ops(benchmark: BenchmarkFixture, case: ops.Case) -> None:
    if case.device == "cuda" and not (torch.cuda.is_available() and _load.has_cuda_operators()):
        pytest.skip("no GPU, or a build without CUDA operators")
    keep_freed_pages()
    result = ops.measure(case)
    benchmark.group = str(case)
    benchmark.extra_info |= result | {"summary": ops.summary(case, result)}
    runs = [contenders["dmfast"] for _, _, contenders in case.contenders()]

    def all_parts() -> None:
        for run in runs:
            run()
        if case.device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(all_parts, rounds=5, warmup_rounds=1)
