# SPDX-License-Identifier: MIT
"""Where a job runs, in which precision, and in how much memory, as the commands take it."""

from __future__ import annotations

import math
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import _load
from ._blocks import cpu_kernels
from ._gpu_blocks import gpu_way
from ._version import __version__
from .errors import InputError, choose
from .networks import has_fused_blocks

PRECISIONS = ("auto", "float32", "bfloat16")

_UNITS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}  # powers of 1024


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        InputError: the name is no CPU or CUDA device, or it cannot be used here, or not as
            DMFAST_CPU or DMFAST_GPU says.
    """
    usable = torch.cuda.is_available() and _load.has_cuda_operators()
    if device == "auto":
        device = "cuda" if usable else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {str(device)!r}; choose from auto, cpu, cuda, cuda:N")
    try:
        gpu_way() if resolved.type == "cuda" else cpu_kernels()
    except RuntimeError as error:  # a variable that says how has a wrong value
        raise InputError(str(error)) from error
    if resolved.type == "cuda":
        if not torch.cuda.is_available():
            raise InputError(f"--device {device}: torch finds no GPU here; use --device cpu")
        if not usable:
            raise InputError(
                f"--device {device}: dmfast was built without CUDA operators; rebuild it with "
                "DMFAST_CUDA=1, or use --device cpu"
            )
        if (resolved.index or 0) >= torch.cuda.device_count():
            raise InputError(f"--device {device}: there are {torch.cuda.device_count()} GPUs")
        capability = torch.cuda.get_device_capability(resolved)
        archs = _load.cuda_architectures()
        if not runs_on(capability, archs):
            mine = ".".join(map(str, capability))
            raise InputError(
                f"--device {device}: {torch.cuda.get_device_name(resolved)} has compute capability "
                f"{mine}, but dmfast was built for {', '.join(archs)}; rebuild it with "
                f"TORCH_CUDA_ARCH_LIST={mine}, or use --device cpu"
            )
    return resolved


def runs_on(capability: tuple[int, int], archs: Sequence[str]) -> bool:
    """Whether a GPU of that compute capability runs code for one of these architectures.

    They are written as in ``TORCH_CUDA_ARCH_LIST``: machine code is for its minor version and later
    ones of the same major, with ``a`` for that version alone; ``+PTX`` for all later ones.
    """
    for arch in archs:
        number, _, ptx = arch.partition("+")
        major, minor = (int(part) for part in number.rstrip("af").split("."))
        if number.endswith("a"):
            fits = capability == (major, minor)
        elif ptx and not number.endswith("f"):
            fits = capability >= (major, minor)
        else:
            fits = capability[0] == major and capability[1] >= minor
        if fits:
            return True
    return False


def resolve_precision(precision: str, device: torch.device, model: str) -> str:
    """``float32`` or ``bfloat16``, of a network of that name.

    ``auto`` is bfloat16 on a GPU; and on a CPU that has instructions for its products where the
    network goes by the fused blocks, which keep all but the products in float32.

    Raises:
        InputError: the precision is unknown.
    """
    choose("--precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    fast = device.type == "cuda" or (has_fused_blocks(model) and cpu_kernels() == "avx512_bf16")
    return "bfloat16" if fast else "float32"


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context of a network's passes in ``float32`` or ``bfloat16``."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def memory_format(device: torch.device) -> torch.memory_format:
    """The layout in which torch's layers are fastest.

    On a CPU channels_last costs more in the norms than it saves elsewhere: 2.0 s for 2,560 images
    of 32x32 through ConvNet against 1.9 s in float32, 2.4 s against 1.3 s in bfloat16, and 0.25 s
    against 0.20 s for a training step of 100 images.
    """
    return torch.contiguous_format if device.type == "cpu" else torch.channels_last


def synchronise(device: torch.device) -> None:
    """Waits until the device has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def repeatable() -> Iterator[None]:
    """Within it cuDNN gives the same bits each time: by algorithms that do, chosen untimed."""
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


def parse_bytes(option: str, text: str) -> int:
    """Bytes, from a number and K, M, G or T for powers of 1024, as ``1.5G`` or ``512MiB``.

    Raises:
        InputError: it is neither that nor 0.
    """
    pattern = r"(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]?)(?:i?B)?"
    parts = re.fullmatch(pattern, str(text), re.IGNORECASE)
    if parts is None:
        raise InputError(f"{option} must be auto or a number of bytes, as 8G or 512M, got {text!r}")
    size = float(parts[1]) * 1024 ** _UNITS[parts[2].upper()]
    if math.isinf(size):
        raise InputError(f"{option} is beyond any number of bytes")
    return int(size)


def format_bytes(count: int) -> str:
    return f"{count / 2**30:.3g} GiB" if count >= 2**30 else f"{count / 2**20:.3g} MiB"


def memory_budget(text: str, device: torch.device) -> int | None:
    """The bytes of a device that real images may take; None: no matter how many.

    ``auto`` is half of what is free on a GPU, the rest being for activations; on a CPU the images
    are where they are already.
    """
    if text != "auto":
        return parse_bytes("--memory-budget", text)
    return None if device.type == "cpu" else torch.cuda.mem_get_info(device)[0] // 2


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device's memory did not suffice, for torch, a library of it or our operators."""
    # The last is what cuDNN's caller makes of a workspace that was not to be had.
    words = r"no memory for|ALLOC(ATION)?_FAILED|out of memory|unable to find an engine"
    return isinstance(error, torch.OutOfMemoryError) or re.search(words, str(error)) is not None


def free_memory(device: torch.device) -> str:
    """How much of a GPU is free once freed memory is given back, in words; of a CPU: nothing."""
    if device.type == "cpu":
        return ""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return f" ({format_bytes(free)} of {format_bytes(total)} free)"


@contextmanager
def memory_checked(device: torch.device, what: str, remedy: str) -> Iterator[None]:
    """Turns a lack of memory for ``what`` into an :class:`InputError` that names the remedy.

    A size that is beyond the numbers of torch counts as one.
    """
    try:
        yield
    except (MemoryError, OverflowError, RuntimeError, TypeError) as error:
        # torch has no class of its own for this on a CPU, and says more than the reason at length.
        said = str(error).partition("\n")[0]
        short = isinstance(error, MemoryError | OverflowError) or is_out_of_memory(error)
        if not (short or re.search("alloc|[Oo]verflow|of mem", said)):
            raise
        raise InputError(f"{device} has no memory for {what}{free_memory(device)}: {remedy}") from (
            error
        )


def peak_memory(device: torch.device) -> int:
    """Bytes of the device that this process has held at most; of a CPU, all of its memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def versions() -> dict[str, str]:
    """Of what the numbers of a job depend on."""
    return {
        "dmfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What the time of a job depends on."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
    }


def _processor() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
