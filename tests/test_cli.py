# SPDX-License-Identifier: MIT
"""What every command does when something is in its way: one line, a status, no traceback."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from dmfast import cli

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("condense", "coreset", "evaluate", "export", "profile", "reproduce", "demo")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space", "f"), "f: No space; free some space"),
        (OSError(errno.EROFS, "Read-only", "f"), "f: Read-only; choose a folder that can be writ"),
        (OSError(errno.ENOTDIR, "Not a folder", "f"), "f: Not a folder; a file is in the place"),
        (OSError(errno.EEXIST, "Exists", "f"), "f: Exists; a file is in the place"),
        (OSError(errno.ENAMETOOLONG, "Too long", "f"), "f: Too long; choose a shorter name"),
        (OSError(errno.EMFILE, "Too many", "f"), "f: Too many; check"),
        (OSError("of no\nnumber"), "of no number; check"),
    ],
)
def test_whatever_the_system_refuses_is_one_line(error, words, capsys) -> None:
    def command(arguments: Sequence[str]) -> None:
        raise error

    with pytest.raises(SystemExit) as raised:
        cli.main("dmfast.x", command)
    assert raised.value.code == 2
    line = capsys.readouterr().err
    assert line.startswith(f"python -m dmfast.x: error: {words}")
    assert line.count("\n") == 1


def test_output_that_nobody_reads_ends_the_command_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    code = "from dmfast import cli; cli.main('x', lambda arguments: print('words'))"
    done = subprocess.run(
        [sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_interrupt_while_torch_is_imported(command: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", f"dmfast.{command}"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stderr == f"python -m dmfast.{command}: interrupted\n"
    assert done.returncode == 130


def test_importing_the_package_alone_is_quick() -> None:
    code = "import dmfast, sys; assert 'torch' not in sys.modules; dmfast.ops.siamese_augment"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mnist-ipc1", "--data-root", "nowhere"], "nowhere does not exist"),
        (["cifar", "--data-root", "."], "no such row: cifar; choose from mnist-ipc1"),
    ],
)
def test_a_measurement_ends_as_its_step_does(arguments, words, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks/accuracy.py"), "run", *arguments, "--runs", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
