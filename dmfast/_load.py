# SPDX-License-Identifier: MIT
"""Loads the extension, or says why it does not load."""

from __future__ import annotations

import functools
import importlib

import torch


def load_extension() -> None:
    """Imports ``dmfast._C``, which registers ``torch.ops.dmfast``.

    Raises:
        ImportError: the extension is missing, or does not fit this torch.
    """
    try:
        importlib.import_module("dmfast._C")
    except ImportError as error:
        raise ImportError(
            f"dmfast: the compiled operators did not load ({error}); in a checkout build them with "
            "`make build`, else reinstall with `pip install --no-build-isolation .` beside torch "
            f"2.11 or later (this is {torch.__version__})"
        ) from error


@functools.cache
def has_cuda_operators() -> bool:
    """Whether this build has the CUDA operators."""
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key("dmfast::siamese_augment", "CUDA"))


@functools.cache
def cuda_architectures() -> tuple[str, ...]:
    """What this build's CUDA operators are compiled for, as in ``TORCH_CUDA_ARCH_LIST``."""
    return tuple(str(torch.ops.dmfast._cuda_architectures()).split())
