# SPDX-License-Identifier: MIT
"""What ``make gpu`` does about steps that fail, take too long or cannot be: without a GPU."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import gpu
import pytest
import roofline
import torch
from gpu import FAILED, LEFT_OUT, PASSED, SKIPPED, Plan, Step

from dmfast import condense, evaluate, profile

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def plan(out: Path, mode: str = "full", seconds: float = 60, data: str | None = None) -> Plan:
    return Plan(mode, out, data, seconds, "9.0a")


def python(code: str, **options) -> Step:
    return Step("step", ["-c", code], **{"least": 0, "most": 30, **options})


# ---- the machine -------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_fails_in_one_line(tmp_path: Path) -> None:
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT), "gpu", f"PYTHON={sys.executable}", f"OUT={tmp_path}/out"],
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    line, *of_make = done.stderr.splitlines()
    assert re.fullmatch(r"make gpu: torch \S+ finds no GPU.*", line)
    assert all("Error 1" in other for other in of_make)
    assert not list(tmp_path.iterdir())


def test_the_package_need_not_be_installed() -> None:
    """Its steps are listed by a Python that has torch, but no dmfast."""
    code = (
        "import sys, site; sys.meta_path[:] = [f for f in sys.meta_path if 'editable' not in "
        "repr(f).lower()]; sys.path[:] = [p for p in sys.path if p != sys.argv[1]]; "
        "sys.path.insert(0, sys.argv[1] + '/benchmarks'); import gpu; from pathlib import Path; "
        "print(len(list(gpu.steps(gpu.Plan(mode='full', out=Path('x'), data=None, "
        "arch='9.0a', seconds=1.0)))))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT)], cwd="/", capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 10


def test_make_uses_the_python_that_is_there() -> None:
    """Nothing is installed, built elsewhere or downloaded."""

    def commands(*arguments: str) -> str:
        made = subprocess.run(
            ["make", "-n", "-s", "-C", str(ROOT), "PYTHON=some-python", *arguments],
            env={k: v for k, v in os.environ.items() if k not in ("DATA", "OUT")},
            capture_output=True,
            text=True,
            check=True,
        )
        return " ".join(made.stdout.split())

    assert commands("gpu") == '"some-python" benchmarks/gpu.py'
    assert commands("gpu-quick", "DATA=d e", "OUT=o") == (
        '"some-python" benchmarks/gpu.py --quick --data "d e" --out "o"'
    )


def test_the_architecture_of_a_gpu() -> None:
    assert [gpu.architecture(c) for c in ((8, 0), (9, 0), (10, 0))] == ["8.0", "9.0a", "10.0"]


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch and nvcc say of an H100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")


def nvcc(folder: Path, archs: str, release: str = "13.0") -> Path:
    tool = folder / "bin" / "nvcc"
    tool.parent.mkdir(parents=True)
    tool.write_text(
        f'#!/bin/sh\n[ "$1" = --list-gpu-arch ] && echo "{archs}" || echo "release {release}, V"\n'
    )
    tool.chmod(0o755)
    return folder


def test_what_is_missing_is_said(
    a_gpu: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_HOME", str(nvcc(tmp_path / "fits", "compute_80\ncompute_90")))
    assert gpu.problem("full") is None
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert gpu.toolkit_note() == ""
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    assert gpu.toolkit_note() == "note: nvcc is of CUDA 13.0, torch of 12.9"
    monkeypatch.setenv("CUDA_HOME", str(nvcc(tmp_path / "old", "compute_80\ncompute_86")))
    assert "does not compile for NVIDIA H100 (compute capability 9.0)" in gpu.problem("full")
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    assert gpu.problem("full").startswith("nvcc was not found")
    monkeypatch.setattr(torch, "__version__", "2.9.1+cu128")
    assert gpu.problem("full") == "torch 2.11 or later is needed, this is 2.9.1+cu128"
    monkeypatch.setattr(gpu, "_REQUIRED", ("numpy", "no_such_package", "nor_this"))
    assert "lacks no_such_package, nor_this: install them" in gpu.problem("full")


def test_a_tool_is_looked_for_in_the_toolkit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sanitizer = tmp_path / "compute-sanitizer" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    sanitizer.touch()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert gpu.find_tool("compute-sanitizer") == str(sanitizer)
    assert gpu.find_tool("no-such-tool") is None


# ---- a step ------------------------------------------------------------------------------------


def test_a_step_that_passes_tells_its_results(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['WAY'], sys.path[1] == os.environ['ROOT'])"
    step = python(
        code,
        environment={"WAY": "torch", "ROOT": str(ROOT)},
        read=lambda: ({"ms": 3}, "3 ms"),
    )
    assert gpu.execute(step, plan(tmp_path), 60) == (PASSED, "3 ms", {"ms": 3})
    assert (tmp_path / "step.log").read_text() == "torch True\n"


def test_a_step_that_fails_is_told_by_its_last_line(tmp_path: Path) -> None:
    step = python("print('first'); raise SystemExit('the reason')")
    status, words, _ = gpu.execute(step, plan(tmp_path), 60)
    assert status == FAILED
    assert words == f"exit status 1: the reason ({tmp_path / 'step.log'})"
    assert "it said nothing" in gpu.execute(python("exit(3)"), plan(tmp_path), 60)[1]


def test_results_that_are_not_there_or_do_not_pass_fail(tmp_path: Path) -> None:
    for read in (lambda: gpu.read_blocks(tmp_path / "none"), lambda: {}["ms"]):
        status, words, _ = gpu.execute(python("", read=read), plan(tmp_path), 60)
        assert status == FAILED
        assert words.startswith("its results do not pass:")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc to look into")
def test_a_step_that_takes_too_long_is_ended_with_its_children(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    start = time.perf_counter()
    status, words, _ = gpu.execute(python(code, most=5), plan(tmp_path), 3)
    assert time.perf_counter() - start < 30
    assert status == FAILED
    assert words.startswith("was ended after 3 s")
    child = int((tmp_path / "step.log").read_text())
    for _ in range(100):  # its end is seen once it has been reaped
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or ") Z " in stat.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the step's child goes on")


@pytest.mark.parametrize(
    ("options", "mode", "left", "expected"),
    [
        ({"least": 20}, "full", 19.6, (SKIPPED, "20 s were left, of 20 or more", {})),
        ({"least": 20}, "full", -3, (SKIPPED, "0 s were left, of 20 or more", {})),
        ({"missing": "no tool"}, "full", 60, (LEFT_OUT, "no tool", {})),
        ({}, "rehearsal", 60, (LEFT_OUT, "needs a GPU", {})),
        ({"missing": "no tool", "rehearsal": ["-c", ""]}, "rehearsal", 60, (PASSED, "", {})),
    ],
)
def test_what_cannot_be_done_is_not(
    options: dict, mode: str, left: float, expected: tuple, tmp_path: Path
) -> None:
    step = python("raise SystemExit(1)", **options)
    assert gpu.execute(step, plan(tmp_path, mode), left) == expected


# ---- all of them -------------------------------------------------------------------------------


def test_no_step_stops_the_others_and_each_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    written: list[list[str]] = []
    monkeypatch.setattr(gpu, "toolkit_note", lambda: "note: a note")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")

    def steps(plan: Plan) -> Iterator[Step]:
        for name, code in (("good", ""), ("bad", "exit('broken')"), ("fine", "")):
            yield Step(name, ["-c", code], 0, 30, read=lambda: ({"x": 1}, "a word"))
            written.append(list(json.loads((plan.out / "gpu.json").read_text())["steps"]))
        yield Step("long", ["-c", ""], least=1000, most=2000)

    monkeypatch.setattr(gpu, "steps", steps)
    assert gpu.run(plan(tmp_path)) is False
    assert written == [["good"], ["good", "bad"], ["good", "bad", "fine"]]
    result = json.loads((tmp_path / "gpu.json").read_text())
    statuses = {name: step["status"] for name, step in result["steps"].items()}
    assert statuses == {"good": PASSED, "bad": FAILED, "fine": PASSED, "long": SKIPPED}
    assert result["steps"]["good"]["result"] == {"x": 1}
    assert not result["passed"]
    summary = (tmp_path / "summary.txt").read_text().splitlines()
    assert summary[:2] == [f"NVIDIA H100, torch {torch.__version__}, full", "note: a note"]
    assert [line.split()[-1] for line in summary[2:3]] == ["word"]
    out = capsys.readouterr().out
    assert all(line in out for line in summary)
    assert "failed: bad; not done: long;" in out


TWO_STEPS = """
import sys
sys.path.insert(0, sys.argv[1])
import gpu
def steps(plan):
    wait = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    for name, code in (("first", ""), ("second", wait)):
        yield gpu.Step(name, [], least=0, most=60, rehearsal=["-c", code])
gpu.steps = steps
gpu.main(["--rehearse", "--out", sys.argv[2]])
"""


def test_what_ends_it_ends_the_step_and_leaves_the_results(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TWO_STEPS, str(SCRIPT.parent), str(tmp_path)],
        stdout=subprocess.DEVNULL,
    )
    log = tmp_path / "second.log"
    for _ in range(600):
        if log.exists() and log.read_text().endswith("\n"):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int(log.read_text()), 0)
    assert list(json.loads((tmp_path / "gpu.json").read_text())["steps"]) == ["first"]


@pytest.mark.parametrize("mode", ["full", "quick"])
def test_every_command_is_one_that_its_program_takes(mode: str, tmp_path: Path) -> None:
    steps = list(gpu.steps(plan(tmp_path, mode, data="d")))
    names = [step.name for step in steps]
    assert len(set(names)) == len(names)
    if mode == "full":  # the README's table is made from these
        assert set(roofline.CASES) <= set(names)
    assert names[:3] == ["build", "tests", "cifar10-ipc50"]
    programs = {
        "dmfast.profile": (profile._parser(), profile.ProfileConfig),
        "dmfast.condense": (condense._parser(), condense.CondenseConfig),
        "dmfast.evaluate": (evaluate._parser(), None),
    }
    for step in steps:
        assert step.least <= step.most
        if step.command[0] != "-m" or step.command[1] == "pytest":
            assert step.command[0] == "-m" or Path(step.command[0]).exists()
            continue
        parser, config = programs[step.command[1]]
        given = vars(parser.parse_args(step.command[2:]))
        assert given["device"] == "cuda"
        if config is not None:
            assert config(**given).graph == "required"


def test_the_full_run_makes_what_is_claimed_of_it(tmp_path: Path) -> None:
    steps = {step.name: step for step in gpu.steps(plan(tmp_path))}
    command = " ".join(steps["cifar10-ipc50"].command)
    assert "--ipc 50 --iterations 20000" in command
    beside = " ".join(steps["cifar10-ipc50-baselines"].command)
    assert "--ipc 50" in beside
    assert "--no-baselines" not in beside  # of which each has at least as many turns as rounds
    assert profile._ROUNDS == 100
    assert "--iterations 20000" in " ".join(steps["cifar10-ipc10"].command)
    assert steps["tests"].environment == {"DMFAST_REQUIRE_CUDA": "1"}
    assert steps["build"].environment == {"DMFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": "9.0a"}
    for way in gpu.WAYS:
        for name in (f"cifar10-ipc50-{way}", f"blocks-{way}"):
            assert steps[name].environment == {"DMFAST_GPU": way}
    assert {str(ROOT / "tests" / "test_cuda.py")} < set(steps["tests"].command)
    assert not {"condense", "accuracy"} & set(steps)


def test_a_sanitizer_watches_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/cuda/{name}")
    (step,) = [step for step in gpu.steps(plan(tmp_path)) if step.name == "racecheck-fused"]
    assert step.prefix[:3] == ["/cuda/compute-sanitizer", "--tool", "racecheck"]
    assert step.missing == ""
    monkeypatch.setattr(gpu, "find_tool", lambda name: None)
    (step,) = [step for step in gpu.steps(plan(tmp_path)) if step.name == "racecheck-fused"]
    assert step.missing == "compute-sanitizer is not installed"


# ---- results -----------------------------------------------------------------------------------


def junit(path: Path, tests: int, skipped: int) -> Path:
    path.write_text(
        f'<testsuites><testsuite tests="{tests}" failures="0" errors="0" skipped="{skipped}"/>'
        "</testsuites>"
    )
    return path


def test_tests_that_were_not_run_do_not_pass(tmp_path: Path) -> None:
    counts, words = gpu.read_tests(junit(tmp_path / "a.xml", 12, 2))
    assert counts == {"tests": 12, "failures": 0, "errors": 0, "skipped": 2}
    assert words == "12 tests, of which 2 skipped"
    for tests in (0, 3):
        with pytest.raises(ValueError, match="no test was run"):
            gpu.read_tests(junit(tmp_path / "b.xml", tests, tests))


def test_a_run_and_its_accuracy(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"iteration": 10, "seconds": 1.0}\n{"iteration": 20, "seconds": 2.0}\n'
    )
    assert gpu.read_condensing(tmp_path)[1] == "20 iterations in 2.0 s"
    found = {
        **{"accuracy_mean": 48.84, "accuracy_std": 0.3, "networks": 20, "set": "x"},
        "seconds": 4.21,
    }
    (tmp_path / "evaluation.json").write_text(json.dumps(found))
    result, words = gpu.read_accuracy(tmp_path)
    assert words == "48.8 % +- 0.3 over 20 networks in 4.2 s"
    assert "set" not in result


@pytest.mark.slow
def test_a_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The script as it is, on the CPU: what can be done is, and the rest is named."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--rehearse", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
    )
    result = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0, done.stdout + done.stderr
    assert result["passed"]
    statuses = {name: step["status"] for name, step in result["steps"].items()}
    assert {name for name, status in statuses.items() if status == PASSED} == {
        *("cifar10-ipc50", "memcheck-fused", "blocks-cudnn"),
    }
    left_out = [step for step in result["steps"].values() if step["status"] == LEFT_OUT]
    assert left_out
    assert {step["words"] for step in left_out} == {"needs a GPU"}
    of_profile = result["steps"]["cifar10-ipc50"]["result"]
    assert of_profile["iterations"] >= 2
    assert of_profile["captured"] is False
    assert (tmp_path / "summary.txt").read_text() in done.stdout
    # What the README's table would say of it.
    assert "s, from the time of" in roofline.table(tmp_path / "gpu.json")
