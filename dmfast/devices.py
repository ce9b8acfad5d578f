# SPDX-License-Identifier: MIT
"""Where a job runs and in which precision, by the names that the commands take."""

from __future__ import annotations

import os
import platform
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import _load
from ._blocks import cpu_kernels
from ._version import __version__
from .errors import InputError, choose
from .networks import has_fused_blocks

PRECISIONS = ("auto", "float32", "bfloat16")


def resolve_device(device: str | torch.device) -> torch.device:
    """The device of that name; ``auto`` is a GPU where there is one.

    Raises:
        InputError: the name is no CPU or CUDA device, or it cannot be used here.
    """
    usable = torch.cuda.is_available() and _load.has_cuda_operators()
    if device == "auto":
        return torch.device("cuda" if usable else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise InputError(f"unknown device {str(device)!r}; choose from auto, cpu, cuda, cuda:N")
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
    return resolved


def resolve_precision(precision: str, device: torch.device, model: str) -> str:
    """``float32`` or ``bfloat16``, of a network of that name.

    ``auto`` is bfloat16 on a GPU; and on a CPU that has instructions for its products where the
    network goes by the fused blocks, which keep all but the products in float32.

    Raises:
        InputError: the precision is unknown, or DMFAST_CPU says what this CPU does not have.
    """
    choose("--precision", precision, PRECISIONS)
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16"
    try:
        kernels = cpu_kernels()
    except RuntimeError as error:
        raise InputError(str(error)) from error
    return "bfloat16" if has_fused_blocks(model) and kernels == "avx512_bf16" else "float32"


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
