# SPDX-License-Identifier: MIT
"""The loops on the CPU give the same bits whatever instructions they are compiled for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import CASES, TABLES
from test_ops import DTYPES, MEAN, STD, sides
from torch import Tensor

from dmfast import ops  # noqa: F401  (registers the operators)

OP = torch.ops.dmfast

#: Calls of operators by name: none of them draws, or calls torch's own loops, whose bits differ.
PLAY = """
import sys, torch, dmfast.ops
calls = torch.load(sys.argv[1])
torch.save([getattr(torch.ops.dmfast, name)(*rest) for name, *rest in calls], sys.argv[2])
"""


def calls() -> list[tuple[object, ...]]:
    found: list[tuple[object, ...]] = []
    for dtype in DTYPES:
        for case in CASES:
            x = case.images(dtype)
            for name in ("siamese_augment", "_siamese_augment_backward"):
                found.append((name, x, case.params, case.offsets_tensor))
        images = torch.randint(0, 256, (5, 17, 9, 3), dtype=torch.uint8)
        for source in (images, images / 255):
            index = torch.arange(12) % 5
            found.append(("gather_augment", source, index, TABLES["each"], MEAN, STD, dtype))
        real, _, classes, offsets, _ = sides("offsets", dtype, features=700)
        found.append(("_class_mean", real, classes, offsets))
        special = torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0, 1.5, 6e-8] * 6).to(dtype)
        found.append(("_siamese_augment_backward", special.view(1, 1, 6, 6), TABLES["all"], None))
    return found


def words(value: Tensor) -> Tensor:
    return value.contiguous().flatten().view(torch.uint8)


@pytest.mark.parametrize("lesser", ["plain", "avx2"])
def test_bits_do_not_depend_on_the_instructions(lesser: str, tmp_path: Path) -> None:
    """Against what this machine has best, or what DMFAST_CPU says already."""
    if OP._cpu_kernels().startswith("plain"):
        pytest.skip("there is no other set than plain here")
    torch.save(calls(), tmp_path / "calls")
    subprocess.run(
        [sys.executable, "-c", PLAY, str(tmp_path / "calls"), str(tmp_path / "made")],
        env=os.environ | {"DMFAST_CPU": lesser},
        check=True,
    )
    made = torch.load(tmp_path / "made")
    for (name, *rest), other in zip(torch.load(tmp_path / "calls"), made, strict=True):
        expected = getattr(OP, name)(*rest)
        assert (other.dtype, other.stride()) == (expected.dtype, expected.stride())
        nan = expected.isnan()
        assert torch.equal(nan, other.isnan())
        assert torch.equal(words(expected[~nan]), words(other[~nan])), (name, rest[0].dtype)
