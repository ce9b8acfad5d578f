# SPDX-License-Identifier: MIT
"""The networks whose embeddings are matched and which are trained on a condensed set.

State dicts are named as in the published code, so its checkpoints load.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import ops
from ._blocks import is_fused
from .errors import InputError
from .ops import Stream

_GRAMMAR = "ConvNet[D<depth>][W<width>][AS|AR|AL|ASwish][NN|BN|LN|IN|GN][NP|MP|AP]"
_CONVNET = re.compile(
    r"ConvNet(?:D([1-9]\d*))?(?:W([1-9]\d*))?(?:A(Swish|S|R|L))?([NBLIG]N)?([NMA]P)?"
)

_MAX_DEPTH, _MAX_WIDTH = 64, 8192  # beyond anything in use, within any memory


class Network(nn.Module):
    """A classifier of images [N, C, H, W]: a linear layer on an embedding."""

    features: nn.Sequential
    classifier: nn.Linear

    def embed(self, x: Tensor) -> Tensor:
        """What distribution matching compares: the last block, flattened (C, H, W) to [N, D]."""
        features: Tensor = self.features(x)
        return features.flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """The logits [N, classes]."""
        logits: Tensor = self.classifier(self.embed(x))
        return logits


class FusedBlock(NamedTuple):
    """A block as :func:`dmfast.ops.conv_norm_relu_pool` or ``conv_batch_norm_relu_pool`` takes it.

    ``weights`` are the convolution's, the norm's weight and its bias. With batch norm there are its
    layer, which keeps running statistics, and the convolution's bias, which is part of them.
    """

    weights: tuple[Tensor, Tensor, Tensor]
    eps: float
    padding: int
    batch_norm: nn.BatchNorm2d | None = None
    conv_bias: Tensor | None = None

    def __call__(self, x: Tensor, precision: str | None) -> Tensor:
        """What the block makes of images [N, C, H, W]."""
        norm, conv_bias = self.batch_norm, self.conv_bias
        if norm is None or conv_bias is None:
            return ops.conv_norm_relu_pool(
                x, *self.weights, self.eps, self.padding, precision=precision
            )
        running_mean, running_var = norm.running_mean, norm.running_var
        assert running_mean is not None
        assert running_var is not None
        statistics = None
        if not norm.training:
            statistics = torch.stack([running_mean - conv_bias.detach(), running_var])
        out, found = ops.conv_batch_norm_relu_pool(
            x, *self.weights, self.eps, self.padding, precision, statistics
        )
        if norm.training:
            count = x.shape[0] * (x.shape[2] + 2 * self.padding - 2)
            count *= x.shape[3] + 2 * self.padding - 2
            _track(norm, found[0] + conv_bias.detach(), found[1], count)
        return out


class ConvNet(Network):
    """Blocks of 3x3 convolution, normalisation, activation and 2x2 pooling.

    The arguments after ``size`` are the parts of a name, spelled as there (see
    :func:`get_network`). Images of one channel are padded by 3 in the first convolution, so that
    28x28 becomes 32x32; odd sides lose a row or column in pooling.

    Where :func:`dmfast.ops.conv_norm_relu_pool` takes its blocks, which is with norm IN, activation
    R and pool AP, ``embed`` goes by it, and on a CPU with norm BN by
    :func:`dmfast.ops.conv_batch_norm_relu_pool`. There is no second derivative then; ``fused`` set
    to False has it go by torch's own layers, as do layers that were replaced or hooked, forward
    mode and
    ``torch.func``, and on a GPU ``DMFAST_GPU=torch``. Under autocast to bfloat16 the products are
    of bfloat16, and on a GPU what passes from block to block; the embedding keeps the dtype of the
    images.

    Attributes:
        fused: whether ``embed`` may go by the fused blocks.

    Raises:
        InputError: where pooling leaves nothing of the images, depth or width is beyond reason, or
            a width does not split into the 4 groups of ``GN``.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        size: tuple[int, int],
        *,
        depth: int = 3,
        width: int = 128,
        activation: str = "R",
        norm: str = "IN",
        pool: str = "AP",
    ) -> None:
        super().__init__()
        if depth > _MAX_DEPTH or width > _MAX_WIDTH:
            raise InputError(
                f"a ConvNet has a depth of at most {_MAX_DEPTH} and a width of at most "
                f"{_MAX_WIDTH}, got D{depth} and W{width}"
            )
        if norm == "GN" and width % 4:
            raise InputError(f"GN needs a width that is a multiple of 4, got W{width}")
        layers: list[nn.Module] = []
        rows, columns = size
        for block in range(depth):
            padding = 3 if channels == 1 and block == 0 else 1
            layers.append(nn.Conv2d(width if block else channels, width, 3, padding=padding))
            rows, columns = rows + 2 * padding - 2, columns + 2 * padding - 2
            layers += _norm(norm, width, rows, columns)
            layers.append(_activation(activation))
            if pool != "NP":
                layers.append(nn.MaxPool2d(2) if pool == "MP" else nn.AvgPool2d(2))
                rows, columns = rows // 2, columns // 2
            if not (rows and columns):
                remedy = f"depth {block} (D{block})" if block else "no pooling (NP)"
                raise InputError(
                    f"images of {size[0]}x{size[1]} are too small for depth {depth}: pooling "
                    f"leaves nothing of them after block {block + 1}; use {remedy} or larger images"
                )
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * rows * columns, classes)
        self.fused = True

    @property
    def plain(self) -> bool:
        """Whether its blocks are the published default: norm IN, ReLU and mean pooling."""
        return _instance_norm_only(_blocks(self.features)) is not None

    def embed(self, x: Tensor) -> Tensor:
        """See :class:`Network`."""
        blocks = self._fused_blocks(x.device, x.dtype)
        if blocks is None:
            return super().embed(x)
        return through_blocks(x, blocks)

    def fused_blocks(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> list[FusedBlock] | None:
        """The blocks, or None where images of that dtype and device go by torch's own layers.

        Those with instance norm alone.
        """
        return _instance_norm_only(self._fused_blocks(device, dtype))

    def batch_norm_blocks(
        self, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> list[FusedBlock] | None:
        """Like :meth:`fused_blocks`, those with batch norm alone."""
        blocks = self._fused_blocks(device, dtype)
        if blocks is None or any(block.batch_norm is None for block in blocks):
            return None
        return blocks

    def _fused_blocks(self, device: torch.device, dtype: torch.dtype) -> list[FusedBlock] | None:
        if not self.fused or _is_transformed():
            return None
        blocks = _blocks(self.features)
        if blocks is None:
            return None
        padding = max(block.padding for block in blocks)
        conv_weights = [block.weights[0] for block in blocks]
        if device.type != "cpu" and _instance_norm_only(blocks) is None:
            return None
        return blocks if is_fused(conv_weights, padding, None, dtype) else None


def through_blocks(x: Tensor, blocks: Sequence[FusedBlock]) -> Tensor:
    """The embedding [N, D] of images by these blocks, in the dtype of the images.

    Under autocast to bfloat16 the products are of bfloat16.
    """
    device, dtype, precision = x.device.type, x.dtype, None
    if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16:
        precision = "bfloat16"
        if device != "cpu":
            x = x.to(torch.bfloat16)
    for block in blocks:
        x = block(x, precision)
    return x.flatten(1).to(dtype)


def _blocks(features: nn.Module) -> list[FusedBlock] | None:
    """What the layers are as fused blocks, or None where they are anything else.

    Layers may have been replaced or hooked since they were made: pruning does so, for one.
    """
    layers: list[Any] = list(features.children())
    if not layers or len(layers) % 4 or any(map(_has_hooks, [features, *layers])):
        return None
    blocks = []
    for first in range(0, len(layers), 4):
        conv, norm, activation, pool = layers[first : first + 4]
        if (type(conv), type(activation), type(pool)) != (nn.Conv2d, nn.ReLU, nn.AvgPool2d):
            return None
        plain = (
            conv.kernel_size == (3, 3)
            and conv.stride == conv.dilation == (1, 1)
            and conv.groups == 1
            and conv.padding_mode == "zeros"
            and conv.padding in ((1, 1), (conv.padding[0],) * 2 if first == 0 else (1, 1))
            and conv.bias is not None
            and (_is_instance_norm(norm) or _is_batch_norm(norm))
            and norm.eps == layers[1].eps
            and (pool.kernel_size, pool.stride, pool.padding) == (2, 2, 0)
            and not pool.ceil_mode
        )
        if not plain:
            return None
        bias = norm.bias
        if torch.is_grad_enabled() and conv.bias.requires_grad:
            # The norm cancels the convolution's bias: its gradient is zero, but is one.
            bias = bias + 0 * conv.bias
        of_batch = (norm, conv.bias) if type(norm) is nn.BatchNorm2d else (None, None)
        weights = conv.weight, norm.weight, bias
        blocks.append(FusedBlock(weights, norm.eps, conv.padding[0], *of_batch))
    return blocks


def _is_instance_norm(norm: nn.Module) -> bool:
    return type(norm) is nn.GroupNorm and norm.num_groups == norm.num_channels and norm.affine


def _is_batch_norm(norm: nn.Module) -> bool:
    """With running statistics that move by a fixed share."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
    )


def _instance_norm_only(blocks: list[FusedBlock] | None) -> list[FusedBlock] | None:
    if blocks is None or any(block.batch_norm is not None for block in blocks):
        return None
    return blocks


@torch.no_grad()
def _track(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Moves the running statistics as torch does: by the variance of a sample."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.momentum is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    norm.running_mean.lerp_(mean, norm.momentum)
    norm.running_var.lerp_(variance * (count / max(count - 1, 1)), norm.momentum)


def _has_hooks(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks
    return any((*hooks, module._backward_hooks, module._backward_pre_hooks))


def _is_transformed() -> bool:
    """Whether derivatives are taken that the operators have none for: forward mode, torch.func."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def get_network(
    name: str, channels: int, classes: int, size: tuple[int, int], seed: int | None = None
) -> Network:
    """The network of that name for images [N, channels, *size], on the CPU, in float32.

    Names are ``ConvNet[D<depth>][W<width>][A<activation>][norm][pool]``, as ``ConvNetD4BN``. What
    is left out is depth 3, width 128, activation R (ReLU), norm IN and pool AP.

    ========== ========================================================================
    activation S sigmoid, R ReLU, L leaky ReLU (0.01), Swish x * sigmoid(x)
    norm       NN none, BN batch, LN layer (over C, H and W), IN instance (GroupNorm of a
               channel each), GN GroupNorm of 4 groups
    pool       NP none, MP maximum, AP average
    ========== ========================================================================

    Args:
        seed: None: torch's own initialisation, from the global generator. Otherwise the weights
            are those of ``initialise_(network, seed, 0)`` and no generator is touched.

    Raises:
        InputError: on an unknown name, or images too small for the depth.
    """
    parts = _CONVNET.fullmatch(name)
    if parts is None:
        raise InputError(f"unknown model {name!r}; a model is {_GRAMMAR}, as ConvNetD4BN")
    depth, width, activation, norm, pool = parts.groups()
    with torch.device("cpu" if seed is None else "meta"):
        network = ConvNet(
            channels,
            classes,
            size,
            depth=int(depth or 3),
            width=int(width or 128),
            activation=activation or "R",
            norm=norm or "IN",
            pool=pool or "AP",
        ).float()
    if seed is not None:
        network.to_empty(device="cpu")
        initialise_(network, seed, 0)
    return network


def has_fused_blocks(name: str) -> bool:
    """Whether a network of that name goes by the fused blocks, where device and images allow it."""
    parts = _CONVNET.fullmatch(name)
    if parts is None:
        return False
    _, width, activation, norm, pool = parts.groups()
    kind = (activation or "R", norm or "IN", pool or "AP")
    return kind == ("R", "IN", "AP") and int(width or 128) % 16 == 0


def initialise_(
    network: nn.Module,
    seed: int,
    step: int | Tensor,
    *,
    network_index: int = 0,
    stream: Stream = Stream.WEIGHTS,
) -> None:
    """Redraws a network in place, as a pure function of (seed, step, stream, network_index).

    The distribution is that of torch's default initialisation: weights and biases of convolutions
    and linear layers uniform within 1/sqrt(fan in), norms the identity, running statistics empty.

    Args:
        step: an int, or an int64 tensor of one element on the network's device.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            module.reset_parameters()
    ops.draw_weights_(
        *drawn_weights(network), seed, step, first_network=network_index, stream=stream
    )


def drawn_weights(network: nn.Module) -> tuple[list[Tensor], list[float]]:
    """What :func:`initialise_` draws of a network, and the bound of each tensor."""
    tensors: list[Tensor] = []
    bounds: list[float] = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            for parameter in module.parameters():
                tensors.append(parameter)
                bounds.append(bound)
    return tensors, bounds


def has_batch_norm(network: nn.Module) -> bool:
    """Whether the embedding of an image depends on the others of its batch."""
    return any(isinstance(module, nn.BatchNorm2d) for module in network.modules())


def _norm(norm: str, channels: int, rows: int, columns: int) -> list[nn.Module]:
    if norm == "BN":
        return [nn.BatchNorm2d(channels)]
    if norm == "LN":
        return [nn.LayerNorm([channels, rows, columns])]
    if norm == "IN":
        return [nn.GroupNorm(channels, channels)]
    if norm == "GN":
        return [nn.GroupNorm(4, channels)]
    return []


def _activation(activation: str) -> nn.Module:
    if activation == "S":
        return nn.Sigmoid()
    if activation == "L":
        return nn.LeakyReLU(0.01, inplace=True)
    if activation == "Swish":
        return nn.SiLU()
    return nn.ReLU(inplace=True)
