# SPDX-License-Identifier: MIT
"""Pickles of numpy arrays and plain values, read without running anything from them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import InputError

_NUMBER = re.compile(r"[|<>=]?[biuf][1248]")


def load_plain(path: Path) -> dict[str, Any]:
    """The dictionary in a pickle, with its keys as text and its arrays as numpy arrays.

    Values may be arrays of numbers, numbers, text, bytes, and lists, tuples and dictionaries of
    plain values; text of Python 2 is read as Latin-1. A pickle that names anything else raises
    :class:`InputError` before that is touched; a damaged one raises nearly any exception.
    """
    with path.open("rb") as file:
        content = _Unpickler(file, path).load()
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary")
    return {
        _text(key): value.array if isinstance(value, _Array) else value
        for key, value in content.items()
    }


def _text(value: object) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


class _Unpickler(pickle.Unpickler):
    """Knows the few names that numpy writes for an array, and hands out stand-ins for them.

    Stand-ins, not numpy's own: a crafted state makes numpy's ``dtype.__setstate__`` take raw bytes
    for pointers to objects.
    """

    def __init__(self, file: BinaryIO, path: Path) -> None:
        super().__init__(file, encoding="latin-1")
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        maker = _ADMITTED.get(f"{module.replace('numpy._core', 'numpy.core')}.{name}")
        if maker is None:
            raise InputError(
                f"{self._path} asks for {module}.{name}: only numpy arrays and plain values are "
                "read from a pickle; get the set from its own site"
            )
        return _Callable(maker)


class _Callable:
    """Can be called by a pickle, and nothing else: its attributes cannot be set."""

    __slots__ = ("_maker",)

    def __init__(self, maker: Callable[..., object]) -> None:
        self._maker = maker

    def __call__(self, *args: object) -> object:
        return self._maker(*args)

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a function has no state")


class Dtype:
    """``numpy.dtype`` of a plain number."""

    __slots__ = ("dtype",)

    def __init__(self, code: str, align: object = False, copy: object = False) -> None:
        if not _NUMBER.fullmatch(code):
            raise pickle.UnpicklingError(f"an array of type {code!r} is not of plain numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])  # (version, byte order, ...)


class _Array:
    """``numpy.ndarray``, made empty and then given its state; ``array`` is the real one."""

    __slots__ = ("array",)
    array: NDArray[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, dtype, column_major, raw = state
        if isinstance(raw, str):
            raw = raw.encode("latin-1")  # bytes of Python 2
        self.array = _array(raw, dtype, shape, "F" if column_major else "C")


def _array(raw: bytes, dtype: Dtype, shape: tuple[int, ...], order: Any) -> NDArray[Any]:
    return np.array(np.frombuffer(raw, dtype.dtype).reshape(shape, order=order))


def _frombuffer(
    raw: bytes, dtype: Dtype, shape: tuple[int, ...], order: str, axes: object = None
) -> _Array:
    if axes is not None:
        raise pickle.UnpicklingError("an array of permuted axes")
    made = _Array()
    made.array = _array(raw, dtype, shape, order)
    return made


def scalar(dtype: Dtype, raw: bytes) -> object:
    return _array(raw, dtype, (), "C").item()


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":  # what protocol 2 writes bytes with
        raise pickle.UnpicklingError(f"bytes written as {encoding!r}")
    return text.encode("latin-1")


_ADMITTED: dict[str, Callable[..., object]] = {
    "numpy.ndarray": _Array,
    "numpy.dtype": Dtype,
    "numpy.core.multiarray._reconstruct": lambda *_: _Array(),
    "numpy.core.multiarray.scalar": scalar,
    "numpy.core.numeric._frombuffer": _frombuffer,
    "_codecs.encode": _encode,
}
