# SPDX-License-Identifier: MIT
"""The ConvNet family: names, shapes, published state dicts and initialisation."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from dmfast.errors import InputError
from dmfast.networks import ConvNet, get_network, has_batch_norm, initialise_
from dmfast.ops import Stream

SHARED = Path(os.environ.get("DMFAST_SHARED", Path(__file__).parents[2] / "shared"))


def layers(name: str) -> list[str]:
    network = get_network(name, 3, 10, (32, 32))
    assert isinstance(network.features, nn.Sequential)
    return [type(layer).__name__ for layer in network.features]


@pytest.mark.parametrize(
    ("name", "depth", "width", "block"),
    [
        ("ConvNet", 3, 128, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetD1", 1, 128, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetD4", 4, 128, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetW32", 3, 32, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetW256", 3, 256, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetAS", 3, 128, "Conv2d GroupNorm Sigmoid AvgPool2d"),
        ("ConvNetAR", 3, 128, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetAL", 3, 128, "Conv2d GroupNorm LeakyReLU AvgPool2d"),
        ("ConvNetASwish", 3, 128, "Conv2d GroupNorm SiLU AvgPool2d"),
        ("ConvNetNN", 3, 128, "Conv2d ReLU AvgPool2d"),
        ("ConvNetBN", 3, 128, "Conv2d BatchNorm2d ReLU AvgPool2d"),
        ("ConvNetLN", 3, 128, "Conv2d LayerNorm ReLU AvgPool2d"),
        ("ConvNetIN", 3, 128, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetGN", 3, 128, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetNP", 3, 128, "Conv2d GroupNorm ReLU"),
        ("ConvNetMP", 3, 128, "Conv2d GroupNorm ReLU MaxPool2d"),
        ("ConvNetAP", 3, 128, "Conv2d GroupNorm ReLU AvgPool2d"),
        ("ConvNetASwishBN", 3, 128, "Conv2d BatchNorm2d SiLU AvgPool2d"),
        ("ConvNetD4BN", 4, 128, "Conv2d BatchNorm2d ReLU AvgPool2d"),
        ("ConvNetD2W64ASNNMP", 2, 64, "Conv2d Sigmoid MaxPool2d"),
    ],
)
def test_names(name: str, depth: int, width: int, block: str) -> None:
    assert layers(name) == block.split() * depth
    network = get_network(name, 3, 10, (32, 32))
    assert [p.shape[0] for p in network.features.parameters() if p.dim() == 4] == [width] * depth
    assert has_batch_norm(network) == ("BN" in name)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)


def test_parts_mean_what_they_say() -> None:
    def part(name: str, index: int) -> nn.Module:
        features = get_network(name, 3, 10, (32, 32)).features
        assert isinstance(features, nn.Sequential)
        return features[index]

    x = torch.randn(2, 128, 8, 8)
    torch.testing.assert_close(part("ConvNet", 1)(x), nn.InstanceNorm2d(128)(x))
    torch.testing.assert_close(part("ConvNetGN", 1)(x), nn.functional.group_norm(x, 4))
    torch.testing.assert_close(
        part("ConvNetLN", 5)(torch.ones(1, 128, 16, 16)), torch.zeros(1, 128, 16, 16)
    )
    torch.testing.assert_close(part("ConvNetASwish", 2)(x), x * torch.sigmoid(x))
    torch.testing.assert_close(part("ConvNetAL", 2)(x.clone()), torch.maximum(x, 0.01 * x))


@pytest.mark.parametrize(
    "name", ["convnet", "ConvNetBNx", "ConvNetW64D3", "ConvNetD0", "ConvNetAPBN", "VGG13", "", "AS"]
)
def test_unknown_model(name: str) -> None:
    with pytest.raises(InputError, match=r"unknown model .* ConvNet\[D<depth>\]") as raised:
        get_network(name, 3, 10, (32, 32))
    assert repr(name) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "channels", "size", "features"),
    [
        ("ConvNet", 3, (32, 32), 128 * 4 * 4),
        ("ConvNetD4", 3, (64, 64), 128 * 4 * 4),
        ("ConvNet", 1, (28, 28), 128 * 4 * 4),  # padded to 32
        ("ConvNet", 1, (8, 8), 128),  # 12, 6, 3, 1
        ("ConvNet", 3, (30, 41), 128 * 3 * 5),
        ("ConvNetNP", 1, (8, 8), 128 * 12 * 12),
        ("ConvNetLN", 1, (9, 28), 128 * 1 * 4),
    ],
)
def test_embedding_has_the_size_of_the_feature_map(
    name: str, channels: int, size: tuple[int, int], features: int
) -> None:
    network = get_network(name, channels, 5, size)
    x = torch.randn(3, channels, *size)
    embedding = network.embed(x)
    assert embedding.shape == (3, features)
    torch.testing.assert_close(network.features(x).reshape(3, -1), embedding)
    torch.testing.assert_close(network(x), network.classifier(embedding))


@pytest.mark.parametrize(
    ("name", "channels", "size", "words"),
    [
        ("ConvNetD4", 1, (8, 8), "8x8 .*depth 4.*D3"),
        ("ConvNet", 3, (4, 64), "4x64 .*depth 3.*D2"),
        ("ConvNetD2", 3, (1, 1), "1x1 .*depth 2.*NP"),
    ],
)
def test_image_too_small(name: str, channels: int, size: tuple[int, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        get_network(name, channels, 10, size)


def test_width_that_does_not_split_into_groups() -> None:
    with pytest.raises(InputError, match="W30"):
        get_network("ConvNetW30GN", 3, 10, (32, 32))


def test_published_state_dict_loads() -> None:
    path = SHARED / "golden" / "dm_steps.npz"
    if not path.exists():
        pytest.skip("the test vectors of the published code are not here")
    with np.load(path) as golden:
        state = {
            key.removeprefix("weights0."): torch.from_numpy(golden[key])
            for key in golden
            if key.startswith("weights0.")
        }
    network = get_network("ConvNetW32", 3, 3, (32, 32))
    network.load_state_dict(state)
    assert list(network.state_dict()) == list(state)


def drawn(name: str, seed: int, step: int = 0, **keywords: int) -> list[Tensor]:
    network = get_network(name, 3, 10, (32, 32))
    initialise_(network, seed, step, **keywords)  # type: ignore[arg-type]
    return [parameter.detach() for parameter in network.parameters()]


def test_weights_are_a_function_of_seed_step_stream_and_network() -> None:
    first = drawn("ConvNetW32", 1)
    for parameters in (
        drawn("ConvNetW32", 1),
        list(get_network("ConvNetW32", 3, 10, (32, 32), seed=1).parameters()),
    ):
        assert all(torch.equal(a, b) for a, b in zip(first, parameters, strict=True))
    for other in (
        drawn("ConvNetW32", 2),
        drawn("ConvNetW32", 1, step=1),
        drawn("ConvNetW32", 1, network_index=1),
        drawn("ConvNetW32", 1, stream=Stream.EVALUATION_WEIGHTS),
    ):
        assert not any(
            torch.equal(a, b) for a, b in zip(first, other, strict=True) if a.unique().numel() > 1
        )


def test_memory_format_does_not_change_the_weights() -> None:
    network = get_network("ConvNetW32", 3, 10, (32, 32)).to(memory_format=torch.channels_last)
    initialise_(network, 1, 0)
    parameters = zip(network.parameters(), drawn("ConvNetW32", 1), strict=True)
    assert all(torch.equal(a, b) for a, b in parameters)
    weight = next(network.parameters())
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_a_seed_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    get_network("ConvNetBN", 3, 10, (32, 32), seed=3)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["ConvNetBN", "ConvNetLN", "ConvNetNN"])
def test_distribution_is_that_of_torch(name: str) -> None:
    torch.manual_seed(0)
    theirs = get_network(name, 3, 10, (32, 32)).state_dict()
    ours = get_network(name, 3, 10, (32, 32), seed=0).state_dict()
    assert list(ours) == list(theirs)
    for key, tensor in ours.items():
        expected = theirs[key]
        assert tensor.dtype == expected.dtype
        if expected.unique().numel() <= 1:  # norms and running statistics
            assert torch.equal(tensor, expected), key
            continue
        # Bounds, mean and spread of a uniform distribution; 5 standard errors of each.
        n = tensor.numel()
        bound = theirs[key.replace("bias", "weight")][0].numel() ** -0.5
        for values in (tensor, expected):
            assert values.abs().max() <= bound, key
            assert values.abs().max() > bound * (1 - 10 / n), key
            assert abs(values.mean()) < 5 * bound / (3 * n) ** 0.5, key
            assert abs(values.square().mean() - bound**2 / 3) < 5 * 0.3 * bound**2 / n**0.5, key


def test_initialise_undoes_training() -> None:
    network = get_network("ConvNetW32BN", 3, 10, (32, 32), seed=1)
    fresh = {key: value.clone() for key, value in network.state_dict().items()}
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    network(torch.randn(4, 3, 32, 32)).square().sum().backward()
    optimizer.step()
    initialise_(network, 1, 0)
    assert all(torch.equal(fresh[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize("name", ["ConvNetW32", "ConvNetW32ASwishBN", "ConvNetW32ALGNMP"])
def test_works_under_channels_last_autocast_and_functional_call(name: str) -> None:
    network = get_network(name, 3, 10, (32, 32), seed=1)
    x = torch.randn(4, 3, 32, 32)
    embedding, logits = network.embed(x), network(x)

    other = get_network(name, 3, 10, (32, 32), seed=2)
    weights = dict(network.named_parameters())
    called = torch.func.functional_call(other, weights, (x,))
    torch.testing.assert_close(called, logits)
    gradients = torch.autograd.grad(called.square().sum(), list(weights.values()))
    assert all(gradient.isfinite().all() for gradient in gradients)

    network.to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    torch.testing.assert_close(network.embed(x), embedding)
    with torch.autocast("cpu", torch.bfloat16):
        low = network(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), logits, rtol=0.1, atol=0.1)


# ---- The fused blocks --------------------------------------------------------------------------


def small() -> ConvNet:
    network = get_network("ConvNetD2W16", 3, 10, (12, 12), seed=0)
    assert isinstance(network, ConvNet)
    return network


def is_fused(network: ConvNet) -> bool:
    return network.fused_blocks(torch.device("cpu")) is not None


@pytest.mark.skipif(not is_fused(small()), reason="DMFAST_CPU asks for torch's own layers")
def test_fused_blocks_give_what_the_layers_do() -> None:
    network = small()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.manual_seed(0))
    x = torch.randn(5, 3, 12, 12, generator=torch.manual_seed(1), requires_grad=True)
    results = []
    for fused in (True, False):
        network.fused = fused
        assert is_fused(network) == fused
        logits = network(x)
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(5))
        results.append([logits, *torch.autograd.grad(loss, [x, *network.parameters()])])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "another norm": lambda f: f.__setitem__(1, nn.SyncBatchNorm(16)),
    "norms of two kinds": lambda f: f.__setitem__(1, nn.InstanceNorm2d(16, affine=True)),
    "fewer groups": lambda f: f.__setitem__(1, nn.GroupNorm(4, 16)),
    "another eps": lambda f: setattr(f[5], "eps", 1e-3),
    "reflection": lambda f: setattr(f[0], "padding_mode", "reflect"),
    "a stride": lambda f: setattr(f[4], "stride", (2, 2)),
    "no bias": lambda f: setattr(f[0], "bias", None),
    "another pool": lambda f: f.__setitem__(3, nn.AvgPool2d(3, stride=2, padding=1)),
    "no pool": lambda f: f.__delitem__(7),
    "a hook": lambda f: f[2].register_forward_hook(lambda *_: None),
    "a hook before": lambda f: f[0].register_forward_pre_hook(lambda *_: None),
    "a hook on all": lambda f: f.register_forward_hook(lambda *_: None),
    "pruning": lambda f: prune.l1_unstructured(f[4], "weight", amount=0.5),
    "a parametrisation": lambda f: parametrizations.weight_norm(f[4]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_other_layers_are_not_fused(change: str) -> None:
    network = small()
    CHANGES[change](network.features)
    assert not is_fused(network)
    x = torch.randn(3, 3, 12, 12)
    assert torch.equal(network.embed(x), network.features(x).flatten(1))


def test_forward_mode_goes_by_the_layers() -> None:
    network = small().requires_grad_(False)
    x, tangent = torch.randn(2, 2, 3, 12, 12).unbind()
    (_, derivative) = torch.func.jvp(network.embed, (x,), (tangent,))
    network.fused = False
    assert torch.equal(derivative, torch.func.jvp(network.embed, (x,), (tangent,))[1])
    assert derivative.any()


def test_a_second_derivative_names_the_way() -> None:
    network, x = small(), torch.randn(2, 3, 12, 12, requires_grad=True)
    if is_fused(network):
        (gradient,) = torch.autograd.grad(network(x).sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='precision="direct"'):
            gradient.square().sum().backward()
    network.fused = False
    (gradient,) = torch.autograd.grad(network(x).square().sum(), x, create_graph=True)
    gradient.square().sum().backward()


# ---- batch norm by fused blocks


def batch_norm_pair(channels: int) -> tuple[ConvNet, ConvNet]:
    """The same network by the fused blocks and by torch's layers."""
    made = []
    for fused in (True, False):
        network = get_network("ConvNetD2W16BN", channels, 4, (12, 10), seed=1)
        assert isinstance(network, ConvNet)
        network.fused = fused
        made.append(network)
    assert made[0].batch_norm_blocks(torch.device("cpu")) is not None
    assert made[1].batch_norm_blocks(torch.device("cpu")) is None
    return made[0], made[1]


@pytest.mark.parametrize("channels", [1, 3])
def test_fused_batch_norm_trains_as_torchs_does(channels: int) -> None:
    """Logits, gradients and running statistics, in three steps of training and then in testing."""
    generator = torch.Generator().manual_seed(0)
    pair = batch_norm_pair(channels)
    optimizers = [torch.optim.SGD(network.parameters(), 0.1) for network in pair]
    for _ in range(3):
        images = torch.randn(6, channels, 12, 10, generator=generator)
        results = []
        for network, optimizer in zip(pair, optimizers, strict=True):
            network.train()
            x = images.clone().requires_grad_()
            logits = network(x)
            optimizer.zero_grad()
            logits.square().mean().backward()
            optimizer.step()
            results.append([logits, x.grad])
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    fused, layers = (network.state_dict() for network in pair)
    for name, value in layers.items():
        torch.testing.assert_close(fused[name], value, rtol=1e-4, atol=1e-5)
    assert fused["features.1.num_batches_tracked"] == 3
    images = torch.randn(5, channels, 12, 10, generator=generator)
    with torch.no_grad():
        tested = [network.eval()(images) for network in pair]
    torch.testing.assert_close(*tested, rtol=1e-4, atol=1e-4)
    for name, value in pair[0].state_dict().items():
        assert torch.equal(value, fused[name])


@pytest.mark.parametrize("channels", [1, 3])
def test_gradients_by_running_statistics_are_torchs(channels: int) -> None:
    """They do not cancel the biases of the convolutions, as those of a batch do."""
    generator = torch.Generator().manual_seed(0)
    pair = batch_norm_pair(channels)
    state = {
        name: 0.5 + torch.rand(value.shape, generator=generator)
        for name, value in pair[0].state_dict().items()
        if value.is_floating_point() and "features" in name
    }
    images = torch.randn(5, channels, 12, 10, generator=generator)
    gradients = []
    for network in pair:
        network.load_state_dict(state, strict=False)
        network.eval()(images).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    for name, expected in gradients[1].items():
        assert expected.any()
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_batch_norm_of_a_network_in_half_precision(dtype: torch.dtype) -> None:
    pair = [network.to(dtype) for network in batch_norm_pair(3)]
    images = torch.randn(6, 3, 12, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert pair[0].batch_norm_blocks(images.device, dtype) is not None
    for _ in range(2):
        trained = [network.train()(images) for network in pair]
        torch.testing.assert_close(*trained, rtol=0, atol=0.1)
    for name, value in pair[1].state_dict().items():
        assert pair[0].state_dict()[name].dtype == value.dtype
        torch.testing.assert_close(pair[0].state_dict()[name], value, rtol=0.02, atol=0.02)
    torch.testing.assert_close(*(network.eval()(images) for network in pair), rtol=0, atol=0.1)


def test_batch_norms_that_track_otherwise_go_by_torch() -> None:
    for change in ("momentum", "track_running_stats"):
        network, _ = batch_norm_pair(3)
        setattr(network.features[1], change, None if change == "momentum" else False)
        assert network.batch_norm_blocks(torch.device("cpu")) is None
