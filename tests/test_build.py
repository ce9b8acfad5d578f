# SPDX-License-Identifier: MIT
"""The build: what it says when something is missing, and what it makes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"


def setup(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDA_HOME", "CUDA_PATH")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", *arguments],
        cwd=cwd,
        env=kept | {"DMFAST_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
    )


def project_copy(folder: Path) -> Path:
    """What a build needs, with an operator-free source so that compiling takes no time."""
    folder.mkdir(exist_ok=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "dmfast", folder / "dmfast", ignore=shutil.ignore_patterns("*.so"))
    (folder / "csrc").mkdir()
    (folder / "csrc" / "empty.h").touch()
    (folder / "csrc" / "empty.cpp").write_text("int dmfast_empty() { return 0; }\n")
    return folder


@pytest.mark.parametrize("missing", ["torch", "ninja"])
def test_a_missing_requirement_is_one_line(tmp_path: Path, missing: str) -> None:
    (tmp_path / f"{missing}.py").write_text(
        f"raise ModuleNotFoundError('No module named {missing}', name='{missing}')\n"
    )
    done = setup("--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.strip().count("\n") == 0
    assert re.search(
        rf"{missing} is needed.*pip install {missing}.*no-build-isolation", done.stderr
    )


NO_NVCC = """
import pathlib, shutil
exists, which = pathlib.Path.exists, shutil.which
pathlib.Path.exists = lambda path: path.name != "nvcc" and exists(path)
shutil.which = lambda name, *rest, **more: None if name == "nvcc" else which(name, *rest, **more)
"""


def test_a_missing_nvcc_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(NO_NVCC)
    folder = project_copy(tmp_path)
    done = setup("build_ext", "--inplace", cwd=folder, DMFAST_CUDA="1", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert "DMFAST_CUDA=1 but nvcc was not found" in done.stderr.splitlines()[-1]


def test_an_old_torch_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("__version__ = '2.9.1+cpu'\n")
    done = setup("--version", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert re.fullmatch(r"dmfast: torch 2\.11 or later is needed.*2\.9\.1.*\n", done.stderr)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"DMFAST_CUDA": "yes"}, "DMFAST_CUDA must be 0, 1 or unset, got 'yes'"),
        ({"TORCH_CUDA_ARCH_LIST": "Hopper"}, "TORCH_CUDA_ARCH_LIST holds 'Hopper'"),
    ],
)
def test_wrong_variables_are_named(tmp_path: Path, environment, message: str) -> None:
    done = setup("build_ext", "--inplace", cwd=project_copy(tmp_path), **environment)
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]


def test_cuda_sources_are_compiled_and_linked_where_nvcc_is(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    folder = project_copy(tmp_path)
    (folder / "csrc" / "probe.cu").write_text(
        "__global__ void probe_kernel(float* x) { x[threadIdx.x] *= 2.0f; }\n"
        'extern "C" void dmfast_probe(float* x) { probe_kernel<<<1, 32>>>(x); }\n'
    )
    done = setup(
        "build_ext", "--inplace", cwd=folder, DMFAST_CUDA="1", TORCH_CUDA_ARCH_LIST="8.0;9.0a+PTX"
    )
    assert done.returncode == 0, done.stderr
    assert "1 CUDA sources" in done.stdout
    objects = list(folder.glob("build/*/probe.cu.o"))
    assert len(objects) == 1
    cubins = objects[0].read_bytes()
    assert b"sm_80" in cubins
    assert b"sm_90a" in cubins
    assert list(folder.glob("dmfast/_C.abi3.so"))


def test_a_second_build_compiles_nothing(tmp_path: Path) -> None:
    folder = project_copy(tmp_path)
    assert "empty.cpp" in setup("build_ext", "--inplace", cwd=folder).stdout
    assert "ninja: no work to do" in setup("build_ext", "--inplace", cwd=folder).stdout


def test_a_compile_error_ends_the_build(tmp_path: Path) -> None:
    folder = project_copy(tmp_path)
    (folder / "csrc" / "broken.cpp").write_text("this is not C++\n")
    done = setup("build_ext", "--inplace", cwd=folder)
    assert done.returncode == 1
    assert "the extension did not build" in done.stderr.splitlines()[-1]
    assert not list(folder.glob("dmfast/*.so"))


def test_the_extension_needs_the_stable_interface_only() -> None:
    """So one binary serves every later torch, and every Python from 3.10."""
    for source in CSRC.iterdir():
        for include in re.findall(r'#include\s*[<"]([^>"]+)', source.read_text()):
            assert not include.startswith(("ATen", "c10", "torch/extension", "torch/all")), source
            if include.startswith("torch/"):
                assert include.startswith(("torch/csrc/stable/", "torch/headeronly/")), source
                assert source.suffix != ".cu", source
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm to read the extension's symbols with")
    extension = ROOT / "dmfast" / "_C.abi3.so"
    if not extension.exists():
        pytest.skip("the package under test is not this checkout's")
    symbols = subprocess.run(
        [nm, "-D", "-u", str(extension)], capture_output=True, text=True
    ).stdout
    assert "aoti_torch_" in symbols
    mangled = [line for line in symbols.splitlines() if re.search(r"_ZN\w*(2at|3c10|5torch)", line)]
    assert mangled == []


def test_the_wheel_is_tagged_for_every_python(tmp_path: Path) -> None:
    folder = project_copy(tmp_path)
    done = setup("bdist_wheel", "-d", str(tmp_path / "wheels"), cwd=folder)
    assert done.returncode == 0, done.stderr
    (wheel,) = (tmp_path / "wheels").iterdir()
    platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    assert wheel.name.endswith(f"-cp310-abi3-{platform}.whl")


def test_a_source_distribution_has_all_that_a_build_needs(tmp_path: Path) -> None:
    done = setup("sdist", "-d", str(tmp_path), "--formats", "tar", cwd=project_copy(tmp_path / "p"))
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar")
    with tarfile.open(archive) as tar:
        names = {name.partition("/")[2] for name in tar.getnames()}
    needed = {"setup.py", "pyproject.toml", "csrc/empty.cpp", "csrc/empty.h", "LICENSE"}
    assert needed <= names
