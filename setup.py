# SPDX-License-Identifier: MIT
"""Builds dmfast/_C.abi3.so, the extension with every operator.

torch is needed to build (headers) and to run, but it is not a declared build requirement: pip would
then build in an isolated environment with a torch of its own, gigabytes that are thrown away. So
install torch first and build with `--no-build-isolation`.

The extension uses torch's stable ABI and Python's limited API: one binary serves torch 2.11 and
later on Python 3.10 and later. The sources in CUDA see neither, so that they build, link and import
where torch itself is a CPU build.

Environment: DMFAST_CUDA (unset: CUDA operators if nvcc is there; 1: or fail; 0: never), CUDA_HOME,
TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

try:
    import ninja
    import torch
except ModuleNotFoundError as error:
    raise SystemExit(
        f"dmfast: {error.name} is needed to build the extension and was not found; install it "
        f"first (pip install {error.name}), then build with: "
        "pip install --no-build-isolation ."
    ) from None

if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
    raise SystemExit(
        f"dmfast: torch 2.11 or later is needed, this is {torch.__version__}; upgrade it first "
        "(pip install 'torch>=2.11'), then build with: pip install --no-build-isolation ."
    )

ROOT = Path(__file__).resolve().parent
TORCH = Path(torch.__file__).parent
DEFAULT_ARCHS = "8.0;8.6;8.9;9.0a;10.0;12.0+PTX"
# -ffp-contract=off and --fmad=false: what is drawn has the same bits on every device, and forward
# and adjoint of a sample round their coordinates alike.
WITHOUT_FMAD = ("draw", "augment")
CXX_FLAGS = "-O3 -std=c++17 -fPIC -fvisibility=hidden -Wall -Wextra -ffp-contract=off"
NVCC_FLAGS = "-O3 -std=c++17 -lineinfo -Xcompiler -fPIC,-fvisibility=hidden --threads 2"
# The network's kernels are compiled once for each of these and chosen from when they run.
INSTRUCTION_SETS = {
    "conv_block_avx2.cpp": "-march=x86-64-v3",
    "conv_block_avx512.cpp": "-march=x86-64-v4",
    "conv_block_avx512_bf16.cpp": "-march=x86-64-v4 -mavx512bf16",
}
CONV_BLOCK_FLAGS = "-ffp-contract=fast -fno-math-errno"
DEFINES = "-DTORCH_TARGET_VERSION=0x020b000000000000 -DTORCH_STABLE_ONLY"


def find_cuda() -> Path | None:
    """The CUDA toolkit's folder, or None where it is not to be used."""
    wanted = os.environ.get("DMFAST_CUDA", "")
    if wanted not in ("", "0", "1"):
        raise SystemExit(f"dmfast: DMFAST_CUDA must be 0, 1 or unset, got {wanted!r}")
    if wanted == "0":
        return None
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home and (Path(home) / "bin" / "nvcc").exists():
            return Path(home)
    if nvcc := shutil.which("nvcc"):
        # What is on the path may be a wrapper in a folder of its own: nvcc itself knows its home.
        dry_run = subprocess.run([nvcc, "--dryrun", "-c", "x.cu"], capture_output=True, text=True)
        for line in dry_run.stderr.splitlines():
            if line.startswith("#$ TOP="):
                return Path(line.partition("=")[2].strip()).resolve()
    if wanted == "1":
        raise SystemExit(
            "dmfast: DMFAST_CUDA=1 but nvcc was not found; install the CUDA toolkit or set "
            "CUDA_HOME to its folder (DMFAST_CUDA=0 builds without CUDA)"
        )
    return None


def architectures() -> list[str]:
    """The entries of TORCH_CUDA_ARCH_LIST, as torch reads it: "8.0;9.0a;12.0+PTX"."""
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHS
    return archs.replace(" ", ";").split(";")


def arch_flags() -> str:
    """nvcc's -gencode flags for them."""
    flags = []
    for entry in architectures():
        arch, _, ptx = entry.partition("+")
        number = arch.replace(".", "")
        if not number.rstrip("af").isdigit() or ptx not in ("", "PTX"):
            raise SystemExit(
                f"dmfast: TORCH_CUDA_ARCH_LIST holds {entry!r}; write it like 8.0;9.0a;12.0+PTX"
            )
        flags.append(f"-gencode arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode arch=compute_{number},code=compute_{number}")
    return " ".join(flags)


class NinjaBuild(build_ext):
    """Writes a build.ninja and runs it: a second build compiles what changed and no more."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.cuda = find_cuda()
        # pip builds in a temporary copy otherwise, and would compile everything each time.
        key = repr((torch.__version__, str(self.cuda), sys.version_info[:2]))
        digest = hashlib.sha256(key.encode()).hexdigest()[:10]
        self.build_temp = str(ROOT / "build" / digest)

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        build = Path(self.build_temp)
        build.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(self.rules(ext, output))
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(build), *jobs]
        if subprocess.run(command).returncode:
            raise SystemExit("dmfast: the extension did not build; the compiler's words are above")

    def rules(self, ext: Extension, output: Path) -> str:
        cuda_sources = [source for source in ext.depends if self.cuda and source.endswith(".cu")]
        print(
            f"dmfast: torch {torch.__version__}, {len(ext.sources)} C++ sources, "
            f"{len(cuda_sources)} CUDA sources (toolkit: {self.cuda or 'none'})",
            flush=True,
        )
        include, library, nvcc = (
            in_command(path) for path in (TORCH / "include", TORCH / "lib", f"{self.cuda}/bin/nvcc")
        )
        python_include = in_command(sysconfig.get_paths()["include"])
        includes = f"-isystem {include} -isystem {python_include}"
        link = f"-L{library} -ltorch_cpu"
        if cuda_sources:
            folders = (in_command(f"{self.cuda}/{name}") for name in ("lib64", "lib"))
            link += "".join(f" -L{folder}" for folder in folders)
            link += " -lcudart_static -lrt -ldl -lpthread"
        if sys.platform == "darwin":
            link += " -undefined dynamic_lookup"
        # With it the operators are registered for CUDA tensors too.
        defines = f"{DEFINES} -DDMFAST_CUDA" if cuda_sources else DEFINES
        lines = [
            f"cxx = {os.environ.get('CXX', 'c++')}",
            "rule cxx",
            f"  command = $cxx {CXX_FLAGS} $flags {defines} {includes} -MMD -MF $out.d -c $in "
            "-o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule nvcc",
            f"  command = {nvcc} {NVCC_FLAGS} $flags {arch_flags()} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = $cxx -shared $in -o $out {link}",
        ]
        objects = []
        for source in (ROOT / name for name in (*ext.sources, *cuda_sources)):
            objects.append(f"{source.name}.o")
            rule = "nvcc" if source.suffix == ".cu" else "cxx"
            lines.append(f"build {source.name}.o: {rule} {escape(source)}")
            if rule == "nvcc" and source.name.startswith(WITHOUT_FMAD):
                lines.append("  flags = --fmad=false")
            elif cuda_sources and source.name in ("cuda_architectures.cpp", "error_cuda.cu"):
                names = shlex.quote(f'"{" ".join(architectures())}"')
                lines.append(f"  flags = -DDMFAST_CUDA_ARCHITECTURES={names}")
            elif source.name == "conv_block_plain.cpp":
                lines.append(f"  flags = {CONV_BLOCK_FLAGS}")
            elif source.name in INSTRUCTION_SETS and platform.machine() in ("x86_64", "AMD64"):
                lines.append(f"  flags = {CONV_BLOCK_FLAGS} {INSTRUCTION_SETS[source.name]}")
        lines.append(f"build {escape(output)}: link {' '.join(objects)}")
        return "\n".join(lines) + "\n"


def in_command(path: Path | str) -> str:
    """A path as the shell takes it, in a ninja file."""
    return shlex.quote(str(path)).replace("$", "$$")


def escape(path: Path) -> str:
    return str(path).replace("$", "$$").replace(":", "$:").replace(" ", "$ ")


def sources(*patterns: str) -> list[str]:
    paths = (path for pattern in patterns for path in (ROOT / "csrc").glob(pattern))
    return sorted(str(path.relative_to(ROOT)) for path in paths)


setup(
    # `depends` puts the headers and CUDA sources into a source distribution.
    ext_modules=[
        Extension(
            "dmfast._C", sources("*.cpp"), depends=sources("*.h", "*.cu"), py_limited_api=True
        )
    ],
    cmdclass={"build_ext": NinjaBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
