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
TAPE = ROOT / "tests" / "emulation" / "tape.cpp"
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
    command = [CXX, *common.split(), *flags.split(), "-I", str(csrc), "-x", "c++", "-c"]
    done = subprocess.run([*command, str(source), "-o", str(to)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def build(name: str) -> Path:
    """The player of that build; made again when a source has changed."""
    sources = [TAPE, *sorted(CSRC.glob("*.cu"))]
    digest = hashlib.sha256(f"{CXX} {FLAGS[name]}".encode())
    for path in (*sources, *sorted(CSRC.glob("*.h"))):
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


@dataclass
class Call:
    """A launch: its words, and what it is to have made. A tensor among the words is given to it; a
    `Made` is a tensor that it fills."""

    operator: str
    words: Sequence[object]
    expected: list[Tensor]
    exact: bool = False  # to the bit
    name: str = ""


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
            expected = call.expected[seen.get(key, 0)]
            seen[key] = seen.get(key, 0) + 1
            count = _span(made.like)
            end = at + count * made.like.element_size()
            actual = torch.empty(0, dtype=made.like.dtype)
            if count:
                actual = torch.frombuffer(output[at:end], dtype=made.like.dtype)
            at = end
            actual = actual.as_strided(made.like.shape, made.like.stride())
            where = f"{call.name or call.operator} {expected.dtype}, order {order}"
            if call.exact:
                assert torch.equal(actual, expected), where
            else:
                torch.testing.assert_close(
                    actual,
                    expected,
                    equal_nan=True,
                    msg=lambda text, where=where: f"{where}: {text}",
                )
        assert at == len(output)


def _span(tensor: Tensor) -> int:
    if tensor.numel() == 0:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def images(x: Tensor) -> list[object]:
    """The words of a batch [N, C, H, W]."""
    return [x, CODES[x.dtype], *x.stride()]


def made_images(like: Tensor) -> list[object]:
    return [Made(like), CODES[like.dtype], *like.stride()]
