# SPDX-License-Identifier: MIT
"""The profile: what it times, counts and writes, and that watching changes nothing."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from recording import Tape

from dmfast import (
    InputError,
    _baselines,
    _convnet,
    _profile_job,
    _profile_report,
    _ranges,
    _timing,
    _torch_profile,
    ceilings,
    memory,
    profile,
)
from dmfast.data import ImageData
from dmfast.matching import Matcher
from dmfast.profile import ProfileConfig, random_images, time_by_turns

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
SMALL = {"images": "3x8x8", "classes": 2, "ipc": 2, "batch_real": 4, "model": "ConvNetD2W16"}
STATISTICS = {"median", "min", "max", "rounds", "units", "total", "host"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short measurements, and nothing compiled."""
    monkeypatch.setattr(ceilings, "_SECONDS", 0.001)
    monkeypatch.setattr(_timing, "_TURN", 0.001)
    monkeypatch.setattr(_timing, "_STAGE_ROUNDS", 3)
    fastest = _baselines.fastest
    monkeypatch.setattr(
        _baselines,
        "fastest",
        lambda function, use, compiled, device: fastest(function, use, False, device),
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_profile(precision: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "made" / "profile.json"
    config = ProfileConfig(
        **SMALL, precision=precision, device="cpu", iterations=6, seed=3, json=str(path)
    )
    result = profile.run(config)
    assert json.loads(path.read_text()) == result
    assert result["options"] == {
        "dataset": "random images",
        "images": "3x8x8",
        "classes": 2,
        "ipc": 2,
        "batch_real": 4,
        "real_images": 8,
        "model": "ConvNetD2W16",
        "dsa_strategy": "color_crop_cutout_flip_scale_rotate",
        "precision": precision,
        "seed": 3,
        "iterations": 6,
    }
    assert result["ceilings"]["bytes_per_second"] > 0
    assert list(result["stages"]) == [*_ranges.STAGES, "all"]
    for stage in result["stages"].values():
        assert 0 < stage["min"] <= stage["median"] <= stage["max"]
        assert stage["bytes_per_second"] == pytest.approx(stage["bytes"] / stage["median"])
    parts = [result["stages"][name] for name in _ranges.STAGES]
    for count in ("flop", "bytes"):
        assert result["stages"]["all"][count] == sum(part[count] for part in parts)
    for case, rounds in (("condensing", 6), ("training", 6)):
        of_case = result[case]
        assert list(of_case["seconds"]) == ["dmfast", "published", "tidied"]
        for times in of_case["seconds"].values():
            assert set(times) == STATISTICS
            assert times["rounds"] == rounds
            assert 0 < times["min"] <= times["median"] <= times["max"]
        assert set(of_case["ratios"]) == {"published", "tidied"}
    assert result["condensing"]["seconds"]["dmfast"]["units"] >= 6
    assert result["condensing"]["losses_agree"]
    assert result["captured"] is False
    assert result["condensing"]["peak_memory_bytes"]["dmfast"] > 0
    assert result["training"]["images"] == 4
    assert set(result["tidied_forms"]) == {"real", "synthetic", "training"}
    assert "dmfast::convnet_class_mean" in {row["name"] for row in result["kernels"]}
    assert all(claim["seconds_extrapolated"] is None for claim in result["paper"])
    out = capsys.readouterr().out
    assert "real pass" in out
    assert "--ipc 50 measures it" in out
    assert "DISAGREE" not in out


def test_dmfast_alone_for_some_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    """And a network that the roofline does not know, of which the times stand alone."""
    options = SMALL | {"model": "ConvNetD2W16BN"}
    result = profile.run(ProfileConfig(**options, device="cpu", seconds=0.01, baselines=False))
    assert list(result["condensing"]["seconds"]) == ["dmfast"]
    assert result["condensing"]["seconds"]["dmfast"]["rounds"] >= 3
    assert "ratios" not in result["condensing"]
    assert "flop" not in result["stages"]["all"]
    assert "operations are counted for a ConvNet of IN" in capsys.readouterr().out


def test_a_replayed_iteration_is_timed_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a recorder of the CPU's, in place of CUDA graphs."""
    monkeypatch.setattr(_convnet, "_check_values", lambda *tensors: None)  # it would read tensors
    monkeypatch.setattr(_timing, "_WARM_UP", {"cpu": 5})
    tape = Tape()
    monkeypatch.setattr(_profile_job, "recorder_of", lambda graph, device: tape)
    path = tmp_path / "trace.json"
    config = ProfileConfig(**SMALL, device="cpu", iterations=8, trace=str(path))
    result = profile.run(config)
    assert result["captured"]
    names = [event.get("name") for event in json.loads(path.read_text())["traceEvents"]]
    assert names.count("replayed iteration") == names.count("iteration") == _torch_profile.TRACED
    assert tape.recorded == 1
    assert tape.replayed >= 8
    assert result["condensing"]["losses_agree"]


def test_kernels_are_those_of_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not what the host did meanwhile; as torch's profiler tells it."""
    kinds = torch._C._autograd.DeviceType

    def event(name: str, kind: object, microseconds: float) -> types.SimpleNamespace:
        return types.SimpleNamespace(
            key=name, device_type=kind, count=6, self_device_time_total=microseconds
        )

    events = [
        event("short", kinds.CUDA, 30.0),
        event("aten::mm", kinds.CPU, 9000.0),
        event("long", kinds.CUDA, 600.0),
    ]

    @contextmanager
    def profiler(device: torch.device) -> Iterator[types.SimpleNamespace]:
        yield types.SimpleNamespace(key_averages=lambda: events)

    monkeypatch.setattr(_torch_profile, "_profiler", profiler)
    monkeypatch.setattr(_torch_profile, "synchronise", lambda device: None)
    made: list[int] = []
    assert _torch_profile.kernels_by_name(lambda: made.append(1), torch.device("cuda")) == [
        {"name": "long", "calls": 2, "seconds": pytest.approx(200e-6)},
        {"name": "short", "calls": 2, "seconds": pytest.approx(10e-6)},
    ]
    assert len(made) == 1 + _torch_profile.TRACED


def test_losses_that_disagree_are_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = _baselines.TidiedIteration.step
    monkeypatch.setattr(_baselines.TidiedIteration, "step", lambda self, k: 1.1 * step(self, k))
    result = profile.run(ProfileConfig(**SMALL, device="cpu", iterations=1))
    assert not result["condensing"]["losses_agree"]
    assert "THE LOSSES OF THE FIRST ITERATION DISAGREE" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_the_command_leaves_a_trace(name: str, tmp_path: Path) -> None:
    options = [f"--{key.replace('_', '-')}={value}" for key, value in SMALL.items()]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "dmfast.profile", *options, "--no-baselines"),
            *("--device", "cpu", "--iterations", "2", "--trace", name, "--json", "profile.json"),
        ],
        cwd=tmp_path,
        env={
            **{"PYTHONPATH": str(ROOT), "PATH": ""},
            **{"OMP_NUM_THREADS": "1", "DMFAST_CPU": "plain"},
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "stages of an eager iteration" in done.stdout
    result = json.loads((tmp_path / "profile.json").read_text())
    assert result["environment"] == {"DMFAST_CPU": "plain"}
    assert "DMFAST_CPU=plain" in done.stdout.splitlines()[0]
    assert result["command"].startswith("python -m dmfast.profile --images=3x8x8")
    assert result["freed_pages_kept"] in (True, False)
    packed = (tmp_path / name).read_bytes()
    trace = json.loads(gzip.decompress(packed) if name.endswith(".gz") else packed)
    names = [event.get("name") for event in trace["traceEvents"]]
    for stage in ("iteration", *_ranges.STAGES):
        assert names.count(stage) == _torch_profile.TRACED


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ipc": 0}, "--ipc must be 1 or more, got 0"),
        ({"classes": 0}, "--classes must be 1 or more, got 0"),
        ({"iterations": 0}, "--iterations must be 1 or more"),
        ({"seconds": 0.0}, "--seconds must be a positive number"),
        ({"seconds": float("nan")}, "--seconds must be a positive number"),
        ({"iterations": 1, "seconds": 1.0}, "--iterations and --seconds exclude each other"),
        ({"seed": -1}, "--seed must be from 0"),
        ({"images": "32x32"}, "a shape is CxHxW, as 3x32x32, got '32x32'"),
        ({"dataset": "digits", "images": "3x32x32"}, "leave them or --dataset out"),
        ({"dataset": "digits", "classes": 3}, "leave them or --dataset out"),
        ({"precision": "half"}, "--precision: unknown value 'half'"),
        ({"graph": "yes"}, "--graph: unknown value 'yes'"),
        ({"trace": "trace.txt"}, "--trace trace.txt: a trace is a .json or .json.gz file"),
        ({"json": "."}, "--json '.' is no file to write"),
        ({"json": ""}, "--json '' is no file to write"),
    ],
)
def test_wrong_options_are_named(options: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=r"^[^\n]*$") as raised:
        ProfileConfig(**options)
    assert words in str(raised.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"model": "ConvNetD2W16BN"}, "--model ConvNetD2W16BN: the baselines have no branch"),
        ({"model": "Net"}, "unknown model 'Net'"),
        ({"device": "tpu"}, "unknown device 'tpu'"),
        ({"graph": "required"}, "--graph required: there are CUDA graphs on a GPU only"),
        ({"dsa_strategy": "blur"}, "unknown transform 'blur'"),
    ],
)
def test_options_that_do_not_fit_are_named(options: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        profile.run(ProfileConfig(**(SMALL | {"device": "cpu"} | options)))


CPU_IS_FULL = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 48000000000 bytes. Error code 12\nframe #0: c10::alloc_cpu"
)


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("Matcher", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")),
        ("Matcher", RuntimeError(CPU_IS_FULL)),
        ("initial_images", MemoryError()),
        ("PublishedIteration", RuntimeError(CPU_IS_FULL)),
        ("train", RuntimeError(CPU_IS_FULL)),
    ],
)
def test_a_lack_of_memory_ends_in_one_line(
    place: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(_profile_job, place, full)
    path = tmp_path / "profile.json"
    config = ProfileConfig(**SMALL, device="cpu", iterations=1, json=str(path))
    with pytest.raises(InputError) as raised:
        profile.run(config)
    assert str(raised.value) == (
        "cpu has no memory for what is to be timed: choose a smaller --images, --classes, --ipc, "
        "--batch-real or --model, or leave the baselines out by --no-baselines"
    )
    assert not path.exists()


@pytest.mark.parametrize(
    "options",
    [
        {"images": "3x100000000x100000000"},
        {"images": "3x8x99999999999999999999"},
        {"classes": 10**20},
        {"ipc": 10**15},
        {"batch_real": 10**20, "dataset": "digits", "images": None, "classes": None},
    ],
)
def test_sizes_beyond_any_memory_end_in_one_line(options: dict[str, object]) -> None:
    config = ProfileConfig(**(SMALL | {"device": "cpu", "baselines": False} | options))
    with pytest.raises(InputError, match=r"^cpu has no memory for .* or --model$") as raised:
        profile.run(config)
    assert ("--images" in str(raised.value)) == (config.dataset is None)


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("the kernel failed\nwhat was compiled: alloc(n); // overflow")
    monkeypatch.setattr(_profile_job.Job, "setting", lambda self: (_ for _ in ()).throw(error))
    with pytest.raises(RuntimeError, match="the kernel failed"):
        profile.run(ProfileConfig(**SMALL, device="cpu"))


def test_classes_that_are_smaller_than_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    """The baselines take as many real images of each class; dmfast alone takes what there are."""
    job = profile._job_of(ProfileConfig(dataset="digits"))
    assert job.batch_real == int(job.data.by_class()[1].diff().min())
    assert f"{job.batch_real} real images a class, not 256" in capsys.readouterr().err
    assert job.setting().real == 10 * job.batch_real
    alone = profile._job_of(ProfileConfig(dataset="digits", baselines=False))
    assert alone.batch_real == 256
    assert alone.setting().real == len(alone.data.train_images)


def test_the_papers_claims_fit_their_settings() -> None:
    seconds = {"dmfast": {"median": 0.5}, "published": {"median": 2.0}}
    cifar10, tiny = random_images((3, 32, 32), 10, 1), random_images((3, 64, 64), 200, 1)

    def extrapolated(data: ImageData, ipc: int) -> list[dict[str, float] | None]:
        claims = _profile_report.papers_claims(data, ipc, seconds)
        return [claim["seconds_extrapolated"] for claim in claims]

    times = {"dmfast": 10_000.0, "published": 40_000.0}
    assert extrapolated(cifar10, 50) == [times, None]
    assert extrapolated(cifar10, 10) == [None, None]
    assert extrapolated(tiny, 10) == [None, times]
    (claim, _) = _profile_report.papers_claims(cifar10, 50, seconds)
    assert _profile_report._beside(claim) == (
        "here 20,000 iterations would take dmfast 2.8 h, published 11.1 h: extrapolated from an "
        "iteration's time, not run, and the accuracy not measured"
    )


def test_contenders_take_turns() -> None:
    made: list[str] = []
    runs = {name: lambda name=name: made.append(name) for name in ("a", "b")}
    times = time_by_turns(runs, CPU, rounds=2, calls={"a": 3}, units=5)
    assert "".join(made) == "aaab" * 2
    assert (times["a"]["units"], times["b"]["units"]) == (30, 10)
    assert all(set(t) == STATISTICS for t in times.values())
    made.clear()
    assert time_by_turns(runs, CPU)["a"]["rounds"] == 3
    assert len(made) == 6


# ---- stages ------------------------------------------------------------------------------------


def matcher(config: ProfileConfig) -> Matcher:
    return profile._job_of(config).matcher()


def test_an_iteration_names_its_stages() -> None:
    seen: list[str] = []

    @contextmanager
    def watch(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    watched, alone = (matcher(ProfileConfig(**SMALL, device="cpu")) for _ in range(2))
    with _ranges.watched(watch):
        watched.step(0)
    assert tuple(seen) == _ranges.STAGES
    alone.step(0)
    assert len(seen) == len(_ranges.STAGES)  # nobody watches any more
    assert torch.equal(watched.images, alone.images)


def test_nobody_watches_after_an_error() -> None:
    with pytest.raises(ZeroDivisionError), _ranges.watched(lambda name: 1 / 0):
        _ranges.stage("draw")
    assert _ranges.stage("draw") is _ranges.stage("update")


def test_the_clock_adds_up_the_chunks_and_tells_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str]] = []

    @contextmanager
    def annotate(name: str, *, domain: str) -> Iterator[None]:
        told.append((name, domain))
        yield

    monkeypatch.setitem(sys.modules, "nvtx", types.SimpleNamespace(annotate=annotate))
    ticks = iter([0, 1, 10, 30, 60, 64])
    monkeypatch.setattr(_timing.time, "perf_counter", lambda: next(ticks))
    clock = _timing.Clock(CPU)
    for name in ("draw", "real pass", "draw"):
        with clock(name):
            pass
    assert clock.read() == {"draw": 5, "real pass": 20}
    assert clock.read() == {}
    assert told == [("draw", "dmfast"), ("real pass", "dmfast"), ("draw", "dmfast")]


# ---- the machine -------------------------------------------------------------------------------


def test_the_loop_counts_its_operations() -> None:
    loop = torch.ops.dmfast._multiply_adds
    once = loop(1, False)
    assert once > 0
    assert loop(1000, False) == 1000 * once
    assert loop(0, False) == 0
    assert loop(10, True) == 10 * loop(1, True)
    kernels = torch.ops.dmfast._cpu_kernels()
    if kernels.startswith("avx512_bf16"):
        assert loop(1, True) == 2 * once
        assert ceilings.arithmetic_rate("bfloat16") > 0


def test_an_unknown_rate_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a CPU without the instruction."""
    operators = types.SimpleNamespace(_multiply_adds=lambda rounds, bfloat16: 0)
    monkeypatch.setattr("dmfast._operators.operators", operators)
    assert ceilings.arithmetic_rate("bfloat16") is None
    result = profile.run(
        ProfileConfig(**SMALL, device="cpu", iterations=1, baselines=False, precision="bfloat16")
    )
    assert "at most an unknown rate in bfloat16" in profile.report(result)


def test_whether_freed_pages_are_kept_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_kept", False)
    assert not memory.freed_pages_kept()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    memory.keep_freed_pages()
    assert not memory.freed_pages_kept()
