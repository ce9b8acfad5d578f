# SPDX-License-Identifier: MIT
"""The CPU's block kernels on random shapes, under the sanitizers of addresses and of undefined
behaviour."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from emulated import CSRC, CXX, ENVIRONMENT

from dmfast._blocks import cpu_kernels

pytestmark = pytest.mark.slow

DRIVER = Path(__file__).parent / "sanitized" / "blocks.cpp"
FLAGS = "-std=c++17 -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -ffp-contract=fast"
#: By what each set of instructions is compiled with, the best last.
SETS = {
    "plain": "",
    "avx2": "-march=x86-64-v3",
    "avx512": "-march=x86-64-v4",
    "avx512_bf16": "-march=x86-64-v4 -mavx512bf16",
}
SHAPES = 120
#: Plain code and, of those that the CPU has, AVX2's and the best: AVX-512's differs from the one
#: with bfloat16 in the products alone.
HERE = list(SETS)[: list(SETS).index(cpu_kernels().split(",")[0]) + 1]
CHOSEN = [name for name in HERE if name in ("plain", "avx2") or name == HERE[-1]]


def build(name: str, csrc: Path, folder: Path) -> Path:
    command = [CXX, *FLAGS.split(), *SETS[name].split(), f"-DDMFAST_SET={name}", "-I", str(csrc)]
    objects = []

    def compile_one(source: Path) -> None:
        objects.append(folder / f"{source.stem}.o")
        subprocess.run([*command, "-c", source, "-o", objects[-1]], check=True)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(compile_one, (DRIVER, csrc / f"conv_block_{name}.cpp")))
    subprocess.run([*command, *objects, "-o", folder / "driver"], check=True)
    return folder / "driver"


def run(driver: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [driver, str(SHAPES)], capture_output=True, text=True, env=os.environ | ENVIRONMENT
    )


@pytest.mark.parametrize("name", CHOSEN)
def test_no_kernel_leaves_its_buffers(name: str, tmp_path: Path) -> None:
    done = run(build(name, CSRC, tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]


def test_a_bug_is_found(tmp_path: Path) -> None:
    shutil.copytree(CSRC, tmp_path / "csrc")
    patched = tmp_path / "csrc" / "thin_block_simd.h"
    correct, wrong = "bytes = arena.used();", "bytes = arena.used() - 128;"
    assert patched.read_text().count(correct) == 1, "the file has changed: the bug is not planted"
    patched.write_text(patched.read_text().replace(correct, wrong))
    done = run(build("plain", tmp_path / "csrc", tmp_path))
    assert "heap-buffer-overflow" in done.stderr
