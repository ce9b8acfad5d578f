# SPDX-License-Identifier: MIT
"""Checks of arguments before the dispatcher sees them: one line in place of its forty.

What the operators check themselves (shapes, dtypes, values) is not repeated here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from . import _load


def whole(op: str, name: str, value: Any) -> int:
    """A whole number that fits 64 bits.

    Raises:
        TypeError: it is no whole number.
        ValueError: it has more bits.
    """
    try:
        number = int(value) if isinstance(value, bool) else operator.index(value)
    except TypeError:
        raise TypeError(
            f"{op}: {name} must be a whole number, got {type(value).__name__}"
        ) from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"{op}: {name} must be from -2**63 to 2**63 - 1, got {number}")
    return number


def tensors(op: str, required: dict[str, Any], optional: dict[str, Any] | None = None) -> None:
    """Dense tensors on one device for which there are operators.

    Raises:
        TypeError: one is no tensor.
        RuntimeError: one is not dense, or lies elsewhere, or the build has no CUDA operators.
    """
    named = [*required.items(), *((n, t) for n, t in (optional or {}).items() if t is not None)]
    first, device = "", None
    for name, tensor in named:
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
            kind = "quantized" if tensor.is_quantized else "nested or sparse"
            raise RuntimeError(f"{op}: {name} must be a dense tensor, got a {kind} one")
        if device is None:
            first, device = name, tensor.device
        elif tensor.device != device:
            raise RuntimeError(
                f"{op}: {name} is on {tensor.device}, but {first} is on {device}; move it"
            )
    if device is not None and device.type == "cuda" and not _load.has_cuda_operators():
        raise RuntimeError(
            f"{op}: got CUDA tensors, but this build of dmfast has CPU operators only; rebuild it "
            "with DMFAST_CUDA=1 where nvcc is installed, or move the tensors to the CPU"
        )


def rank(op: str, name: str, tensor: Tensor, axes: int, layout: str) -> None:
    if tensor.dim() != axes:
        raise RuntimeError(f"{op}: {name} must have shape {layout}, got {list(tensor.shape)}")


def dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    if tensor.dtype not in allowed:
        *others, last = dict.fromkeys(str(one).removeprefix("torch.") for one in allowed)
        listed = f"{', '.join(others)} or {last}" if others else last
        got = str(tensor.dtype).removeprefix("torch.")
        raise RuntimeError(f"{op}: {name} must be {listed}, got {got}")


def listed(op: str, name: str, values: Any) -> list[Any]:
    """The elements of a list.

    Raises:
        TypeError: it is a tensor, or cannot be iterated over.
    """
    if isinstance(values, Tensor) or not isinstance(values, Iterable):
        raise TypeError(f"{op}: {name} must be a list, got {type(values).__name__}")
    return list(values)


def number(op: str, name: str, value: Any) -> float:
    """A real number, as a float.

    Raises:
        TypeError: it is none, or text.
    """
    try:
        if not isinstance(value, (str, bytes, bytearray)):
            return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        pass
    raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")


def numbers(op: str, name: str, values: Any) -> list[float]:
    """Real numbers, as floats.

    Raises:
        TypeError: one is none.
    """
    try:
        return [number(op, name, value) for value in values]
    except (TypeError, RuntimeError):
        raise TypeError(f"{op}: {name} must be a list of numbers") from None


def of_layers(op: str, error: RuntimeError) -> RuntimeError:
    """What torch's own layers raised where an operator is made of them: in a line that names it."""
    kind = type(error) if isinstance(error, torch.OutOfMemoryError) else RuntimeError
    line = str(error).partition("\n")[0]
    return kind(f"{op}: torch's layers raised {type(error).__name__}: {line}")


def key(op: str, seed: Any, step: Any, stream: Any) -> tuple[int, int, Tensor | None, int]:
    """What a draw is keyed by: the seed, the step as a number or (else None) a tensor, the stream.

    Raises:
        TypeError: one is no whole number.
        ValueError: one is out of range.
    """
    seed = whole(op, "seed", seed)
    if seed < 0:
        raise ValueError(f"{op}: seed must be from 0 to 2**63 - 1, got {seed}")
    stream = whole(op, "stream", stream)
    if isinstance(step, Tensor):
        return seed, 0, step, stream
    return seed, whole(op, "step", step), None, stream


def size(op: str, value: Any) -> tuple[int, int]:
    """The height and the width of images.

    Raises:
        TypeError: it is no pair of whole numbers.
    """
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"{op}: size must be (height, width)")
    return whole(op, "size", value[0]), whole(op, "size", value[1])


def device(op: str, value: Any) -> torch.device:
    """A device of torch.

    Raises:
        TypeError: it is none.
        RuntimeError: it is a GPU, and there is none.
    """
    try:
        found = torch.device(value)
    except (RuntimeError, TypeError):
        raise TypeError(f"{op}: device must be one of torch's, got {value!r}") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(f"{op}: device is {found}, but torch finds no GPU")
    return found
