# SPDX-License-Identifier: MIT
"""The published networks beside the ConvNets: their layers, and that everything works on them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from recording import Tape
from torch import Tensor, nn
from torch.nn import functional as F

from dmfast import cli, condense, evaluate, networks, roofline
from dmfast.condense import CondenseConfig
from dmfast.data import ImageData, load
from dmfast.errors import InputError
from dmfast.evaluate import EvaluateConfig
from dmfast.loop import Loop
from dmfast.matching import Matcher, initial_images
from dmfast.networks import ZOO, get_network, has_batch_norm, initialise_
from dmfast.ops import Stream
from dmfast.presets import caution, preset
from dmfast.training import Protocol, train

RATES = Path(__file__).parents[1] / "benchmarks/results/rates-cpu.json"
#: What the published state dicts hold for images of 3x32x32 in 10 classes, in their order: the
#: shape of a weight, with a bias of as many elements as it has rows; the channels of a norm; or,
#: after a dash, a weight without a bias.
STATES = {
    "MLP": "fc_1 128x3072, fc_2 128x128, fc_3 10x128",
    "LeNet": "features.0 6x3x5x5, features.3 16x6x5x5, fc_1 120x400, fc_2 84x120, fc_3 10x84",
    "AlexNet": """
        features.0 128x3x5x5, features.3 192x128x5x5, features.6 256x192x3x3,
        features.8 192x256x3x3, features.10 192x192x3x3, fc 10x3072
        """,
    "AlexNetBN": """
        features.0 128x3x5x5, features.1 norm 128, features.4 192x128x5x5, features.5 norm 192,
        features.8 256x192x3x3, features.9 norm 256, features.11 192x256x3x3, features.12 norm 192,
        features.14 192x192x3x3, features.15 norm 192, fc 10x3072
        """,
    "VGG11": """
        features.0 64x3x3x3, features.1 norm 64, features.4 128x64x3x3, features.5 norm 128,
        features.8 256x128x3x3, features.9 norm 256, features.11 256x256x3x3, features.12 norm 256,
        features.15 512x256x3x3, features.16 norm 512, features.18 512x512x3x3,
        features.19 norm 512, features.22 512x512x3x3, features.23 norm 512,
        features.25 512x512x3x3, features.26 norm 512, classifier 10x512
        """,
    "ResNet18": """
        conv1 -64x3x3x3, bn1 norm 64,
        layer1.0.conv1 -64x64x3x3, layer1.0.bn1 norm 64,
        layer1.0.conv2 -64x64x3x3, layer1.0.bn2 norm 64,
        layer1.1.conv1 -64x64x3x3, layer1.1.bn1 norm 64,
        layer1.1.conv2 -64x64x3x3, layer1.1.bn2 norm 64,
        layer2.0.conv1 -128x64x3x3, layer2.0.bn1 norm 128,
        layer2.0.conv2 -128x128x3x3, layer2.0.bn2 norm 128,
        layer2.0.shortcut.0 -128x64x1x1, layer2.0.shortcut.1 norm 128,
        layer2.1.conv1 -128x128x3x3, layer2.1.bn1 norm 128,
        layer2.1.conv2 -128x128x3x3, layer2.1.bn2 norm 128,
        layer3.0.conv1 -256x128x3x3, layer3.0.bn1 norm 256,
        layer3.0.conv2 -256x256x3x3, layer3.0.bn2 norm 256,
        layer3.0.shortcut.0 -256x128x1x1, layer3.0.shortcut.1 norm 256,
        layer3.1.conv1 -256x256x3x3, layer3.1.bn1 norm 256,
        layer3.1.conv2 -256x256x3x3, layer3.1.bn2 norm 256,
        layer4.0.conv1 -512x256x3x3, layer4.0.bn1 norm 512,
        layer4.0.conv2 -512x512x3x3, layer4.0.bn2 norm 512,
        layer4.0.shortcut.0 -512x256x1x1, layer4.0.shortcut.1 norm 512,
        layer4.1.conv1 -512x512x3x3, layer4.1.bn1 norm 512,
        layer4.1.conv2 -512x512x3x3, layer4.1.bn2 norm 512,
        classifier 10x512
        """,
}
STATES["VGG11BN"] = STATES["VGG11"]
STATES["ResNet18BN"] = STATES["ResNet18"]
# The pooling takes a place in the shortcut, and the whole last map is classified.
STATES["ResNet18_AP"] = STATES["ResNet18"].replace("shortcut.1", "shortcut.2")
STATES["ResNet18_AP"] = STATES["ResNet18_AP"].replace("10x512", "10x8192")
STATES["ResNet18BN_AP"] = STATES["ResNet18_AP"]
NAMES = tuple(STATES)
CPU = torch.device("cpu")


def shapes(name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for entry in re.sub(r"\s+", " ", STATES[name]).strip().split(","):
        layer, shape = entry.strip().rsplit(" ", 1)
        of_norm = layer.endswith(" norm")
        layer = layer.removesuffix(" norm")
        sides = tuple(int(side) for side in shape.lstrip("-").split("x"))
        yield f"{layer}.weight", sides
        if not shape.startswith("-"):
            yield f"{layer}.bias", sides[:1]
        if of_norm and "BN" in name:
            yield f"{layer}.running_mean", sides
            yield f"{layer}.running_var", sides
            yield f"{layer}.num_batches_tracked", ()


@pytest.mark.parametrize("name", NAMES)
def test_a_published_state_dict_loads(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    state = {
        key: torch.zeros(shape, dtype=torch.int64)
        if key.endswith("tracked")
        else torch.rand(shape, generator=generator)
        for key, shape in shapes(name)
    }
    network = get_network(name, 3, 10, (32, 32), seed=0)
    assert list(network.state_dict()) == list(state)
    network.load_state_dict(state)
    assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
    assert has_batch_norm(network) == ("BN" in name)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("LeNet", "C0.RM C0.RM"),
        ("AlexNet", "C2.RM C2.RM C1.R C1.R C1.RM"),
        ("AlexNetBN", "C2.BRM C2.BRM C1.BR C1.BR C1.BRM"),
        ("VGG11", "C1.IRM C1.IRM C1.IR C1.IRM C1.IR C1.IRM C1.IR C1.IRM"),
        ("VGG11BN", "C1.BRM C1.BRM C1.BR C1.BRM C1.BR C1.BRM C1.BR C1.BRM"),
    ],
)
@pytest.mark.parametrize("channels", [3, 1])
def test_layers(name: str, layers: str, channels: int) -> None:
    def letter(layer: nn.Module) -> str:
        if isinstance(layer, nn.Conv2d):
            assert layer.stride == (1, 1)
            return f" C{layer.padding[0]}."
        if isinstance(layer, nn.GroupNorm):
            assert layer.num_groups == layer.num_channels
            return "I"
        if isinstance(layer, nn.MaxPool2d):
            assert (layer.kernel_size, layer.stride, layer.padding) == (2, 2, 0)
            return "M"
        return {nn.BatchNorm2d: "B", nn.ReLU: "R"}[type(layer)]

    if channels == 1:  # is padded by 2 more: LeNet's 28x28 stays, in the others it becomes 32x32
        layers = layers[0] + str(int(layers[1]) + 2) + layers[2:]
    features = get_network(name, channels, 10, (28, 28) if channels == 1 else (32, 32)).features
    assert "".join(map(letter, features)).strip() == layers


def residual(state: dict[str, Tensor], x: Tensor, average: bool) -> Tensor:
    """The embedding of a ResNet18 with instance norm, from its published state dict."""

    def normalised(x: Tensor, layer: str) -> Tensor:
        return F.group_norm(x, x.shape[1], state[f"{layer}.weight"], state[f"{layer}.bias"])

    def convolved(x: Tensor, layer: str, stride: int, padding: int) -> Tensor:
        weight = state[f"{layer}.weight"]
        if average and stride == 2:
            return F.conv2d(x, weight, padding=padding)
        return F.conv2d(x, weight, stride=stride, padding=padding)

    def halved(x: Tensor, stride: int) -> Tensor:
        return F.avg_pool2d(x, 2) if average and stride == 2 else x

    x = normalised(convolved(x, "conv1", 1, 1), "bn1").relu()
    for number in (1, 2, 3, 4):
        for block in (0, 1):
            at, stride = f"layer{number}.{block}", 2 if number > 1 and block == 0 else 1
            y = normalised(convolved(x, f"{at}.conv1", stride, 1), f"{at}.bn1").relu()
            y = normalised(convolved(halved(y, stride), f"{at}.conv2", 1, 1), f"{at}.bn2")
            if stride == 2:
                x = halved(convolved(x, f"{at}.shortcut.0", 2, 0), 2)
                x = normalised(x, f"{at}.shortcut.{2 if average else 1}")
            x = (x + y).relu()
    return x.flatten(1) if average else F.avg_pool2d(x, 4).flatten(1)


@pytest.mark.parametrize("name", ["ResNet18", "ResNet18_AP"])
@pytest.mark.parametrize(("channels", "size"), [(3, (32, 32)), (1, (28, 28)), (3, (25, 38))])
def test_residual_networks(name: str, channels: int, size: tuple[int, int]) -> None:
    network = get_network(name, channels, 10, size, seed=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():  # norms, too, are to be told from the identity
            parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
        x = torch.randn(2, channels, *size, generator=generator)
        expected = residual(network.state_dict(), x, name.endswith("AP"))
        torch.testing.assert_close(network.embed(x), expected)


def test_hidden_layers() -> None:
    for name in ("MLP", "LeNet"):
        network = get_network(name, 1, 10, (28, 28), seed=1)
        x = torch.randn(2, 1, 28, 28)
        hidden = network.features(x).flatten(1) if name == "LeNet" else x.flatten(1)
        for layer in (network.fc_1, network.fc_2):
            hidden = (hidden @ layer.weight.T + layer.bias).clamp(min=0)
        torch.testing.assert_close(network.embed(x), hidden)


@pytest.mark.parametrize(
    ("channels", "size", "features"),
    [
        (3, (32, 32), (128, 84, 3072, 512, 512, 8192)),
        (1, (28, 28), (128, 84, 3072, 512, 512, 512 * 9)),
        (3, (64, 64), (128, 84, 192 * 64, 2048, 2048, 512 * 64)),
        (3, (39, 70), (128, 84, 192 * 4 * 8, 512 * 2, 512 * 2, 512 * 4 * 8)),
    ],
)
def test_the_embedding_is_what_the_classifier_sees(
    channels: int, size: tuple[int, int], features: tuple[int, ...]
) -> None:
    names = ("MLP", "LeNet", "AlexNetBN", "VGG11BN", "ResNet18BN", "ResNet18BN_AP")
    for name, width in zip(names, features, strict=True):
        network = get_network(name, channels, 7, size, seed=0).eval()
        seen: list[Tensor] = []
        last = getattr(network, network.last)
        last.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0]))
        with torch.no_grad():
            x = torch.randn(1, channels, *size)
            assert network(x).shape == (1, 7)
            embedding = network.embed(x)
            assert embedding.shape == (1, network.embedding_size) == (1, width), name
            torch.testing.assert_close(embedding, seen[0])
            if name in ("AlexNetBN", "VGG11BN"):
                torch.testing.assert_close(embedding, network.features(x).flatten(1))


@pytest.mark.parametrize(
    ("name", "channels", "smallest"),
    [
        ("LeNet", 3, 16),
        ("LeNet", 1, 12),
        ("AlexNetBN", 3, 8),
        ("AlexNet", 1, 4),
        ("VGG11", 3, 32),
        ("VGG11BN", 1, 28),
        ("ResNet18", 3, 25),
        ("ResNet18BN", 1, 25),
        ("ResNet18_AP", 3, 16),  # of a single pixel an instance norm leaves nothing
        ("ResNet18BN_AP", 3, 8),
    ],
)
def test_images_too_small(name: str, channels: int, smallest: int) -> None:
    words = f"64x{smallest - 1} are too small for {name}: .*{smallest}x{smallest} or larger"
    if name != "ResNet18_AP":
        with pytest.raises(InputError, match=words):
            get_network(name, channels, 10, (64, smallest - 1), seed=0)
    with pytest.raises(InputError, match=f"{smallest}x{smallest} or larger"):
        get_network(name, channels, 10, (smallest - 1, smallest - 1))
    network = get_network(name, channels, 10, (smallest, smallest), seed=0).eval()
    with torch.no_grad():
        logits = network(torch.randn(2, channels, smallest, smallest))
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_drawn(name: str) -> None:
    def drawn(seed: int = 1, step: int = 0, **options: int) -> list[Tensor]:
        initialise_(network, seed, step, **options)
        return [parameter.detach().clone() for parameter in network.parameters()]

    before = torch.get_rng_state()
    network = get_network(name, 3, 10, (32, 32), seed=1)
    assert torch.equal(before, torch.get_rng_state())
    first = [parameter.detach().clone() for parameter in network.parameters()]
    others = [
        drawn(seed=2),
        drawn(step=1),
        drawn(network_index=1),
        drawn(stream=Stream.EVALUATION_WEIGHTS),
    ]
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.fill_(torch.nan)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn(), strict=True))
    layers = dict(network.named_modules())
    for number, (key, _) in enumerate(network.named_parameters()):
        layer = layers[key.rpartition(".")[0]]
        values = first[number]
        if not isinstance(layer, nn.Conv2d | nn.Linear):  # a norm
            assert torch.equal(values, torch.full_like(values, float(key.endswith("weight"))))
            continue
        # Uniform within 1 / sqrt(fan in): the extremes, and the mean square within 5 deviations.
        bound, count = layer.weight[0].numel() ** -0.5, values.numel()
        assert bound * (1 - 12 / count) < values.abs().max() <= bound
        assert abs(values.square().mean() * 3 / bound**2 - 1) < 5 * 0.9 / count**0.5
        assert not any(torch.equal(values, other[number]) for other in others)


# ---- condensing and evaluating -------------------------------------------------------------------


def write_set(path: Path, channels: int, size: tuple[int, int]) -> Path:
    """Two classes of four images, one darker than the other."""
    generator = np.random.default_rng(0)
    labels = np.tile([0, 1], 4)
    images = generator.integers(0, 100, (8, *size, channels)) + 150 * labels[:, None, None, None]
    arrays = {"train_images": images.astype(np.uint8), "train_labels": labels}
    np.savez(path, **arrays, test_images=arrays["train_images"], test_labels=labels)
    return path


def matching_losses(data: ImageData, name: str) -> list[float]:
    """Those of iterations on the draws of the first."""
    network = get_network(name, data.channels, data.classes, data.size, seed=0)
    images = initial_images(data, 1, "noise", 0)
    options = {"batch_real": 4, "strategy": "color_crop", "seed": 0, "momentum": 0.0}
    loss, gradient = Matcher(data, network, images, lr=1.0, device=CPU, **options).gradient(0)
    # The networks' losses are orders of magnitude apart: a share of the way to nought.
    lr = float(0.3 * loss / gradient.square().sum())
    matcher = Matcher(data, network, images, lr=lr, device=CPU, **options)
    return [float(matcher.step(0)) for _ in range(3)]


def training_losses(data: ImageData, name: str) -> list[float]:
    """Those of a network that is trained on all images at once, epoch by epoch."""
    network = get_network(name, data.channels, data.classes, data.size, seed=0)
    labels, losses = data.train_labels, []
    train(
        network,
        data.normalise(data.train_images),
        labels,
        epochs=3,
        seed=0,
        protocol=Protocol(learning_rate=0.001),
        on_batch=lambda rows, logits: losses.append(float(F.cross_entropy(logits, labels[rows]))),
    )
    return losses


@pytest.mark.parametrize(("channels", "side"), [(3, 32), (1, 28)])
@pytest.mark.parametrize("name", [*NAMES, "ConvNet", "ConvNetBN"])
def test_condenses_and_evaluates(name: str, channels: int, side: int, tmp_path: Path) -> None:
    path = str(write_set(tmp_path / "set.npz", channels, (side, side)))
    data = load(path, cache=False)
    first, *_, last = matching_losses(data, name)
    assert 0 < last < 0.9 * first
    first, *_, last = training_losses(data, name)
    assert last < first

    out = str(tmp_path / "run")
    settings = {"dataset": path, "device": "cpu", "out": out, "cache": False}
    synthetic = condense.run(
        CondenseConfig(model=name, ipc=1, iterations=1, batch_real=2, **settings)
    )
    assert synthetic.images.shape == (2, channels, side, side)
    assert synthetic.config["model"] == name
    start = initial_images(data, 1, "real", 0)
    assert synthetic.images.isfinite().all()
    assert not torch.equal(synthetic.images, start)
    result = evaluate.run(
        EvaluateConfig(set=out, dataset=path, networks=1, epochs=1, device="cpu", cache=False)
    )
    assert 0 <= result.accuracies[0] <= 100
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["model"] == name


@pytest.mark.parametrize("name", ["MLP", "LeNet", "AlexNetBN", "VGG11", "ResNet18BN"])
def test_gradient_matching(name: str, tmp_path: Path) -> None:
    path = str(write_set(tmp_path / "set.npz", 3, (32, 32)))
    synthetic = condense.run(
        CondenseConfig(
            dataset=path,
            method="dsa",
            model=name,
            ipc=1,
            iterations=1,
            batch_real=2,
            outer_loops=2,
            inner_loops=1,
            device="cpu",
            out=str(tmp_path / "run"),
            cache=False,
        )
    )
    assert synthetic.images.isfinite().all()
    assert not torch.equal(synthetic.images, initial_images(load(path, cache=False), 1, "real", 0))


def losses_of_a_loop(data: ImageData, name: str, recorder: Tape | None) -> list[float]:
    network = get_network(name, data.channels, data.classes, data.size, seed=0)
    options = {"batch_real": 4, "strategy": "crop", "seed": 0, "lr": 0.01, "momentum": 0.5}
    images = initial_images(data, 1, "noise", 0)
    matcher = Matcher(data, network, images, device=CPU, **options)
    with Loop(matcher, recorder=recorder, required=recorder is not None) as loop:
        for _ in range(4):
            loop.advance()
        return loop.read()().losses


@pytest.mark.parametrize("name", ["MLP", "LeNet", "AlexNetBN", "VGG11BN", "ResNet18_AP"])
def test_an_iteration_can_be_recorded(name: str, tmp_path: Path) -> None:
    side = 32 if name == "VGG11BN" else 16
    data = load(str(write_set(tmp_path / "set.npz", 3, (side, side))), cache=False)
    tape = Tape()
    losses = losses_of_a_loop(data, name, tape)
    assert losses == losses_of_a_loop(data, name, None)
    assert tape.replayed == 2


@pytest.mark.cuda
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name: str, tmp_path: Path) -> None:
    path = str(write_set(tmp_path / "set.npz", 3, (32, 32)))
    config = CondenseConfig(
        dataset=path,
        model=name,
        ipc=1,
        iterations=8,
        batch_real=4,
        precision="float32",
        device="cuda",
        graph="required",
        cache=False,
    )
    runs = [condense.run(replace(config, out=str(tmp_path / folder))) for folder in ("a", "b")]
    assert torch.equal(runs[0].images, runs[1].images)
    assert runs[0].images.isfinite().all()


# ---- presets -------------------------------------------------------------------------------------


def test_rates_of_networks() -> None:
    for name, rate in (("AlexNet", 10.0), ("VGG11BN", 0.1), ("ResNet18BN_AP", 0.01)):
        for other in ({}, {"name": "fast"}, {"ipc": 100}, {"dataset": "digits"}):
            found = preset(**{"dataset": "cifar10", "ipc": 10, "model": name} | other)
            assert (found.model, found.lr_img) == (name, rate)
    # The rates that the paper or a measurement raises are a ConvNet's.
    for raised in (("digits", 1), ("cifar10", 100), ("cifar10", 10, "fast")):
        assert preset(*raised, model="ConvNetBN").lr_img == preset(*raised).lr_img > 1
        for name in ("MLP", "LeNet", "ConvNets/ResNet18.py:net"):
            assert preset(*raised, model=name).lr_img == 1
    assert preset("cifar10", 10, method="dsa", model="ResNet18_AP").lr_img == 0.1
    assert preset("cifar10", 10).model == "ConvNet"


def test_the_rates_lower_the_loss_about_as_far_as_any_that_was_measured() -> None:
    for row in json.loads(RATES.read_text())["rows"]:
        rate = preset("cifar10", row["ipc"], model=row["network"]).lr_img
        shares = row["shares"]
        assert shares[f"{rate:g}"] < min(1, min(shares.values()) + 0.07), row["network"]


def test_caution_where_a_convnet_is_better(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = caution("cifar10", "ResNet18BN_AP")
    assert words is not None
    assert "condense on ConvNetBN, and evaluate the set with --model ResNet18BN_AP" in words
    assert "12 %" in words
    assert "condense on ConvNetD4," in (caution("tiny-imagenet", "VGG11") or "")
    assert "12 %" not in (caution("cifar10", "AlexNetBN") or "12 %")
    assert caution("cifar10", "ResNet18BN", "dsa") is None
    for name in ("ConvNet", "ConvNetBN", "MLP", "LeNet", "ResNet18/nets.py:net"):
        assert caution("cifar10", name) is None

    path = str(write_set(tmp_path / "set.npz", 3, (8, 8)))
    options = {"ipc": 1, "iterations": 1, "device": "cpu", "dataset": path, "batch_real": 2}
    options["cache"] = False
    condense.run(CondenseConfig(model="AlexNet", out=str(tmp_path / "a"), **options))
    assert "sets condensed on AlexNet are known to be worse" in capsys.readouterr().err
    condense.run(CondenseConfig(model="MLP", out=str(tmp_path / "b"), **options))
    assert capsys.readouterr().err == ""


# ---- python -m dmfast.networks -------------------------------------------------------------------


def command(*arguments: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dmfast.networks", *arguments])
        with pytest.raises(SystemExit) as exit:
            cli.main("dmfast.networks", networks._main)
    return exit.value.code


def test_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--json", str(tmp_path / "made" / "table.json")) == 0
    out = capsys.readouterr().out
    assert "a multiply-add is 2" in out
    assert re.search(r"\nResNet18 +11,173,962 +512 +1,110\.85\n", out)
    content = json.loads((tmp_path / "made" / "table.json").read_text())
    assert (content["images"], content["classes"]) == ("3x32x32", 10)
    rows = {row["name"]: row for row in content["networks"]}
    assert tuple(rows) == ZOO
    for name in NAMES:  # an independent count of the parameters
        keys = [s for k, s in shapes(name) if not re.search("running|tracked", k)]
        assert rows[name]["parameters"] == sum(int(np.prod(shape)) for shape in keys)
    assert rows["MLP"]["flop"] == 2 * (3072 * 128 + 128 * 128 + 128 * 10)
    linear = 2 * 2048 * 10
    assert rows["ConvNet"]["flop"] == roofline.Setting().forward_flop + linear
    assert rows["ConvNetNP"]["embedding"] == 128 * 32 * 32


def test_the_table_of_other_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert command("--images", "1x28x28", "--classes", "5", "LeNet", "ConvNetD4BN") == 0
    lines = capsys.readouterr().out.splitlines()
    # 28, 14, 10, 5 pixels a side.
    flop = 2 * (784 * 6 * 25 + 100 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 5)
    assert lines[2].split() == ["LeNet", "61,281", "84", f"{flop / 1e6:.2f}"]
    assert len(lines) == 4
    assert command("--images", "1x8x8") == 0
    printed = capsys.readouterr()
    assert "note: VGG11 is left out: images of 8x8 are too small" in printed.err
    assert "VGG11 " not in printed.out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--images", "32x32"), "--images: a shape is CxHxW"),
        (("--classes", "0"), "--classes must be 1 or more"),
        (("VGG11", "--images", "3x8x8"), "too small for VGG11"),
        (("VGG12",), "unknown model 'VGG12'"),
        (("--json", "/dev/null/x"), "/dev/null"),
    ],
)
def test_unusable_options_of_the_table(
    arguments: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(*arguments) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert words in error[0]
