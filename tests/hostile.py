# SPDX-License-Identifier: MIT
"""Hostile arguments for every operator; test_hostile.py runs this in a process of its own.

Each example takes arguments that fit, replaces up to two by something hostile, and calls. Accepted,
the result must have the right shape and dtype and, where that accepts the arguments too, the values
of the reference; refused, it must be in one line that names the operator and an argument. One line
of JSON an operator says what failed; what is being called goes to stderr, for when that crashes.
"""

from __future__ import annotations

import ctypes
import faulthandler
import json
import re
import resource
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cases import TABLES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dmfast import ops, reference
from dmfast.augment import STRENGTH
from dmfast.compat import DiffAug, DiffAugment, ParamDiffAug
from dmfast.errors import InputError

EXAMPLES = 200
#: What an operator may ask for beyond what importing torch took.
MEMORY = 2 << 30

NO_TENSORS: list[Any] = [None, 3, 2.5, "text", [1.0, 2.0], np.zeros((2, 3)), torch.float32]
NO_INTEGERS: list[Any] = [2.5, float("nan"), "2", None, [1], torch.tensor([1, 2]), 1j]
INTEGERS: list[Any] = [
    *(0, 1, 2, 3, -1, True, np.int64(2), torch.tensor(2)),
    *(
        sign * 2**bits + more
        for bits in (31, 32, 40, 62, 63)
        for more in (-1, 0)
        for sign in (1, -1)
    ),
]
CHANGES: dict[str, Callable[[Tensor], Any]] = {
    "rank - 1": lambda t: t[0],
    "rank + 1": lambda t: t[None],
    **{
        str(dtype): lambda t, dtype=dtype: t.to(dtype)
        for dtype in (
            *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
            *(torch.complex64, torch.bool, torch.uint8, torch.int32, torch.int64, torch.uint16),
        )
    },
    "sparse": lambda t: t.to_sparse(),
    "compressed": lambda t: t.to_sparse_csr(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "quantised": lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.quint8),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "meta": lambda t: t.to("meta"),
    "negated view": lambda t: torch._neg_view(-t),
    "no rows": lambda t: t[:0],
    "no columns": lambda t: t[..., :0],
    "expanded": lambda t: t[:1].expand(t.shape),
    "expanded far": lambda t: t[:1].expand(2**40, *t.shape[1:]),
    "strided": lambda t: torch.stack([t, t], -1)[..., 0],
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "far stride": lambda t: t[:1].as_strided(t[:1].shape, (2**40, *t.stride()[1:])),
    "overlapping": lambda t: t.as_strided(t.shape, (1,) * t.dim()),
    "no elements, far": lambda t: t.new_empty(0, *([2**15] * (t.dim() - 1))),
    "longer": lambda t: torch.cat([t, t[-1:]]),
    "shorter": lambda t: t[:-1],
    "descending": lambda t: t.flip(0),
    "plus one": lambda t: t + 1,
    "minus one": lambda t: t - 1,
    "gradient": lambda t: t.clone().requires_grad_(),
    "parameter": lambda t: torch.nn.Parameter(t),
    **{
        f"one is {value}": lambda t, value=value: (
            t.flatten().index_fill(0, torch.tensor([t.numel() // 2]), value).view(t.shape)
        )
        for value in (
            float("nan"),
            float("inf"),
            -float("inf"),
            3e38,
            -3e38,
            1e-40,
            2**62,
            -(2**62),
        )
    },
}
STRATEGIES = ["", "none", "flip", "color_crop", "rotate_flip", "blur", "_", None, 3, b"flip", []]
PRECISIONS = [None, "float32", "bfloat16", "direct"]


def changed(draw: Any, value: Any) -> tuple[str, Any]:
    """A hostile stand-in for an argument, with its name."""
    if isinstance(value, Tensor):
        if draw(st.integers(0, 7)) == 0:
            other = draw(st.sampled_from(NO_TENSORS))
            return repr(other), other
        name = draw(st.sampled_from(sorted(CHANGES)))
        try:
            return name, CHANGES[name](value)
        except Exception:  # this change cannot be made of this tensor
            return "as it was", value
    if isinstance(value, list):
        if value and isinstance(value[0], Tensor) and draw(st.booleans()):
            name, first = changed(draw, value[0])
            return f"[{name}, ...]", [first, *value[1:]]
        other = draw(
            st.sampled_from([*NO_TENSORS, value * 2, value[:-1], [], [None], [-1.0], "ab"])
        )
        return type(other).__name__, other
    if isinstance(value, bool):
        other = not value
    elif isinstance(value, tuple):
        pair = draw(st.tuples(*[st.sampled_from([*INTEGERS, *NO_INTEGERS])] * 2))
        other = draw(st.sampled_from([pair, (8,), (8, 8, 8), 8, None, "88"]))
    elif isinstance(value, str):
        other = draw(st.sampled_from(STRATEGIES))
    elif isinstance(value, dict):
        name = draw(st.sampled_from([*STRENGTH, "blur"]))
        other = {name: draw(st.sampled_from([*INTEGERS, *NO_INTEGERS, 1e7, 1e300, -0.1]))}
    else:
        other = draw(st.sampled_from([*INTEGERS, *NO_INTEGERS]))
    return repr(other), other


@dataclass
class Subject:
    """An operator: arguments that fit, and what is to come out for arguments that it accepts."""

    call: Callable[..., Any]
    arguments: Callable[[Any], dict[str, Any]]
    expected: Callable[..., tuple[torch.Size, torch.dtype]]
    reference: Callable[..., Tensor] | None = None
    #: Errors that name the class or the tensor at fault in place of an argument.
    names: str = "no memory|can't allocate memory"
    #: Errors of what it is made of, where that is asked for too much memory.
    of_memory: str = ""
    #: How far from the reference it may be for these arguments, beside the largest value.
    tolerance: Callable[..., float] = lambda **arguments: 1e-5


def check(name: str, subject: Subject, draw: Any) -> None:
    arguments = subject.arguments(draw)
    labels = []
    for _ in range(draw(st.integers(0, 2))):
        argument = draw(st.sampled_from(list(arguments)))
        label, arguments[argument] = changed(draw, arguments[argument])
        labels.append(f"{argument}: {label}".replace("\n", " "))
    called = f"{name} with {', '.join(labels) or 'arguments that fit'}"
    print(called, file=sys.stderr, flush=True)
    refusal = None
    try:
        result = subject.call(**arguments)
        if result is arguments.get("x"):  # nothing was to be done
            return
        if result.requires_grad and result.device.type == "cpu":
            result.sum().backward()
    except (RuntimeError, ValueError, TypeError) as error:
        refusal = error
    except Exception as error:
        raise AssertionError(f"{called}: {type(error).__name__}: {error}") from error
    if refusal is not None:
        check_refusal(f"{called}: {type(refusal).__name__}", refusal, name, subject, arguments)
        return
    shape, dtype = subject.expected(**arguments)
    got = (tuple(result.shape), result.dtype)
    assert got == (tuple(shape), dtype), f"{called}: got {got}, not {tuple(shape)}, {dtype}"
    if subject.reference is None or result.device.type == "meta":
        return
    try:
        # torch reads an index that is a negated view without the sign.
        plain = {n: v.resolve_neg() if isinstance(v, Tensor) else v for n, v in arguments.items()}
        exact = subject.reference(**plain)
        tensors = [v.detach() for v in arguments.values() if isinstance(v, Tensor)]
        largest = max(float(t.abs().max()) for t in [*tensors, exact] if t.is_floating_point())
    except Exception:  # the reference takes less
        return
    # Beyond that, and at infinities, rounding differs by more than can be said in a line.
    if largest < 1e6 and exact.isfinite().all():
        error = (result.detach().double() - exact.detach().double()).abs().max()
        coarse = 16 * torch.finfo(dtype).eps if dtype.is_floating_point else 0
        allowed = max(coarse, subject.tolerance(**arguments))
        assert error <= allowed * max(largest, 1.0), f"{called}: off by {error}"


def check_refusal(
    called: str, error: Exception, name: str, subject: Subject, arguments: dict[str, Any]
) -> None:
    message = str(error)
    if subject.of_memory and re.match(subject.of_memory, message):
        return
    own = isinstance(error, InputError) or message.startswith(f"{name}: ")
    assert own, f"{called} names no operator: {message}"
    assert "\n" not in message, f"{called} has more than a line: {message}"
    assert len(message) < 300, f"{called} is too long: {message}"
    named = re.search(rf"\b({'|'.join(arguments)})\b|{subject.names}", message)
    assert named, f"{called} names no argument: {message}"


# ---- The operators -----------------------------------------------------------------------------


def table(draw: Any, groups: int) -> Tensor:
    rows = torch.cat([TABLES["each"], TABLES["all"], TABLES["identity"]])
    return rows[draw(st.lists(st.integers(0, 7), min_size=groups, max_size=groups))].clone()


def offsets_of(draw: Any, groups: int, count: int) -> Tensor:
    inner = draw(st.lists(st.integers(0, count), min_size=groups - 1, max_size=groups - 1))
    return torch.tensor([0, *sorted(inner), count])


def images(draw: Any) -> dict[str, Any]:
    groups, shape = (
        draw(st.integers(1, 3)),
        draw(st.sampled_from([(3, 6, 5), (1, 4, 4), (2, 1, 9)])),
    )
    count = groups * draw(st.integers(1, 2))
    offsets = offsets_of(draw, groups, count) if draw(st.booleans()) else None
    return {"x": torch.randn(count, *shape), "params": table(draw, groups), "offsets": offsets}


def gathered(draw: Any) -> dict[str, Any]:
    arguments = images(draw)
    x, params, offsets = arguments.values()
    stored = torch.randint(0, 256, (5, *x.shape[2:], x.shape[1]))
    channels = x.shape[1]
    return {
        "images": stored.byte() if draw(st.booleans()) else stored / 255,
        "index": torch.arange(x.shape[0]) % 5,
        "params": params,
        "mean": torch.full((channels,), 0.5),
        "std": torch.full((channels,), 0.25),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.int32, None, "half"])),
        "offsets": offsets,
    }


def embedded(draw: Any) -> dict[str, Any]:
    classes = draw(st.integers(1, 3))
    counts = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    real, syn = (torch.randn(classes * count, 4) for count in counts)
    even = [torch.arange(classes + 1) * count for count in counts]
    given = [o if draw(st.booleans()) else None for o in even]
    names = ("real", "syn", "classes", "real_offsets", "syn_offsets")
    return dict(zip(names, (real, syn, classes, *given), strict=True))


KEY = {"seed": 3, "step": 4, "stream": 2}


def drawn(draw: Any) -> dict[str, Any]:
    step = draw(st.sampled_from([4, torch.tensor(4), torch.tensor([4])]))
    more = {"rows": 2, "first_group": 1, "strength": {"prob_flip": 0.3}}
    return (
        {"strategy": "color_crop_rotate", "groups": 3, "size": (8, 6)} | KEY | more | {"step": step}
    )


def batch(draw: Any) -> dict[str, Any]:
    order, starts, offsets = (
        torch.arange(9).flip(0),
        torch.tensor([0, 4, 9]),
        torch.tensor([0, 2, 5]),
    )
    step = draw(st.sampled_from([4, torch.tensor([4])]))
    split = {"order": order, "class_offsets": starts, "offsets": offsets, "rows": 5}
    return split | KEY | {"step": step, "first_class": 0}


def weights(draw: Any) -> dict[str, Any]:
    tensors = [torch.zeros(3, 4, 2), torch.zeros(3, 5)]
    networks = draw(st.sampled_from([None, 3]))
    more = {"networks": networks, "first_network": 0}
    return {"tensors": tensors, "bounds": [0.5, 1.0]} | KEY | more


def fill(tensors: Any, bounds: Any, **rest: Any) -> Tensor:
    """What draw_weights_ writes, through the first tensor."""
    ops.draw_weights_(tensors, bounds, **rest)
    first = [*tensors, torch.zeros(0)][0]
    assert first.device.type == "meta" or first.detach().isfinite().all()
    return first


def affine(draw: Any, *shape: int) -> list[Tensor | None]:
    """A norm's weight and bias, each of them or none."""
    given = 1 + 0.3 * torch.randn(shape), 0.3 * torch.randn(shape)
    return [tensor if draw(st.booleans()) else None for tensor in given]


def normed(draw: Any) -> dict[str, Any]:
    networks = draw(st.sampled_from([None, 1, 3]))
    count, channels = (networks or 1) * draw(st.integers(0, 2)), draw(st.sampled_from([1, 3, 16]))
    weight, bias = affine(draw, *([] if networks is None else [networks]), channels)
    x = torch.randn(count, channels, *draw(st.sampled_from([(6, 5), (2, 9), (3, 2)])))
    return {"x": x, "weight": weight, "bias": bias, "eps": 1e-5}


def pooled(x: Tensor, **rest: Any) -> tuple[torch.Size, torch.dtype]:
    return torch.Size([*x.shape[:2], x.shape[2] // 2, x.shape[3] // 2]), x.dtype


def convolved(draw: Any) -> dict[str, Any]:
    """Also beyond the fused kernels: 5 channels, 6 filters."""
    channels, filters = draw(st.sampled_from([(3, 16), (16, 32), (4, 16), (5, 16), (16, 6)]))
    axis = draw(st.sampled_from([[], [], [1], [2]]))
    weight, bias = affine(draw, *axis, filters)
    conv_weight = torch.randn(*axis, filters, channels, 3, 3) / (9 * channels) ** 0.5
    x = torch.randn(2 * draw(st.integers(0, 2)), channels, *draw(st.sampled_from([(6, 5), (8, 9)])))
    more = {"eps": 1e-5, "padding": draw(st.sampled_from([1, 0, 3]))}
    parameters = {"conv_weight": conv_weight, "weight": weight, "bias": bias}
    return {"x": x} | parameters | more | {"precision": draw(st.sampled_from(PRECISIONS))}


def batch_normed(draw: Any) -> dict[str, Any]:
    arguments = convolved(draw)
    if arguments["conv_weight"].dim() == 5:
        of_networks = ("conv_weight", "weight", "bias")
        first = {name: arguments[name] for name in of_networks if arguments[name] is not None}
        arguments |= {name: of_all[0].clone() for name, of_all in first.items()}
    filters = len(arguments["conv_weight"])
    statistics = torch.stack([torch.zeros(filters), 0.5 + torch.rand(filters)])
    return arguments | {"statistics": draw(st.sampled_from([None, statistics]))}


def convolved_alone(draw: Any) -> dict[str, Any]:
    arguments = batch_normed(draw)
    return {name: arguments[name] for name in ("x", "conv_weight", "padding", "precision")}


def blocks(x: Tensor, conv_weight: Tensor, padding: int, **rest: Any) -> Any:
    height, width = (side + 2 * int(padding) - 2 for side in x.shape[2:])
    return (x.shape[0], conv_weight.shape[-4], height // 2, width // 2), x.dtype


def of_products(precision: Any, **rest: Any) -> float:
    """Winograd's transforms, or operands of 8 bits, and what the norm makes of their errors."""
    return 16 * torch.finfo(torch.bfloat16).eps if precision == "bfloat16" else 1e-4


def embedding(draw: Any) -> dict[str, Any]:
    groups, channels = draw(st.integers(1, 3)), draw(st.sampled_from([1, 3, 5]))
    count, filters = draw(st.integers(0, 5)), draw(st.sampled_from([16, 16, 6]))
    stored = torch.randint(0, 256, (5, 8, 9, channels))
    weights = []
    for inputs in [channels, filters][: draw(st.integers(1, 2))]:
        weights.append(torch.randn(filters, inputs, 3, 3) / (9 * inputs) ** 0.5)
        weights += [1 + 0.3 * torch.randn(filters), 0.3 * torch.randn(filters)]
    return {
        "images": stored.byte() if draw(st.booleans()) else stored / 255,
        "index": torch.arange(count) % 5,
        "offsets": offsets_of(draw, groups, count),
        "params": table(draw, groups),
        "mean": torch.full((channels,), 0.5),
        "std": torch.full((channels,), 0.25),
        "weights": weights,
        "padding": draw(st.sampled_from([1, 0, 3])),
        "eps": 1e-5,
        "precision": draw(st.sampled_from(PRECISIONS)),
    }


def embedded_mean(images: Tensor, params: Tensor, weights: Any, padding: int, **rest: Any) -> Any:
    height, width = images.shape[1:3]
    for block in range(len(weights) // 3):
        grown = 0 if block else 2 * int(padding) - 2
        height, width = (height + grown) // 2, (width + grown) // 2
    return (params.shape[0], weights[-1].shape[0] * height * width), torch.float32


def published(draw: Any) -> dict[str, Any]:
    x = torch.randn(draw(st.integers(1, 3)), 3, 6, 5)
    return {"x": x, "strategy": "color_rotate", "seed": 3, "strengths": {}, "aug_mode": "S"}


def diff_augment(strengths: dict[str, Any], aug_mode: Any, **arguments: Any) -> Tensor:
    param = ParamDiffAug()
    vars(param).update(strengths, aug_mode=aug_mode)
    return DiffAugment(**arguments, param=param)


def diff_aug(x: Any, strategy: Any, seed: Any, strengths: dict[str, Any], batch: bool) -> Tensor:
    augment = DiffAug(strategy, batch=batch)
    vars(augment).update(strengths)
    return augment(x, seed=seed)


def loss_of(real: Tensor, syn: Tensor, **rest: Any) -> tuple[torch.Size, torch.dtype]:
    return torch.Size(), torch.float64 if torch.float64 in (
        real.dtype,
        syn.dtype,
    ) else torch.float32


def augmented(x: Tensor, **rest: Any) -> tuple[torch.Size, torch.dtype]:
    return x.shape, x.dtype


SUBJECTS = {
    "siamese_augment": Subject(ops.siamese_augment, images, augmented, reference.siamese_augment),
    "gather_augment": Subject(
        ops.gather_augment,
        gathered,
        lambda images, index, dtype, **rest: (
            (len(index), images.shape[3], *images.shape[1:3]),
            dtype,
        ),
        reference.gather_augment,
    ),
    "class_mean_discrepancy": Subject(
        ops.class_mean_discrepancy,
        embedded,
        loss_of,
        reference.class_mean_discrepancy,
        names=r"no memory|class \d+ has",
    ),
    "instance_norm_relu_pool": Subject(
        ops.instance_norm_relu_pool, normed, pooled, reference.instance_norm_relu_pool
    ),
    "conv_norm_relu_pool": Subject(
        ops.conv_norm_relu_pool,
        convolved,
        blocks,
        reference.conv_norm_relu_pool,
        tolerance=of_products,
    ),
    "conv_batch_norm_relu_pool": Subject(
        lambda **arguments: ops.conv_batch_norm_relu_pool(**arguments)[0],
        batch_normed,
        blocks,
        lambda **arguments: reference.conv_batch_norm_relu_pool(**arguments)[0],
        tolerance=of_products,
    ),
    "conv_batch_statistics": Subject(
        ops.conv_batch_statistics,
        convolved_alone,
        lambda x, conv_weight, **rest: (
            (2, conv_weight.shape[0]),
            torch.float64 if x.dtype == torch.float64 else torch.float32,
        ),
        reference.conv_batch_statistics,
        tolerance=of_products,
    ),
    "convnet_class_mean": Subject(
        ops.convnet_class_mean,
        embedding,
        embedded_mean,
        reference.convnet_class_mean,
        tolerance=of_products,
    ),
    "draw_augmentation": Subject(
        ops.draw_augmentation,
        drawn,
        lambda groups, rows, **rest: ((int(groups) * int(rows), 13), torch.float32),
        reference.draw_augmentation,
    ),
    "draw_batch": Subject(
        ops.draw_batch,
        batch,
        lambda rows, **rest: ((int(rows),), torch.int64),
        reference.draw_batch,
        names=r"class \d+ has",
    ),
    "draw_weights_": Subject(
        fill,
        weights,
        lambda tensors, **rest: augmented([*tensors, torch.zeros(0)][0]),
        names=r"tensor \d+ ",
    ),
}


for _name, _call in (("DiffAugment", diff_augment), ("DiffAug", diff_aug)):
    SUBJECTS[_name] = Subject(
        _call,
        published,
        augmented,
        names="|".join(STRENGTH),
        of_memory="siamese_augment: no memory|.*can't allocate memory",
    )
SUBJECTS["DiffAug"].arguments = lambda draw: (
    {name: value for name, value in published(draw).items() if name != "aug_mode"}
    | {"batch": draw(st.booleans())}
)


def crash(**arguments: Any) -> None:
    ctypes.string_at(0)


SUBJECTS["crash"] = Subject(crash, images, augmented)


# ---- The process -------------------------------------------------------------------------------


def failure(name: str) -> str | None:
    @settings(
        derandomize=True,
        database=None,
        deadline=None,
        max_examples=EXAMPLES,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def run(data: Any) -> None:
        torch.manual_seed(0)
        check(name, SUBJECTS[name], data.draw)

    if name not in SUBJECTS:
        return "hostile.py has no arguments for it: add a Subject"
    try:
        run()
    except BaseException as error:
        told = str(error) or traceback.format_exc()
        return f"{type(error).__name__}: {told}"
    return None


def main(names: list[str]) -> None:
    faulthandler.enable()
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in names:
        print(json.dumps({"operator": name, "failure": failure(name)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
