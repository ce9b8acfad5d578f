# SPDX-License-Identifier: MIT
"""What a CUDA graph is to a GPU, for tests on the CPU: operations on the tensors that they had."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

#: What waits for a device, or takes something from the host that a graph would keep for ever.
WAITING = {
    *("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"),
    *("_unique2", "unique_dim", "unique_consecutive", "bincount", "lift_fresh", "_pin_memory"),
}


def waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation needs the host while it runs."""
    name = func._schema.name.partition("::")[2]
    by_mask = name in ("index", "index_put", "index_put_") and any(
        mask is not None and mask.dtype in (torch.bool, torch.uint8) for mask in args[1]
    )
    return name in WAITING or by_mask or func is torch.ops.aten.repeat_interleave.Tensor


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], list[Any]]] = []
        self._own: set[int] = set()  # storages that were made while recording
        self._before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if waits(func, args):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}")
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._own | self._before.keys():
                self._before[storage._cdata] = storage, storage.clone()
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not _is_view(func):
            self._calls.append((func, args, kwargs, outputs))
            if not func._schema.is_mutable:
                self._own |= {output.untyped_storage()._cdata for output in outputs}
        return result

    def undo(self) -> None:
        """Recording takes no effect."""
        for storage, before in self._before.values():
            storage.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, outputs in self._calls:
            result = func(*args, **kwargs)
            again = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
            for output, new in zip(outputs, again, strict=True):
                if not func._schema.is_mutable:
                    output.copy_(new)


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    return [
        leaf
        for argument in func._schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for leaf in tree_leaves(named.get(argument.name))
        if isinstance(leaf, Tensor)
    ]


class Tape:
    """A :class:`dmfast.graphs.Recorder`. Nothing of the host is seen by a replay, as on a GPU."""

    warm_up = 2

    def __init__(self, before_replay: Callable[[int], object] = lambda number: None) -> None:
        self.recorded = self.replayed = 0
        self._before_replay = before_replay

    def active(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        recording = _Recording()
        try:
            with recording:
                function()
        finally:
            recording.undo()
        self.recorded += 1

        def replay() -> None:
            self.replayed += 1
            self._before_replay(self.replayed)
            recording.replay()

        return replay
