# SPDX-License-Identifier: MIT
"""The list of cases that the operators of a network's blocks are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from cases import LAYOUTS, TABLES, lay_out
from torch import Tensor

from dmfast import reference

Arguments = tuple[object, ...]


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Block:
    """A call of conv_norm_relu_pool; without networks the weights have no leading axis."""

    channels: int
    filters: int
    size: tuple[int, int]
    images: int = 2
    padding: int = 1
    networks: int | None = None
    affine: str = "both"  # or weight, bias, none
    layout: str = "contiguous"

    def x(self, seed: int = 0) -> Tensor:
        return lay_out(randn(self.images, self.channels, *self.size, seed=seed), self.layout)

    def parameters(self) -> list[Tensor | None]:
        """conv_weight, weight and bias; the first within torch's default initialisation."""
        axis = () if self.networks is None else (self.networks,)
        shape = (*axis, self.filters, self.channels, 3, 3)
        conv_weight = torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        conv_weight *= (9 * self.channels) ** -0.5
        weight = 1 + 0.3 * randn(*axis, self.filters, seed=2)
        bias = 0.3 * randn(*axis, self.filters, seed=3)
        return [
            conv_weight,
            weight if self.affine in ("both", "weight") else None,
            bias if self.affine in ("both", "bias") else None,
        ]

    @property
    def convolved(self) -> tuple[int, int]:
        height, width = (side + 2 * self.padding - 2 for side in self.size)
        return height, width

    def gradient(self, exact_y: Tensor, margin: float) -> Tensor:
        """A gradient of the output that is zero where a value before ReLU is within the margin of
        zero: there a rounding error decides whether a gradient passes at all."""
        height, width = (side // 2 for side in self.convolved)
        gradient = randn(self.images, self.filters, height, width, seed=4)
        near = (exact_y.abs() < margin).to(gradient.dtype)
        return gradient * (F.max_pool2d(near, 2) == 0)

    def exact_y(self) -> Tensor:
        """What ReLU is given, in float64."""
        conv_weight, weight, bias = (None if p is None else p.double() for p in self.parameters())
        x = self.x().double()
        axis = conv_weight if conv_weight.dim() == 5 else conv_weight[None]
        parts = zip(x.tensor_split(len(axis)), axis, strict=True)
        z = torch.cat([F.conv2d(part, w, padding=self.padding) for part, w in parts])
        y = F.group_norm(z, self.filters, eps=1e-5)
        return per_image(y, weight, 1) * y + per_image(y, bias, 0)

    def __str__(self) -> str:
        networks = "" if self.networks is None else f"-networks{self.networks}"
        return (
            f"{self.images}x{self.channels}x{self.size[0]}x{self.size[1]}-{self.filters}"
            f"-padding{self.padding}{networks}-{self.affine}-{self.layout}"
        )


def per_image(y: Tensor, parameter: Tensor | None, identity: float) -> Tensor:
    if parameter is None:
        return torch.full_like(y[:1, :, :1, :1], identity)
    rows = parameter[None] if parameter.dim() == 1 else parameter
    return rows.repeat_interleave(len(y) // len(rows), 0)[..., None, None]


CASES = [
    Block(3, 128, (32, 32)),
    Block(128, 128, (16, 16), layout="channels_last"),
    Block(128, 128, (8, 8), images=7, layout="channels_last"),
    Block(1, 128, (28, 28), padding=3),
    Block(1, 16, (28, 28), images=7, padding=3, networks=1),
    Block(16, 16, (32, 32), images=1),
    Block(32, 16, (28, 28), padding=3, affine="none"),
    *(Block(channels, 16, (8, 8), images=7, layout="channels_last") for channels in (1, 3, 4, 16)),
    *(Block(channels, 16, (7, 7), images=6, networks=3) for channels in (3, 4, 16, 32)),
    *(Block(16, 16, (13, 10), images=3, layout=layout) for layout in LAYOUTS),
    *(Block(3, 16, (13, 10), images=3, layout=layout) for layout in LAYOUTS),
    *(Block(16, 32, (5, 5), images=7, affine=affine) for affine in ("none", "weight", "bias")),
    *(Block(3, 16, (5, 5), images=7, affine=affine) for affine in ("none", "weight", "bias")),
    *(Block(32, 16, (7, 7), images=7, padding=padding) for padding in (0, 1, 3)),
    *(Block(4, 16, (7, 7), images=7, padding=padding) for padding in (0, 1, 3)),
    Block(16, 128, (4, 4), images=7),
    Block(16, 16, (4, 4), images=7, padding=0),
    Block(16, 16, (2, 3), images=7),
    Block(1, 16, (2, 3), images=7),
    Block(48, 48, (6, 9), images=2, layout="sliced"),
    # Weight gradients that are summed in parts, of several images or one; more and less padding
    # than the input has tiles.
    Block(16, 16, (8, 16), images=70),
    Block(16, 16, (8, 8), images=140, networks=2),
    Block(32, 32, (68, 68), layout="channels_last"),
    Block(16, 16, (4, 4), images=32, padding=4),
    Block(16, 16, (2, 2), images=33, padding=8),
    Block(128, 16, (16, 16), images=6, networks=3, affine="weight", layout="channels_last"),
    Block(16, 16, (8, 8), images=0),
    Block(3, 16, (8, 8), images=0, layout="channels_last"),
    Block(16, 16, (8, 8), images=0, networks=3),
    # Beyond the fused kernels: torch's layers.
    Block(5, 16, (8, 8)),
    Block(16, 10, (8, 8)),
    Block(16, 16, (8, 8), padding=9),
    Block(6, 3, (7, 8), images=6, networks=3, layout="sliced"),
    Block(6, 3, (7, 8), images=0, networks=3),
]


# ---- opcheck: schema, fake, autograd -----------------------------------------------------------


def opcheck_samples() -> dict[str, tuple[object, Callable[[], Arguments]]]:
    """Operators with a function that makes arguments for them."""
    op = torch.ops.dmfast
    samples: dict[str, tuple[object, Callable[[], Arguments]]] = {}
    for layout in LAYOUTS:
        for networks in (None, 3):
            for images in (0, 6):
                where = layout if images else "contiguous"
                case = Block(16, 16, (5, 4), images, 1, networks, layout=where)
                name = f"{layout}-{networks}-{images}"
                samples[f"norm-{name}"] = op.instance_norm_relu_pool, norm_arguments(case)
                samples[f"norm_backward-{name}"] = (
                    op._instance_norm_relu_pool_backward,
                    norm_backward_arguments(case, [True, True, True]),
                )
                samples[f"block-{name}"] = op.conv_norm_relu_pool, block_arguments(case)
                samples[f"block_backward-{name}"] = (
                    op._conv_norm_relu_pool_backward,
                    block_backward_arguments(case, [True] * 4),
                )
    small = Block(3, 16, (6, 6), affine="none")
    samples["norm-none"] = op.instance_norm_relu_pool, norm_arguments(small)
    samples["norm_backward-some"] = (
        op._instance_norm_relu_pool_backward,
        norm_backward_arguments(Block(16, 16, (5, 4)), [False, True, False]),
    )
    samples["block-none"] = op.conv_norm_relu_pool, block_arguments(small)
    samples["block-1x1"] = op.conv_norm_relu_pool, block_arguments(Block(16, 16, (2, 3)))
    samples["block_backward-some"] = (
        op._conv_norm_relu_pool_backward,
        block_backward_arguments(Block(16, 16, (5, 4)), [False, True, False, True]),
    )
    samples["convnet"] = op.convnet_class_mean, convnet_arguments
    for channels in (3, 16):
        for given in (False, True):
            case = Block(channels, 16, (5, 6), affine="none" if given else "both")
            name = f"{channels}-{'given' if given else 'own'}"
            samples[f"batch-{name}"] = (
                op.conv_batch_norm_relu_pool,
                batch_norm_arguments(case, given),
            )
            samples[f"batch_backward-{name}"] = (
                op._conv_batch_norm_relu_pool_backward,
                batch_norm_backward_arguments(case, given, [True, given, True, not given]),
            )
    samples["batch-statistics"] = (
        op._conv_batch_statistics,
        lambda: (case.x(), case.parameters()[0], 1, False),
    )
    return samples


def norm_arguments(case: Block) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        z = lay_out(randn(case.images, case.filters, *case.size, seed=0), case.layout)
        _, *parameters = case.parameters()
        inputs = [None if t is None else t.requires_grad_() for t in (z, *parameters)]
        return *inputs, 1e-5

    return arguments


def norm_backward_arguments(case: Block, wanted: list[bool]) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        inputs = norm_arguments(case)()
        out, statistics = torch.ops.dmfast.instance_norm_relu_pool(*inputs)
        gradient = randn(*out.shape, seed=4).requires_grad_()
        return gradient, *inputs[:3], statistics, 1e-5, wanted

    return arguments


def block_arguments(case: Block) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        inputs = [None if t is None else t.requires_grad_() for t in (case.x(), *case.parameters())]
        return *inputs, 1e-5, case.padding, False, True

    return arguments


def block_backward_arguments(case: Block, wanted: list[bool]) -> Callable[[], Arguments]:
    """None requires a gradient: there is no second derivative."""

    def arguments() -> Arguments:
        inputs = (case.x(), *case.parameters())
        out, *kept = torch.ops.dmfast.conv_norm_relu_pool(*inputs, 1e-5, case.padding, False, True)
        return torch.ones_like(out), *inputs, *kept, case.padding, False, wanted

    return arguments


def batch_norm_arguments(case: Block, given: bool) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        inputs = [None if t is None else t.requires_grad_() for t in (case.x(), *case.parameters())]
        statistics = torch.full((2, case.filters), 0.7) if given else None
        return *inputs, statistics, 1e-5, case.padding, False, True

    return arguments


def batch_norm_backward_arguments(
    case: Block, given: bool, wanted: list[bool]
) -> Callable[[], Arguments]:
    def arguments() -> Arguments:
        inputs = (case.x(), *case.parameters())
        statistics = torch.full((2, case.filters), 0.7) if given else None
        out, *kept = torch.ops.dmfast.conv_batch_norm_relu_pool(
            *inputs, statistics, 1e-5, case.padding, False, True
        )
        return torch.ones_like(out), *inputs, *kept, given, 1e-5, case.padding, False, wanted

    return arguments


def convnet_arguments() -> Arguments:
    images = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8)
    table = TABLES["each"][:2]
    index, offsets = torch.tensor([4, 0, 4]), torch.tensor([0, 1, 3])
    weights = convnet_weights(3, 16, 2)
    return images, index, offsets, table, *NORMALISATION, weights, 1, 1e-5, False


NORMALISATION = torch.tensor([0.49, 0.48, 0.45]), torch.tensor([0.20, 0.21, 0.22])


def convnet_weights(channels: int, filters: int, depth: int) -> list[Tensor]:
    weights: list[Tensor] = []
    for block in range(depth):
        case = Block(filters if block else channels, filters, (8, 8))
        weights += [p for p in case.parameters() if p is not None]
    return weights


# ---- Errors ------------------------------------------------------------------------------------


def rms(values: Tensor) -> float:
    return values.double().square().mean().sqrt().item() if values.numel() else 0.0


def assert_within(actual: Tensor, plain: Tensor, exact: Tensor, times: float) -> None:
    """An rms error of at most so many times plain torch's, beside the rounding of the result."""
    assert actual.shape == exact.shape
    floor = 2 * torch.finfo(actual.dtype).eps * rms(exact)
    error, plain_error = rms(actual - exact), rms(plain - exact)
    assert error <= times * plain_error + floor, f"{error} > {times} x {plain_error} + {floor}"


def cosine(a: Tensor, b: Tensor) -> float:
    return F.cosine_similarity(a.double().flatten(), b.double().flatten(), 0).item()


def result_and_gradients(
    function: Callable[..., Tensor],
    tensors: list[Tensor | None],
    gradient: Tensor,
    *rest: object,
    **options: object,
) -> list[Tensor]:
    """The result, then the gradients of all tensors that there are."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    out = function(*leaves, *rest, **options)
    wanted = [t for t in leaves if t is not None]
    return [out.detach(), *torch.autograd.grad(out, wanted, gradient.to(out.dtype))]


def plain_and_exact(
    case: Block, gradient: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], list[Tensor]]:
    """The block by plain torch, in a dtype and in float64."""
    results = []
    for of_dtype in (dtype, torch.float64):
        tensors = [None if t is None else t.to(of_dtype) for t in (case.x(), *case.parameters())]
        results.append(
            result_and_gradients(
                reference.conv_norm_relu_pool, tensors, gradient, 1e-5, case.padding
            )
        )
    return results[0], results[1]
