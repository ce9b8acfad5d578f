# SPDX-License-Identifier: MIT
"""Builds, tests and measures dmfast where a GPU is: ``make gpu``, and ``make gpu-quick``.

Needs a GPU, nvcc, a torch for CUDA and no network. Every step is a process of its own, and what it
says is in a file beside the results; one that fails, or takes too long, does not stop the others.
What tells most comes first, and what no longer fits into the time is named. The results so far are
written after each step, so that whatever ends the run leaves them: ``gpu.json`` and
``summary.txt``.

``--rehearse`` goes through the same steps on a CPU, at tiny sizes, where they can be.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tables import ROOT

PARTS = str(ROOT / "benchmarks" / "gpu_parts.py")
WAYS = ("cudnn", "fused", "wgmma", "torch")  # of the ConvNet's blocks: DMFAST_GPU
PASSED, FAILED, LEFT_OUT, SKIPPED = "passed", "FAILED", "left out", "NOT DONE"
NEEDS_GPU = "needs a GPU"
_BUDGET = {"full": 570.0, "quick": 170.0, "rehearsal": 900.0}
# What the build and the steps import, by the names that they are imported by.
_REQUIRED = ("torch", "numpy", "ninja", "setuptools", "pytest", "safetensors")
_OF_CONDENSING = ("PIL", "matplotlib", "tqdm", "scipy")
#: One tiny setting for every rehearsed step.
_TINY = "--images 3x8x8 --classes 2 --batch-real 4 --model ConvNetD2W16 --ipc 2 --iterations 2"


@dataclass(frozen=True)
class Step:
    """A process, and what of its results is worth telling.

    Attributes:
        command: its arguments, after those of the present Python.
        least: seconds without which it is not begun.
        most: seconds after which it is ended.
        rehearsal: the arguments in a rehearsal; None: it needs a GPU.
        prefix: what is put before the Python: a tool that runs it.
        missing: what keeps it from being run at all; "" if nothing.
        read: its results, once it has passed: for the JSON file, and in words. Raises ValueError
            with the reason where they do not pass.
    """

    name: str
    command: list[str]
    least: float
    most: float
    rehearsal: list[str] | None = None
    environment: dict[str, str] = field(default_factory=dict)
    prefix: list[str] = field(default_factory=list)
    missing: str = ""
    read: Callable[[], tuple[dict[str, Any], str]] = lambda: ({}, "")


@dataclass(frozen=True)
class Plan:
    """What is asked for.

    Attributes:
        mode: ``full``, ``quick`` or ``rehearsal``.
        data: the folder that holds CIFAR-10, if there is one.
        arch: of the GPU, as in TORCH_CUDA_ARCH_LIST.
    """

    mode: str
    out: Path
    data: str | None
    seconds: float
    arch: str = ""

    @property
    def device(self) -> str:
        return "cpu" if self.mode == "rehearsal" else "cuda"


# ---- the machine -------------------------------------------------------------------------------


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, looked for where setup.py looks for nvcc."""
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        for folder in ("bin", "compute-sanitizer"):
            if home and (path := Path(home) / folder / name).exists():
                return str(path)
    return shutil.which(name)


def missing_packages(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if importlib.util.find_spec(name) is None]


def architecture(capability: tuple[int, int]) -> str:
    """That of a GPU as in TORCH_CUDA_ARCH_LIST; of Hopper with what only it has."""
    name = "{}.{}".format(*capability)
    return "9.0a" if name == "9.0" else name


def problem(mode: str) -> str | None:
    """Why the steps cannot be run here, in one line; None if they can."""
    if missing := missing_packages(_REQUIRED):
        return (
            f"{sys.executable} lacks {', '.join(missing)}: install them, or name another Python "
            "by PYTHON="
        )
    import torch

    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 11):
        return f"torch 2.11 or later is needed, this is {torch.__version__}"
    if mode == "rehearsal":
        return None
    if not torch.cuda.is_available():
        return (
            f"torch {torch.__version__} finds no GPU, and without one there is nothing to measure "
            "(benchmarks/gpu.py --rehearse goes through the steps on a CPU)"
        )
    nvcc = find_tool("nvcc")
    if nvcc is None:
        return "nvcc was not found: install the CUDA toolkit, or set CUDA_HOME to its folder"
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    major, minor = torch.cuda.get_device_capability()
    if f"compute_{major}{minor}" not in known.split():
        return (
            f"{nvcc} does not compile for {torch.cuda.get_device_name()} (compute capability "
            f"{major}.{minor}): a newer CUDA toolkit is needed"
        )
    return None


def machine(device: str) -> dict[str, Any]:
    """What the GPU is, and the versions; dmfast itself may not be built yet."""
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {
        "machine": {"gpu": gpu, "cores": os.cpu_count(), "system": platform.platform()},
        "versions": {
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
    }


def toolkit_note() -> str:
    """A word on a toolkit of another generation than torch's, or nothing."""
    import torch

    nvcc = find_tool("nvcc") or "nvcc"
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    ours = str(torch.version.cuda)
    if release is None or release[1] == ours.partition(".")[0]:
        return ""
    return f"note: nvcc is of CUDA {release[1]}.{release[2]}, torch of {ours}"


# ---- the steps ---------------------------------------------------------------------------------


def cuda_test_files() -> list[str]:
    """The files with tests for a GPU: no other is imported, whatever packages it needs."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path) for path in files if "mark.cuda" in path.read_text()]


def steps(plan: Plan) -> Iterator[Step]:
    """Those of the plan, what tells most first."""
    from roofline import CASES  # imports torch, which may be missing when this module is imported
    from roofline import options as of_random_images

    quick = plan.mode == "quick"
    out, device = plan.out, plan.device

    def profile(
        case: str,
        options: str,
        least: float,
        most: float,
        *,
        way: str | None = None,
        suffix: str | None = None,
        rehearse: bool = False,
    ) -> Step:
        options = f"{of_random_images(CASES[case][1])} {options}"
        name = "-".join(filter(None, (case, way, suffix)))
        path = out / f"{name}.json"
        files = ["--json", str(path), "--device", device]
        graph = ["--graph", "required"]
        return Step(
            name,
            ["-m", "dmfast.profile", *options.split(), *files, *graph],
            least,
            most,
            ["-m", "dmfast.profile", *_TINY.split(), "--no-baselines", *files]
            if rehearse
            else None,
            environment={"DMFAST_GPU": way} if way else {},
            read=lambda: read_profile(path),
        )

    yield Step(
        "build",
        [str(ROOT / "setup.py"), "-q", "build_ext", "--inplace"],
        least=10,
        most=300,
        environment={"DMFAST_CUDA": "1", "TORCH_CUDA_ARCH_LIST": plan.arch},
    )
    tests = out / "tests.xml"
    marks = "cuda and not slow" if quick else "cuda"
    yield Step(
        "tests",
        [
            *("-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider"),
            *(f"--junitxml={tests}", *cuda_test_files()),
        ],
        least=15,
        most=60 if quick else 150,
        environment={"DMFAST_REQUIRE_CUDA": "1"},
        read=lambda: read_tests(tests),
    )
    trace = f"--trace {out / 'trace.json.gz'}"
    if quick:
        options = f"--iterations 2000 --no-baselines {trace}"
        yield profile("cifar10-ipc50", options, 15, 60, rehearse=True)
    else:
        options = f"--iterations 20000 --no-baselines {trace}"
        yield profile("cifar10-ipc50", options, 30, 120, rehearse=True)
        # By itself: compiling the tidied baseline takes long, and may fail.
        yield profile("cifar10-ipc50", "--iterations 100", 60, 200, suffix="baselines")
    if plan.data is not None:
        yield from condensing(plan, plan.data)
    iterations = 300 if quick else 20_000
    options = f"--iterations {iterations} --no-baselines"
    yield profile("cifar10-ipc10", options, 15, 90)
    yield sanitized(plan, "memcheck", "fused", least=15, most=60)
    if quick:
        return
    options = "--iterations 1000 --no-baselines"
    for way in WAYS:
        yield profile("cifar10-ipc50", options, 15, 45, way=way)
    for way in WAYS:
        blocks = out / f"blocks-{way}.json"
        arguments = [PARTS, "blocks", "--json", str(blocks), "--device", device]
        yield Step(
            f"blocks-{way}",
            arguments,
            least=10,
            most=30,
            rehearsal=[*arguments, "--images", "2", "--calls", "1"] if way == WAYS[0] else None,
            environment={"DMFAST_GPU": way},
            read=lambda path=blocks: read_blocks(path),
        )
    few = "--iterations 300 --no-baselines"
    yield profile("tiny-imagenet-ipc50", few, 20, 60)
    yield sanitized(plan, "racecheck", "fused", least=15, most=90)
    yield sanitized(plan, "memcheck", "wgmma", least=15, most=60)
    operators = out / "ops.json"
    yield Step(
        "ops",
        [
            *(str(ROOT / "benchmarks" / "ops.py"), "run", "2560x3x32x32", "class_mean"),
            *("--device", device, "--seconds", "0.1", "--json", str(operators)),
        ],
        least=20,
        most=90,
        read=lambda: read_operators(operators),
    )
    yield profile("cifar100-ipc10", few, 15, 45)
    yield profile("mnist-ipc10", few, 15, 45)


def condensing(plan: Plan, data: str) -> Iterator[Step]:
    """A run on CIFAR-10, and the accuracy of networks trained on what it gives."""
    folder, quick = plan.out / "cifar10", plan.mode == "quick"
    iterations, networks = (1000, 5) if quick else (20_000, 20)
    of_set = ["--dataset", "cifar10", "--data-root", data, "--no-cache", "--device", plan.device]
    missing = missing_packages(_OF_CONDENSING)
    lacking = f"Python lacks {', '.join(missing)}" if missing else ""
    yield Step(
        "condense",
        [
            *("-m", "dmfast.condense", *of_set, "--ipc", "10", "--iterations", str(iterations)),
            *("--checkpoint-every", "10000", "--report-every", "1000", "--seed", "0"),
            *("--graph", "required", "--out", str(folder), "--overwrite"),
        ],
        least=20,
        most=120,
        missing=lacking,
        read=lambda: read_condensing(folder),
    )
    yield Step(
        "accuracy",
        [
            *("-m", "dmfast.evaluate", str(folder), *of_set, "--networks", str(networks)),
            *("--graph", "required", "--overwrite"),
        ],
        least=20,
        most=120,
        missing=lacking,
        read=lambda: read_accuracy(folder),
    )


def sanitized(plan: Plan, tool: str, way: str, *, least: float, most: float) -> Step:
    """Every operator at small sizes under a tool of compute-sanitizer, which sees our kernels."""
    sanitizer = find_tool("compute-sanitizer")
    command = [PARTS, "operators", "--device", plan.device]
    return Step(
        f"{tool}-{way}",
        command,
        least,
        most,
        rehearsal=command if (tool, way) == ("memcheck", "fused") else None,
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "DMFAST_GPU": way},
        prefix=[
            *(sanitizer or "", "--tool", tool, "--kernel-name", "kns=dmfast"),
            *("--report-api-errors", "no", "--error-exitcode", "86", "--print-limit", "20"),
        ],
        missing="" if sanitizer else "compute-sanitizer is not installed",
        read=lambda: ({}, "not under the tool" if plan.mode == "rehearsal" else "nothing found"),
    )


# ---- their results -----------------------------------------------------------------------------


def read_tests(path: Path) -> tuple[dict[str, Any], str]:
    suite = xml.etree.ElementTree.parse(path).getroot().find("testsuite")
    counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
    words = f"{counts['tests']} tests"
    if counts["skipped"]:
        words += f", of which {counts['skipped']} skipped"
    if counts["tests"] == counts["skipped"]:
        raise ValueError("no test was run")
    return counts, words


def read_profile(path: Path) -> tuple[dict[str, Any], str]:
    found = json.loads(path.read_text())
    case = found["condensing"]
    times, rate = case["seconds"]["dmfast"], found["ceilings"]["flop_per_second"]
    result = {
        "iterations": times["units"],
        "seconds": times["total"],
        "median": times["median"],
        "captured": found["captured"],
        "host_share": times["host"] / times["median"],
        "peak_memory_bytes": case["peak_memory_bytes"]["dmfast"],
        "flop_per_second": case["flop"] / times["median"],
        "ceilings": found["ceilings"],
        "ratios": case.get("ratios", {}),
        "losses_agree": case.get("losses_agree"),
        "training_step": found["training"]["seconds"]["dmfast"]["median"],
        "training_ratios": found["training"].get("ratios", {}),
        "machine": found["machine"],
        "versions": found["versions"],
    }
    words = (
        f"{times['median'] * 1e3:.3f} ms an iteration, {times['units']} in {times['total']:.1f} s, "
        f"{result['flop_per_second'] / 1e12:.3g} TFLOP/s"
    )
    if rate:
        words += f" ({result['flop_per_second'] / rate:.0%} of the machine's)"
    words += f", host {result['host_share']:.1%}"
    words += f", peak memory {result['peak_memory_bytes'] / 2**30:.2f} GiB"
    for name, ratio in result["ratios"].items():
        words += f"; {name} {ratio:.1f} x"
    if result["losses_agree"] is False:
        raise ValueError(f"the losses of the first iteration disagree: {case['first_loss']}")
    return result, words


def read_blocks(path: Path) -> tuple[dict[str, Any], str]:
    found = json.loads(path.read_text())
    words = ", ".join(f"{name} {of['ms']:.3f} ms" for name, of in found["blocks"].items())
    return found, words


def read_operators(path: Path) -> tuple[dict[str, Any], str]:
    cases = json.loads(path.read_text())["cases"]
    return {"cases": list(cases)}, f"{len(cases)} cases in {path.name}"


def read_condensing(folder: Path) -> tuple[dict[str, Any], str]:
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    return last, f"{last['iteration']} iterations in {last['seconds']:.1f} s"


def read_accuracy(folder: Path) -> tuple[dict[str, Any], str]:
    found = json.loads((folder / "evaluation.json").read_text())
    keys = ("accuracy_mean", "accuracy_std", "accuracies", "networks", "epochs", "seconds")
    words = (
        f"{found['accuracy_mean']:.1f} % +- {found['accuracy_std']:.1f} over "
        f"{found['networks']} networks in {found['seconds']:.1f} s"
    )
    return {key: found[key] for key in keys if key in found}, words


# ---- the run -----------------------------------------------------------------------------------


def execute(step: Step, plan: Plan, left: float) -> tuple[str, str, dict[str, Any]]:
    """Does a step within the seconds that are left; gives its status, words, and results."""
    rehearsed = plan.mode == "rehearsal"
    if rehearsed and step.rehearsal is None:
        return LEFT_OUT, NEEDS_GPU, {}
    if step.missing and not rehearsed:
        return LEFT_OUT, step.missing, {}
    if left < step.least:
        return SKIPPED, f"{max(0.0, left):.0f} s were left, of {step.least:.0f} or more", {}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": path} | step.environment
    command = [*step.prefix, sys.executable, *step.command]
    if rehearsed:
        command = [sys.executable, *(step.rehearsal or [])]
        environment["OMP_NUM_THREADS"] = "1"  # more would wait for each other at such sizes
    log = plan.out / f"{step.name}.log"
    limit = left if rehearsed else min(step.most, left)  # a CPU may be busy or slow
    with log.open("w") as words:
        # A session of its own, so that all of it can be ended.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=words, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return FAILED, f"was ended after {limit:.0f} s: {log}", {}
        finally:
            end(process)
    if status:
        return FAILED, f"exit status {status}: {last_line(log)} ({log})", {}
    try:
        result, told = step.read()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        return FAILED, f"its results do not pass: {error} ({log})", {}
    return PASSED, told, result


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends what is left of a step, children included."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1][:200] if lines else "it said nothing"


def run(plan: Plan) -> bool:
    """Does the steps; gives whether all passed that could be done here."""

    plan.out.mkdir(parents=True, exist_ok=True)
    begin = time.perf_counter()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/gpu.py", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        **machine(plan.device),
        "mode": plan.mode,
        "steps": {},
    }
    of, versions = result["machine"], result["versions"]
    lines = [f"{of['gpu'] or 'a CPU'}, torch {versions['torch']}, {plan.mode}"]
    if plan.mode != "rehearsal" and (note := toolkit_note()):
        lines.append(note)
    print("\n".join(lines), flush=True)
    for step in steps(plan):
        start = time.perf_counter()
        if result["steps"].get("build", {}).get("status") == FAILED:
            status, words, found = SKIPPED, "the build failed", {}
        else:
            status, words, found = execute(step, plan, plan.seconds - (start - begin))
        took = time.perf_counter() - start
        result["steps"][step.name] = {"status": status, "words": words, "seconds": took} | (
            {"result": found} if found else {}
        )
        lines.append(f"{status:8}  {step.name:22}{took:6.1f} s  {words}")
        print(lines[-1], flush=True)
        result["passed"] = passed(result["steps"])
        (plan.out / "gpu.json").write_text(json.dumps(result, indent=1) + "\n")
        (plan.out / "summary.txt").write_text("\n".join(lines) + "\n")
    failed = [name for name, step in result["steps"].items() if step["status"] == FAILED]
    undone = [name for name, step in result["steps"].items() if step["status"] == SKIPPED]
    verdict = "all passed" if result["passed"] else ""
    verdict += f"failed: {', '.join(failed)}" if failed else ""
    verdict += f"{'; ' * bool(failed)}not done: {', '.join(undone)}" if undone else ""
    print(f"{verdict}; {time.perf_counter() - begin:.0f} s; {plan.out / 'gpu.json'}", flush=True)
    return bool(result["passed"])


def passed(done: dict[str, dict[str, Any]]) -> bool:
    """Whether nothing failed, and nothing was left undone for want of time."""
    return all(step["status"] in (PASSED, LEFT_OUT) for step in done.values())


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--quick", action="store_true", help="what fits into three minutes")
    mode.add_argument("--rehearse", action="store_true", help="on a CPU, at tiny sizes")
    parser.add_argument("--data", metavar="DIR", help="the folder that holds CIFAR-10")
    parser.add_argument(
        "--out", metavar="DIR", type=Path, default=ROOT / "build" / "gpu", help="of the results"
    )
    parser.add_argument(
        "--seconds", metavar="S", type=float, help="for everything (default: 570, quick 170)"
    )
    given = parser.parse_args(arguments)
    chosen = "quick" if given.quick else "rehearsal" if given.rehearse else "full"
    if given.data is not None and not Path(given.data).is_dir():
        parser.error(f"--data {given.data}: there is no such folder")
    if why := problem(chosen):
        sys.exit(f"make gpu: {why}")
    arch = ""
    if chosen != "rehearsal":
        import torch

        arch = architecture(torch.cuda.get_device_capability())
    # So that what ends this ends the step, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    data = None if given.data is None else str(Path(given.data).resolve())
    plan = Plan(chosen, given.out.resolve(), data, given.seconds or _BUDGET[chosen], arch)
    try:
        sys.exit(0 if run(plan) else 1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
