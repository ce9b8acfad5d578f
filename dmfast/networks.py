# SPDX-License-Identifier: MIT
"""The networks whose embeddings are matched and which are trained on a condensed set.

State dicts are named as in the published code, so its checkpoints load.
``python -m dmfast.networks`` lists parameters, size of the embedding and operations.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the imports that take long
    from dmfast import cli

    cli.main("dmfast.networks")

import json
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import _own, _zoo, cli, ops
from ._blocks import is_fused
from ._own import OwnNetwork, is_own, number_of, own_network, seeded, undrawn
from ._zoo import Network, norm_layers, published_network
from .errors import InputError
from .files import write_bytes
from .ops import Stream

__all__ = [
    "MODELS",
    "ZOO",
    "ConvNet",
    "FusedBlock",
    "Network",
    "drawn_weights",
    "get_network",
    "has_batch_norm",
    "has_fused_blocks",
    "initialise_",
    "table",
    "through_blocks",
]

#: What names a network, for the help of an option.
MODELS = f"as ConvNetD4BN, VGG11 or ResNet18BN, or your own, {_own.GRAMMAR}"
#: Those of the published code, which ``python -m dmfast.networks`` lists.
ZOO = (
    *("MLP", "LeNet", "AlexNet", "AlexNetBN", "VGG11", "VGG11BN"),
    *("ResNet18", "ResNet18BN", "ResNet18_AP", "ResNet18BN_AP", "ConvNet", "ConvNetBN"),
    *("ConvNetD1", "ConvNetD2", "ConvNetD4", "ConvNetD4BN"),
    *("ConvNetW32", "ConvNetW64", "ConvNetW256", "ConvNetAS", "ConvNetAL", "ConvNetASwish"),
    *("ConvNetASwishBN", "ConvNetNN", "ConvNetLN", "ConvNetGN", "ConvNetNP", "ConvNetMP"),
)

_GRAMMAR = "ConvNet[D<depth>][W<width>][AS|AR|AL|ASwish][NN|BN|LN|IN|GN][NP|MP|AP]"
_CONVNET = re.compile(
    r"ConvNet(?:D([1-9]\d*))?(?:W([1-9]\d*))?(?:A(Swish|S|R|L))?([NBLIG]N)?([NMA]P)?"
)

_UNIFORM = (nn.modules.conv._ConvNd, nn.Linear)
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
_MAX_DEPTH, _MAX_WIDTH = 64, 8192  # beyond anything in use, within any memory


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
            # In float32 whatever the network is in.
            mean = running_mean.float() - conv_bias.detach().float()
            statistics = torch.stack([mean, running_var.float()])
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
    mode and ``torch.func``, and on a GPU ``DMFAST_GPU=torch``. Under autocast to bfloat16 the
    products are of bfloat16, and on a GPU what passes from block to block; the embedding keeps the
    dtype of the images.

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
            layers += norm_layers(norm, width, rows, columns)
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
            # The norm cancels the convolution's bias: its gradient is zero, but is one. By running
            # statistics it is not cancelled, which FusedBlock does not see.
            share: float | Tensor = 0.0
            if type(norm) is nn.BatchNorm2d and not norm.training:
                assert norm.running_var is not None
                share = norm.weight.detach() * (norm.running_var + norm.eps).rsqrt()
            bias = bias + share * (conv.bias - conv.bias.detach())
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
    of_sample = variance * (count / max(count - 1, 1))
    for running, found in ((norm.running_mean, mean), (norm.running_var, of_sample)):
        running.copy_(running.to(found.dtype).lerp(found, norm.momentum))


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

    Names are ``MLP``, ``LeNet``, ``AlexNet[BN]``, ``VGG11[BN]``, ``ResNet18[BN][_AP]`` (see
    :mod:`dmfast._zoo`), and ``ConvNet[D<depth>][W<width>][A<activation>][norm][pool]``, as
    ``ConvNetD4BN``. What is left out of these is depth 3, width 128, activation R (ReLU), norm IN
    and pool AP.

    ========== ========================================================================
    activation S sigmoid, R ReLU, L leaky ReLU (0.01), Swish x * sigmoid(x)
    norm       NN none, BN batch, LN layer (over C, H and W), IN instance (GroupNorm of a
               channel each), GN GroupNorm of 4 groups
    pool       NP none, MP maximum, AP average
    ========== ========================================================================

    A network of your own is ``path/to/file.py:function`` or ``path/to/file.py:function@layer``: the
    function makes it, as ``function(channels, classes, size)``, and its embedding is what its
    method ``embed(x)`` gives, or the output of the layer, or what its last linear layer is given.
    Its weights are drawn anew by the rules of :mod:`dmfast._own`.

    Args:
        seed: None: drawn from the global generator. Otherwise the weights are those of
            ``initialise_(network, seed, 0)`` and no generator is touched.

    Raises:
        InputError: on an unknown name, images too small for the network, or a function that cannot
            be used.
    """
    if is_own(name):
        return own_network(
            name, channels, classes, size, seed, lambda network, seed: initialise_(network, seed, 0)
        )
    with torch.device("cpu" if seed is None else "meta"):
        network = _made(name, channels, classes, size).float()
    if seed is not None:
        network.to_empty(device="cpu")
        initialise_(network, seed, 0)
    return network


def _made(name: str, channels: int, classes: int, size: tuple[int, int]) -> Network:
    """The network of that name in torch's own initialisation, where torch makes tensors."""
    network = published_network(name, channels, classes, size)
    if network is not None:
        return network
    parts = _CONVNET.fullmatch(name)
    if parts is None:
        raise InputError(
            f"unknown model {name!r}; a model is {_GRAMMAR}, as ConvNetD4BN, {_zoo.GRAMMAR} or "
            f"{_own.GRAMMAR}"
        )
    depth, width, activation, norm, pool = parts.groups()
    return ConvNet(
        channels,
        classes,
        size,
        depth=int(depth or 3),
        width=int(width or 128),
        activation=activation or "R",
        norm=norm or "IN",
        pool=pool or "AP",
    )


def has_fused_blocks(name: str) -> bool:
    """Whether a network of that name goes by the fused blocks, where device and images allow it.

    Those of instance norm: ``auto`` leaves batch norm in float32 on a CPU.
    """
    parts = _CONVNET.fullmatch(name)
    if parts is None:
        return False
    _, width, activation, norm, pool = parts.groups()
    kind = (activation or "R", norm or "IN", pool or "AP")
    return kind == ("R", "IN", "AP") and int(width or 128) % 16 == 0


@torch.no_grad()
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
    Other modules that have a ``reset_parameters`` are drawn by that, children before parents, from
    generators that are seeded by the same.

    Args:
        step: an int, or an int64 tensor of one element on the network's device.

    Raises:
        InputError: nothing draws a parameter of the network.
    """
    resets = _resets(network)
    number = 0
    if resets or (isinstance(network, OwnNetwork) and network.draws):
        number = number_of(step)
    key = seed, number, int(stream), network_index
    if isinstance(network, OwnNetwork):
        network.begin(key)
    for module in network.modules():
        if _is_torchs(module, _NORMS):
            module.reset_parameters()  # type: ignore[operator]
    ops.draw_weights_(
        *drawn_weights(network), seed, step, first_network=network_index, stream=stream
    )
    if resets:
        with seeded(next(network.parameters()).device, *key):
            for reset in resets:
                reset()


def drawn_weights(network: nn.Module) -> tuple[list[Tensor], list[float]]:
    """What :func:`initialise_` draws uniformly of a network, and the bound of each tensor."""
    tensors: dict[int, Tensor] = {}  # by identity: layers may share them
    bounds: list[float] = []
    for module in network.modules():
        if _is_torchs(module, _UNIFORM):
            bound = module.weight[0].numel() ** -0.5  # type: ignore[index]
            for parameter in module.parameters():
                if id(parameter) not in tensors:
                    tensors[id(parameter)] = parameter
                    bounds.append(bound)
    return list(tensors.values()), bounds


def _is_torchs(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether it is one of these, with torch's own initialisation."""
    if not isinstance(module, kinds):
        return False
    reset: Any = module.reset_parameters
    return str(reset.__module__).startswith("torch.nn.")


def _resets(network: nn.Module) -> list[Callable[[], object]]:
    """What draws the modules that are neither drawn uniformly nor norms, children first.

    Raises:
        InputError: nothing draws a parameter of one.
    """
    resets: list[Callable[[], object]] = []
    model: str | None = None
    if isinstance(network, OwnNetwork):
        model = network.name
        network = network.network
    for name, module in reversed(list(network.named_modules())):
        parameters = [key for key, value in module._parameters.items() if value is not None]
        if _is_torchs(module, _UNIFORM):
            # Not so where a layer is pruned or a parameter made of others.
            strangers = [key for key in parameters if key not in ("weight", "bias")]
            if strangers:
                raise undrawn(name, module, strangers[0], model)
        elif not _is_torchs(module, _NORMS):
            # torch's attention and transformers have it under another name.
            reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
            if callable(reset):
                resets.append(reset)
            elif parameters:
                raise undrawn(name, module, parameters[0], model)
    return resets


def has_batch_norm(network: nn.Module) -> bool:
    """Whether the embedding of an image depends on the others of its batch."""
    if isinstance(network, OwnNetwork) and network.mixes_batch:
        return True
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())


def _activation(activation: str) -> nn.Module:
    if activation == "S":
        return nn.Sigmoid()
    if activation == "L":
        return nn.LeakyReLU(0.01, inplace=True)
    if activation == "Swish":
        return nn.SiLU()
    return nn.ReLU(inplace=True)


# ---- python -m dmfast.networks -----------------------------------------------------------------


def table(
    names: Iterable[str], channels: int, classes: int, size: tuple[int, int]
) -> list[dict[str, Any]]:
    """Of each network its ``name``, ``parameters``, ``embedding`` (D) and ``flop``.

    The last are the operations of the convolutions and matrix products of an image's way forward, a
    multiply-add being two, as :class:`torch.utils.flop_counter.FlopCounterMode` counts them; norms,
    activations and pooling are not counted.

    Raises:
        InputError: see :func:`get_network`.
    """
    from torch.utils.flop_counter import FlopCounterMode

    rows = []
    for name in names:
        if is_own(name):
            network = get_network(name, channels, classes, size, seed=0)
        else:
            with torch.device("meta"):  # nothing is drawn or computed
                network = _made(name, channels, classes, size)
        if isinstance(network, ConvNet):
            network.fused = False  # operators that it does not know
        device = next(network.parameters()).device
        images = torch.zeros(1, channels, *size, device=device)
        # Attention's fast path is an operator that it does not know, too.
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                network.eval()(images)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
        rows.append(
            {
                "name": name,
                "parameters": sum(parameter.numel() for parameter in network.parameters()),
                "embedding": network.embedding_size,
                "flop": counter.get_total_flops(),
            }
        )
    return rows


def _parser() -> cli.Parser:
    parser = cli.Parser(
        "dmfast.networks",
        "Lists networks: their parameters, the size of their embedding, and the operations of an "
        "image's way forward.",
    )
    parser.add_argument(
        "names",
        metavar="NAME",
        nargs="*",
        help=f"as ConvNetD4BN, or {_own.GRAMMAR} (default: those of the published code)",
    )
    parser.add_argument("--images", metavar="CxHxW", default="3x32x32", help="their shape")
    parser.add_argument("--classes", metavar="N", type=int, default=10, help="how many")
    parser.add_argument("--json", metavar="FILE", help="also write the table there")
    return parser


def _main(arguments: Sequence[str]) -> None:
    options = _parser().parse_args(arguments)
    channels, *size = cli.parse_shape("--images", options.images)
    height, width = size
    if options.classes < 1:
        raise InputError(f"--classes must be 1 or more, got {options.classes}")
    rows = []
    for name in options.names or ZOO:
        try:
            rows += table([name], channels, options.classes, (height, width))
        except InputError as error:
            if options.names:
                raise
            print(f"note: {name} is left out: {error}", file=sys.stderr)
    if options.json is not None:
        content = {"images": options.images, "classes": options.classes, "networks": rows}
        write_bytes(Path(options.json), (json.dumps(content, indent=2) + "\n").encode())
    print(
        f"images of {options.images}, {options.classes} classes; MFLOP of convolutions and matrix "
        "products, forward, an image; a multiply-add is 2"
    )
    longest = max(len("network"), *(len(row["name"]) for row in rows))
    print(f"{'network':{longest}} {'parameters':>12} {'embedding':>10} {'MFLOP':>10}")
    for row in rows:
        print(
            f"{row['name']:{longest}} {row['parameters']:12,} {row['embedding']:10,} "
            f"{row['flop'] / 1e6:10,.2f}"
        )
