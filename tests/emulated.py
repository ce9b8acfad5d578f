# SPDX-License-Identifier: MIT
"""The CUDA kernels, compiled for the CPU and played from a tape of calls."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PLAYER = ROOT / "tests" / "emulation"  # the tape's player, and kernels that only tests have
CXX = os.environ.get("CXX", "c++")

#: The builds by name. Contraction is off as in the extension, so that values agree.
FLAGS = {
    "plain": "-O1",
    "ucontext": "-O1 -DDMFAST_EMULATION_UCONTEXT",
    "address": "-O1 -fsanitize=address,undefined -fno-sanitize-recover=all",
    "thread": "-O1 -fsanitize=thread",
}
ENVIRONMENT = {
    # Leaks are the harness's alone to make, and looking for them fails where ptrace is forbidden.
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "halt_on_error=1",
}
CODES = {torch.float64: 0, torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.uint8: 4}


def _compile(csrc: Path, source: Path, flags: str, to: Path) -> None:
    common = "-std=c++17 -Wall -Wextra -Werror -ffp-contract=off"
    folders = ["-I", str(csrc), "-I", str(PLAYER)]
    command = [CXX, *common.split(), *flags.split(), *folders, "-x", "c++", "-c"]
    done = subprocess.run([*command, str(source), "-o", str(to)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(name: str) -> Path:
    """The player of that build; made again when a source has changed."""
    sources = [PLAYER / "tape.cpp", *sorted(PLAYER.glob("*.cu")), *sorted(CSRC.glob("*.cu"))]
    digest = hashlib.sha256(f"{CXX} {FLAGS[name]}".encode())
    for path in (*sources, *sorted(PLAYER.glob("*.h")), *sorted(CSRC.glob("*.h"))):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulation" / f"{name}-{digest.hexdigest()[:10]}"
    player = folder / "player"
    if not player.exists():
        for old in folder.parent.glob(f"{name}-*"):
            shutil.rmtree(old)
        folder.mkdir(parents=True)
        objects = [folder / f"{source.stem}.o" for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda s, o: _compile(CSRC, s, FLAGS[name], o), sources, objects))
        _link(name, objects, player)
    return player


def build_with_bug(name: str, folder: Path, file: str, compiled: str, old: str, new: str) -> Path:
    """The player of that build with `old` replaced by `new` in `file`, where it occurs once, and
    the kernels of `compiled` made from it."""
    shutil.copytree(CSRC, folder / "csrc")
    for path in PLAYER.glob("*.cu"):
        shutil.copy(path, folder / "csrc")
    patched = folder / "csrc" / file
    assert patched.read_text().count(old) == 1, f"{file} has changed: the bug is not planted"
    patched.write_text(patched.read_text().replace(old, new))
    objects = [path for path in build(name).parent.glob("*.o") if path.stem != compiled]
    objects.append(folder / f"{compiled}.o")
    _compile(folder / "csrc", folder / "csrc" / f"{compiled}.cu", FLAGS[name], objects[-1])
    _link(name, objects, folder / "player")
    return folder / "player"


def _link(name: str, objects: Iterable[Path], player: Path) -> None:
    command = [CXX, *FLAGS[name].split(), *map(str, objects), "-o", str(player)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


_SCHEMAS = (
    "_fused_block_takes(int channels, int filters, int height, int width, int padding, "
    "bool backward, int device) -> bool",
    "instance_norm_relu_pool(Tensor x, Tensor? weight, Tensor? bias, float eps) "
    "-> (Tensor, Tensor)",
    "_instance_norm_relu_pool_backward(Tensor gradient, Tensor x, Tensor? weight, Tensor? bias, "
    "Tensor statistics, float eps, bool[] wanted) -> (Tensor, Tensor, Tensor)",
)
_DEFINITIONS = "".join(f'  m.def("{schema}");\n' for schema in _SCHEMAS)

#: The host's side of operators for a GPU, as operators of the CPU whose launches run the emulated
#: kernels: by file, what is replaced in it, by what. What the CPU has operators of its own for is
#: registered in the library dmfast_emulated.
ON_THE_CPU = {
    "stable_compat.h": [
        ("  const torch::stable::accelerator::DeviceGuard guard(device);\n", ""),
        ("launch(current_cuda_stream(op, device))", "(static_cast<void>(device), launch(nullptr))"),
    ],
    "conv_block_gpu.cpp": [
        ("_LIBRARY_IMPL(dmfast, CUDA, m)", "_LIBRARY_IMPL(dmfast, CPU, m)"),
        (
            "const torch::stable::accelerator::DeviceGuard guard(static_cast<int32_t>(device));",
            "static_cast<void>(device);",
        ),
        (
            "STABLE_TORCH_LIBRARY_IMPL(dmfast, CompositeExplicitAutograd, m) {",
            f"STABLE_TORCH_LIBRARY(dmfast_emulated, m) {{\n{_DEFINITIONS}}}\n"
            "STABLE_TORCH_LIBRARY_IMPL(dmfast_emulated, CompositeExplicitAutograd, m) {",
        ),
    ],
    "norm_pool.cpp": [
        ("if (!x.is_cpu()) {", "if (x.is_cpu()) {"),
        ("if (x.is_cpu()) backward.run();", ""),
        ("_LIBRARY_IMPL(dmfast, CPU, m)", "_LIBRARY_IMPL(dmfast_emulated, CPU, m)"),
        ("_LIBRARY_IMPL(dmfast, CUDA, m)", "_LIBRARY_IMPL(dmfast_emulated, CUDA, m)"),
    ],
}


def build_operators() -> Path:
    """The library of the operators of ON_THE_CPU; made again when a source has changed."""
    names = ["conv_block_gpu.cpp", "norm_pool.cpp", "norm_pool_cpu.cpp"]
    kernels = ("*block_cuda.cu", "norm_pool_cuda.cu", "error_cuda.cu")
    sources = [CSRC / name for name in names]
    sources += sorted(path for pattern in kernels for path in CSRC.glob(pattern))
    digest = hashlib.sha256(f"{CXX} {torch.__version__} {ON_THE_CPU}".encode())
    for path in (*sources, *sorted(CSRC.glob("*.h"))):
        digest.update(path.read_bytes())
    folder = ROOT / "build" / "emulation" / f"operators-{digest.hexdigest()[:10]}"
    library = folder / "operators.so"
    if library.exists():
        return library
    for old in folder.parent.glob("operators-*"):
        shutil.rmtree(old)
    shutil.copytree(CSRC, folder / "csrc")
    for name, replacements in ON_THE_CPU.items():
        text = (CSRC / name).read_text()
        for old, new in replacements:
            assert old in text, f"{name} has changed: there is no {old!r}"
            text = text.replace(old, new)
        (folder / "csrc" / name).write_text(text)
    torch_folder = Path(torch.__file__).parent
    flags = f"-O1 -fPIC -DDMFAST_CUDA -isystem {torch_folder}/include"
    flags += " -DTORCH_TARGET_VERSION=0x020b000000000000 -DTORCH_STABLE_ONLY"
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(
            pool.map(
                lambda source, to: _compile(
                    folder / "csrc", folder / "csrc" / source.name, flags, to
                ),
                sources,
                objects,
            )
        )
    command = [CXX, "-shared", *map(str, objects), "-o", str(library)]
    command += [f"-L{torch_folder}/lib", "-ltorch_cpu", "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return library


@dataclass
class Call:
    """A launch: its words, and what it is to have made. A tensor among the words is given to it; a
    `Made` is a tensor that it fills."""

    operator: str
    words: Sequence[object]
    expected: list[Tensor]
    exact: bool = False  # to the bit
    name: str = ""
    bounds: list[Tensor] | None = None  # on the errors, element by element; else torch's tolerances
    rms: float | None = None  # with bounds: of the errors, in units of the expected values'


@dataclass(frozen=True)
class Made:
    like: Tensor
    initial: Tensor | None = None  # what it holds before, contiguous; by default bytes of 0xFF


@dataclass
class Tape:
    lines: list[str] = field(default_factory=list)
    values: bytearray = field(default_factory=bytearray)
    made: list[tuple[Call, int, Made]] = field(default_factory=list)

    def add(self, call: Call, order: int) -> None:
        self.lines.append(f"order {order}")
        words, outputs = [], []
        for number, word in enumerate(call.words):
            if isinstance(word, Tensor):
                words.append(self._read(f"b{number}", word))
            elif isinstance(word, Made):
                if word.initial is None:
                    size = _span(word.like) * word.like.element_size()
                    self.lines.append(f"buffer b{number} {size} -1")
                else:
                    self._read(f"b{number}", word.initial.clone())
                words.append(f"b{number}:0")
                outputs.append(f"save b{number}")
                self.made.append((call, order, word))
            elif word is None:
                words.append("0")
            else:
                words.append(repr(word) if isinstance(word, float) else str(int(word)))
        self.lines += [f"{call.operator} {' '.join(words)}", *outputs, "clear"]

    def _read(self, name: str, tensor: Tensor) -> str:
        storage = tensor.untyped_storage()
        self.lines.append(f"buffer {name} {storage.nbytes()} {len(self.values)}")
        self.values += torch.empty(0, dtype=torch.uint8).set_(storage).numpy().tobytes()
        return f"{name}:{tensor.storage_offset() * tensor.element_size()}"

    def play(self, player: Path, folder: Path) -> subprocess.CompletedProcess[str]:
        folder.mkdir(exist_ok=True)
        paths = [folder / name for name in ("tape", "values", "output")]
        paths[0].write_text("\n".join(self.lines) + "\n")
        paths[1].write_bytes(self.values)
        return subprocess.run(
            [player, *paths], capture_output=True, text=True, env=os.environ | ENVIRONMENT
        )

    def check(self, player: Path, folder: Path) -> None:
        """Plays it and compares everything that was made with what was expected."""
        done = self.play(player, folder)
        assert done.returncode == 0, done.stderr[-4000:]
        output, at = bytearray((folder / "output").read_bytes()), 0
        seen: dict[int, int] = {}
        for call, order, made in self.made:
            key = id(call) * 64 + order
            number = seen.get(key, 0)
            expected = call.expected[number]
            seen[key] = number + 1
            count = _span(made.like)
            end = at + count * made.like.element_size()
            actual = torch.empty(0, dtype=made.like.dtype)
            if count:
                actual = torch.frombuffer(output[at:end], dtype=made.like.dtype)
            at = end
            actual = actual.as_strided(made.like.shape, made.like.stride())
            where = f"{call.name or call.operator} {expected.dtype}, order {order}"
            if call.bounds is not None:
                assert_within_bounds(actual, expected, call.bounds[number], call.rms, where)
            elif call.exact:
                assert torch.equal(actual, expected), where
            else:
                torch.testing.assert_close(
                    actual,
                    expected,
                    equal_nan=True,
                    msg=lambda text, where=where: f"{where}: {text}",
                )
        assert at == len(output)


def assert_within_bounds(
    actual: Tensor, expected: Tensor, bound: Tensor, rms: float | None, where: str
) -> None:
    """NaN, or infinite, where it is expected; elsewhere an error of at most the bound."""
    error = (actual.double() - expected).abs()
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    wrong = ~(same | (error <= bound))
    if wrong.any():
        share = wrong.double().mean().item()
        first = wrong.nonzero()[0].tolist()
        raise AssertionError(
            f"{where}: {share:.2%} beyond the bound, first at {first}: got "
            f"{actual[tuple(first)].item()}, expected {expected[tuple(first)].item()} within "
            f"{bound[tuple(first)].item()}"
        )
    if rms is not None:
        relative = (error.square().mean() / expected.square().mean()).sqrt().item()
        assert relative <= rms, f"{where}: a relative rms error of {relative}"


def _span(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def images(x: Tensor) -> list[object]:
    """The words of a batch [N, C, H, W]."""
    return [x, CODES[x.dtype], *x.stride()]


def made_images(like: Tensor) -> list[object]:
    return [Made(like), CODES[like.dtype], *like.stride()]
