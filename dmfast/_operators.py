# SPDX-License-Identifier: MIT
"""What the wrappers of all operators share: the extension, dtypes, the layouts of fakes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import _load

_load.load_extension()
operators = torch.ops.dmfast


def accumulation_dtype(*dtypes: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in dtypes else torch.float32


def images_format(x: Tensor) -> torch.memory_format:
    """The layout of what is made from images: channels_last where they are, else contiguous."""
    channels_last = not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


def like_images(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=images_format(x))


def channels_last_like(like: Tensor, shape: Sequence[int]) -> Tensor:
    return torch.empty(
        shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last
    )


def only(gradients: Sequence[Tensor | None], wanted: Sequence[bool]) -> tuple[Tensor | None, ...]:
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Within it torch's own layers leave dtypes alone, as the operators do."""
    device = x.device.type
    available = torch.amp.is_autocast_available(device)
    return torch.autocast(device, enabled=False) if available else nullcontext()


def no_gradient(name: str) -> None:
    """Registers a backward that says so: without one torch gives `grad = None` silently."""

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        return None

    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError(f"{name} has no gradient")

    torch.library.register_autograd(f"dmfast::{name}", backward, setup_context=setup)


def register_no_second_derivative(backward: str, op: str) -> None:
    """Has the derivative of an operator's backward be an error that says how to have one."""

    def refuse(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(f'{op}: there is no second derivative; use precision="direct" for one')

    torch.library.register_autograd(
        f"dmfast::{backward}", refuse, setup_context=lambda ctx, inputs, output: None
    )
