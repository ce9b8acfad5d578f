# SPDX-License-Identifier: MIT
"""Networks of one kind that are trained at once, as one network of more weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import ops
from .networks import ConvNet, FusedBlock, Network, drawn_weights, through_blocks
from .ops import Stream

_VECTOR = 16  # float32 of the widest


def can_stack(network: Network, device: torch.device) -> bool:
    """Whether :class:`NetworkStack` takes networks of that kind on that device."""
    return isinstance(network, ConvNet) and network.fused_blocks(device) is not None


class NetworkStack(nn.Module):
    """R networks like ``network``, each with weights of its own: parameters are [R, ...].

    It takes images [R * n, C, H, W], n for each network in their order, and gives their logits
    [R * n, classes]. On a CPU what a network comes to is the same to the bit in any stack.
    """

    def __init__(self, network: ConvNet, networks: int) -> None:
        """``network``: one that :func:`can_stack` allows, on the device to be used."""
        super().__init__()
        self.networks = networks
        stacked = {
            name: parameter.new_empty((networks, *parameter.shape))
            for name, parameter in network.named_parameters()
        }
        # An update of torch rounds what does not fill its vectors in another way, and which
        # elements these are would depend on the number of networks.
        classes = network.classifier.out_features
        bias = stacked["classifier.bias"].new_zeros((networks, -(-classes // _VECTOR) * _VECTOR))
        stacked["classifier.bias"] = bias[:, :classes]
        names = {id(parameter): name for name, parameter in network.named_parameters()}
        drawn, self._bounds = drawn_weights(network)
        self._drawn = [stacked[names[id(tensor)]] for tensor in drawn]
        self._stacked = stacked
        blocks = network.fused_blocks(drawn[0].device)
        assert blocks is not None
        # A convolution's bias is not learned: the norm cancels it.
        self._blocks, learned = [], nn.ParameterList()
        for number, block in enumerate(blocks):
            convolution, norm = f"features.{4 * number}", f"features.{4 * number + 1}"
            weights = (
                nn.Parameter(stacked[f"{convolution}.weight"]),
                nn.Parameter(stacked[f"{norm}.weight"]),
                nn.Parameter(stacked[f"{norm}.bias"]),
            )
            learned.extend(weights)
            self._blocks.append(FusedBlock(weights, block.eps, block.padding))
        self._of_blocks = learned
        self._weight = nn.Parameter(stacked["classifier.weight"])
        self._padded_bias = nn.Parameter(bias)

    def initialise_(self, seed: int, first_network: int, stream: Stream) -> None:
        """Draws network r as :func:`dmfast.networks.initialise_` does ``first_network + r``."""
        for block in self._blocks:
            _, weight, bias = block.weights
            nn.init.ones_(weight)
            nn.init.zeros_(bias)
        ops.draw_weights_(
            self._drawn,
            self._bounds,
            seed,
            0,
            networks=self.networks,
            first_network=first_network,
            stream=stream,
        )

    @torch.no_grad()
    def copy_to(self, network: ConvNet, number: int) -> None:
        """Gives ``network`` the weights of network ``number`` of the stack."""
        for name, parameter in network.named_parameters():
            parameter.copy_(self._stacked[name][number])

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        embedded = through_blocks(x, self._blocks)
        of_networks = embedded.view(self.networks, -1, embedded.shape[1])
        biases = self._padded_bias[:, : self._weight.shape[1]]
        if x.device.type == "cpu":
            # A batched product's sums may depend on how many there are.
            rows = zip(of_networks, self._weight, biases, strict=True)
            return torch.cat([nn.functional.linear(*row) for row in rows])
        logits = torch.baddbmm(biases[:, None], of_networks, self._weight.transpose(1, 2))
        return logits.flatten(0, 1)
