# SPDX-License-Identifier: MIT
"""Devices by name: GPUs that a build does not serve, and how much of their memory is to be used."""

from __future__ import annotations

import pytest
import torch

from dmfast import _load, devices
from dmfast.devices import format_bytes, memory_budget, parse_bytes, resolve_device, runs_on
from dmfast.errors import InputError

DEFAULT = ["8.0", "8.6", "8.9", "9.0a", "10.0", "12.0+PTX"]


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((7, 5), DEFAULT, False),
        ((8, 0), DEFAULT, True),
        ((8, 7), DEFAULT, True),  # the code of 8.6
        ((9, 0), DEFAULT, True),
        ((10, 3), DEFAULT, True),
        ((12, 1), DEFAULT, True),
        ((13, 0), DEFAULT, True),  # compiled from PTX
        ((13, 0), ["12.0"], False),
        ((9, 0), ["8.0"], False),
        ((9, 0), ["8.0+PTX"], True),
        ((8, 0), ["8.6+PTX"], False),
        ((10, 3), ["10.0a+PTX"], False),
        ((10, 3), ["10.0f"], True),
        ((12, 0), ["10.0f+PTX"], False),
        ((9, 0), [], False),
    ],
)
def test_a_gpu_runs_what_was_compiled_for_it(capability, archs, runs: bool) -> None:
    assert runs_on(capability, archs) == runs


@pytest.fixture
def turing(monkeypatch) -> None:
    """A GPU, as far as names go."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(_load, "has_cuda_operators", lambda: True)
    monkeypatch.setattr(_load, "cuda_architectures", lambda: ("8.0", "9.0a"))


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_a_gpu_older_than_the_build_is_named_with_what_the_build_has(turing, name: str) -> None:
    words = (
        r"^--device cuda(:0)?: Tesla T4 has compute capability 7\.5, but dmfast was built for "
        r"8\.0, 9\.0a; rebuild it with TORCH_CUDA_ARCH_LIST=7\.5, or use --device cpu$"
    )
    with pytest.raises(InputError, match=words):
        resolve_device(name)
    assert resolve_device("cpu").type == "cpu"


def test_a_gpu_that_the_build_serves_is_taken(turing, monkeypatch) -> None:
    monkeypatch.setattr(_load, "cuda_architectures", lambda: ("7.5",))
    assert resolve_device("auto") == torch.device("cuda")


def test_the_build_knows_what_it_is_for() -> None:
    archs = _load.cuda_architectures()
    assert bool(archs) == _load.has_cuda_operators()
    assert all(isinstance(runs_on((9, 0), [arch]), bool) for arch in archs)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("0", 0), ("1000", 1000), ("2K", 2048), ("1.5g", 3 << 29), ("8 GiB", 8 << 30)),
        *(("512MB", 512 << 20), (".5T", 1 << 39), ("7B", 7), ("3.", 3)),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes("--memory-budget", text) == count


@pytest.mark.parametrize("text", ["", "much", "-1", "8X", "1e9", "G", ".", "8 G of it", "inf"])
def test_what_is_no_size_is_named(text: str) -> None:
    with pytest.raises(InputError, match=r"--memory-budget must be auto or a number .* got '"):
        parse_bytes("--memory-budget", text)


def test_a_size_without_end_is_named() -> None:
    with pytest.raises(InputError, match="--memory-budget is beyond any number of bytes"):
        parse_bytes("--memory-budget", "9" * 400)


def test_sizes_are_told() -> None:
    told = [format_bytes(count) for count in (0, 92_000, 512 << 20, 5 << 29, 80 << 30)]
    assert told == ["0 MiB", "0.0877 MiB", "512 MiB", "2.5 GiB", "80 GiB"]


def test_the_budget_is_half_of_what_a_gpu_has_free(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (30 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert memory_budget("auto", gpu) == 15 << 30
    assert memory_budget("auto", cpu) is None
    assert memory_budget("1G", gpu) == memory_budget("1G", cpu) == 1 << 30
    assert devices.free_memory(gpu) == " (30 GiB of 80 GiB free)"
    assert devices.free_memory(cpu) == ""


def test_algorithms_are_repeatable_within_and_as_before_after() -> None:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    with devices.repeatable():
        assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert (cudnn.deterministic, cudnn.benchmark) == before
