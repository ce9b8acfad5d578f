# SPDX-License-Identifier: MIT
"""``--model path/to/file.py:function``: networks of the user's own."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recording import Tape
from safetensors.torch import load_file
from test_zoo import write_set
from torch import Tensor, nn

from dmfast import cli, condense, coreset, evaluate, profile
from dmfast._own import OwnNetwork, model_file, short_name
from dmfast.condense import CondenseConfig
from dmfast.coreset import CoresetConfig
from dmfast.data import load
from dmfast.errors import InputError
from dmfast.evaluate import EvaluateConfig
from dmfast.loop import Loop
from dmfast.matching import Matcher, initial_images
from dmfast.networks import get_network, has_batch_norm, initialise_, table
from dmfast.ops import Stream
from dmfast.profile import ProfileConfig

FILE = Path(__file__).with_name("own_networks.py")
GOOD = {  # and the size of the embedding of 3x8x8
    "plain": 256,
    "plain@0": 256,
    "plain@2": 256,
    "Embedding": 6,
    "dropout": 8,
    "own_layers": 8,
    "own_layers@2": 8,
    "whole": 192,
    "attention": 8,
    "lazy": 144,
    "mixing": 8,
    "tied": 8,
}
CPU = torch.device("cpu")
SETTINGS = {"ipc": 2, "batch_real": 4, "device": "cpu", "cache": False, "seed": 3}


def own(function: str, seed: int | None = 0) -> OwnNetwork:
    network = get_network(f"{FILE}:{function}", 3, 2, (8, 8), seed)
    assert isinstance(network, OwnNetwork)
    return network


def weights(network: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in network.parameters()]


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(write_set(tmp_path / "set.npz", 3, (8, 8)))


@pytest.mark.parametrize("function", GOOD)
def test_a_network_of_ones_own(function: str, images: Tensor) -> None:
    network = own(function)
    embedding, logits = network.embed(images), network(images)
    assert embedding.shape == (5, GOOD[function])
    assert network.embedding_size == GOOD[function]
    assert logits.shape == (5, 2)
    # A running mean that has the batch in it is no other's than a batch norm.
    mixes = ("lazy", "mixing", "own_layers", "own_layers@2")
    assert has_batch_norm(network) == (function in mixes)
    assert network.draws == (function == "dropout")


def test_what_is_matched(images: Tensor) -> None:
    def layers(function: str) -> nn.Sequential:
        assert isinstance(network.network, nn.Sequential)
        return network.network

    network = own("plain")
    assert torch.equal(network.embed(images), layers("plain")[:4](images))
    network = own("plain@0")
    assert torch.equal(network.embed(images), layers("plain@0")[0](images).flatten(1))
    network = own("Embedding")
    assert torch.equal(network.embed(images), network.network.embed(images).flatten(1))
    # Images in either layout are what the user's code expects.
    last = images.to(memory_format=torch.channels_last)
    assert torch.equal(network.embed(last), network.embed(images))


def test_a_named_layer_ends_the_pass(images: Tensor) -> None:
    network = own("plain@2")
    network.network[4].register_forward_hook(lambda *call: pytest.fail("went on"))
    network.embed(images)
    assert not network.network[2]._forward_hooks


@pytest.mark.parametrize("function", GOOD)
def test_weights_follow_from_seed_step_stream_and_network(function: str) -> None:
    before = torch.get_rng_state()
    network = own(function, seed=1)
    first = weights(network)
    assert same(first, weights(own(function, seed=1)))
    for again in (0, torch.tensor([0])):
        initialise_(network, 1, 5)
        initialise_(network, 1, again)
        assert same(first, weights(network))
    for other in (
        {"seed": 2, "step": 0},
        {"seed": 1, "step": 1},
        {"seed": 1, "step": 0, "network_index": 1},
        {"seed": 1, "step": 0, "stream": Stream.EVALUATION_WEIGHTS},
    ):
        initialise_(network, **other)
        changed = [not torch.equal(a, b) for a, b in zip(first, weights(network), strict=True)]
        constant = [bool((a == a.flatten()[0]).all()) and a.numel() > 1 for a in first]
        assert changed == [not same for same in constant]
    assert torch.equal(before, torch.get_rng_state())


def test_each_layer_is_drawn_in_its_way() -> None:
    network = own("plain").network
    for layer, bound in ((network[0], 27**-0.5), (network[4], 256**-0.5)):
        assert 0.7 * bound < layer.weight.abs().max() <= bound
    assert torch.equal(network[1].weight, torch.ones(4))
    # Normal, as they say; the whole network has the last word.
    for function, layer, deviation in (("own_layers", 3, 1), ("whole", 1, 3)):
        network, scales = own(function), []
        for step in range(200):
            initialise_(network, 0, step)
            scales.append(network.network[layer].scale.item())
        assert 0.8 * deviation < torch.tensor(scales).std() < 1.2 * deviation
    assert 2 < own("whole").network[2].weight.std() < 4
    attention = own("attention").network.attention
    assert not attention.in_proj_bias.any()
    assert attention.in_proj_weight.abs().max() <= (6 / (24 + 8)) ** 0.5  # Xavier
    tied = own("tied").network
    assert tied[2].weight is tied[3].weight


def test_without_a_seed_the_global_generator_decides() -> None:
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(weights(own("own_layers", seed=None)))
    assert same(drawn[0], drawn[1])
    assert not same(drawn[0], drawn[2])


def test_dropout_follows_from_the_seed(images: Tensor) -> None:
    network = own("dropout")

    def passes(step: int, index: int = 0) -> list[Tensor]:
        initialise_(network, 0, 0, network_index=index)
        first = weights(network)
        initialise_(network, 0, step, network_index=index)
        with torch.no_grad():  # other masks on the same weights
            for parameter, value in zip(network.parameters(), first, strict=True):
                parameter.copy_(value)
        torch.rand(3)  # what others draw does not matter
        return [network.embed(images), network.embed(images), network(images)]

    one = passes(1)
    assert not torch.equal(one[0], one[1])  # each pass has its own
    assert same(one, passes(1))
    assert not torch.equal(one[0], passes(2)[0])
    before = torch.get_rng_state()
    network.eval()
    assert torch.equal(network.embed(images), network.embed(images))
    assert torch.equal(before, torch.get_rng_state())


def test_buffers_are_set_back(images: Tensor) -> None:
    network = own("own_layers")
    average = network.network[1]
    for _ in range(2):
        assert average.mean == 0.5
        network(images + 3)
        assert average.mean > 0.6
        initialise_(network, 0, 1)
    batch_norm = own("lazy").network[1]
    assert batch_norm.num_batches_tracked == 0
    assert torch.equal(batch_norm.running_mean, torch.zeros(4))


def test_files_beside_it_can_be_imported(tmp_path: Path) -> None:
    (tmp_path / "beside_it.py").write_text("WIDTH = 5\n")
    path = tmp_path / "nets.py"
    path.write_text(
        "from dataclasses import dataclass\n"
        "from torch import nn\n"
        "from beside_it import WIDTH\n"
        "@dataclass\n"
        "class Options:\n"
        "    width: int = WIDTH\n"
        "def net(channels, classes, size):\n"
        "    layers = nn.Linear(channels * size[0] * size[1], Options().width), nn.ReLU()\n"
        "    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(Options().width, classes))\n"
    )
    searched = list(sys.path)
    assert get_network(f"{path}:net", 1, 2, (8, 8)).embedding_size == 5
    assert sys.path == searched
    path.write_text(path.read_text().replace("= WIDTH", "= WIDTH + 1"))
    assert get_network(f"{path}:net", 1, 2, (8, 8)).embedding_size == 6


# ---- unusable ones -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("missing", "has no function 'missing'"),
        ("number", "has no function 'number'"),
        ("no_module", "no_module gives a int: it must be a torch.nn.Module"),
        (
            "raising",
            r"raising\(3, 2, \(8, 8\)\) raised ValueError: no network for 2 classes "
            r"\(line \d+ of own_networks.py: raise ValueError",
        ),
        ("leaving", "raised SystemExit: bye"),
        (
            "raising_in_a_pass",
            r"forward raised RuntimeError: .* \(line \d+ of own_networks.py: return x @",
        ),
        ("other_classes", r"it makes a tensor of shape \[2, 3\].*must be .*\[2, 2\]"),
        ("two_results", "it makes a tuple"),
        ("ends_otherwise", r"not the output of a linear layer.*method embed.*layers are 0, 1"),
        ("plain@6", "has no layer '6': its layers are 0, 1, 2, 3, 4"),
        ("twice@2", "layer '2' is called 2 times"),
        ("undrawn", r"layer '1' \(_Frozen\) has a parameter 'scale' that nothing draws"),
        ("half_drawn", r"layer '1' \(_Half\) has a parameter 'other' that nothing draws"),
        ("parametrised", r"layer '0.parametrizations.weight' .* that nothing draws"),
        ("pruned", r"layer '0' \(Conv2d\) has a parameter 'weight_orig' that nothing draws"),
        ("Detached", "no gradient to the images"),
        ("NoTensor", "its embedding is a list"),
        (
            "Logarithm",
            r"its embedding of a tensor of shape \[2, 3, 8, 8\] is not finite: look for a division",
        ),
        ("Divided", r"its logits of a tensor of shape .* are not finite: .* a norm between them"),
    ],
)
def test_unusable_networks(function: str, words: str) -> None:
    with pytest.raises(InputError, match=words) as raised:
        own(function)
    assert f"own_networks.py:{function}" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_network_is_made_anew_in_each_call() -> None:
    own("always_the_same")
    with pytest.raises(InputError, match="gives the same network twice"):
        own("always_the_same")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nets.py", r"a model of your own is path/to/file.py:function\[@layer\]"),
        ("nets.py:", "a model of your own is"),
        ("nets.py@layer", "a model of your own is"),
        ("nets.py:a.b", "a model of your own is"),
        ("missing.py:net", "missing.py cannot be read: No such file"),
        ("folder.py:net", "folder.py cannot be read: Is a directory"),
        ("wrong.py:net", r"wrong.py raised SyntaxError: .*line 2"),
        ("failing.py:net", r"raised ZeroDivisionError.*\(line 1 of failing.py: 1 / 0\)"),
        ("needing.py:net", "raised ModuleNotFoundError: No module named 'not_there'"),
        ("nets:net", "unknown model 'nets:net'; .* path/to/file.py:function"),
    ],
)
def test_unusable_files(
    name: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.py").mkdir()
    Path("wrong.py").write_text("x = 1\ndef net(:\n")
    Path("failing.py").write_text("1 / 0\n")
    Path("needing.py").write_text("import not_there\n")
    for _ in range(2):  # what failed is not kept
        with pytest.raises(InputError, match=words):
            get_network(name, 3, 2, (8, 8), seed=0)


def test_a_command_fails_in_one_line(
    tmp_path: Path, path: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    arguments = ["--dataset", path, "--model", f"{FILE}:raising", "--out", str(out)]
    for command in (condense, coreset, profile):
        extra = ["herding"] if command is coreset else []
        if command is profile:
            arguments = [*arguments[:4], "--no-baselines"]
        monkeypatch.setattr(sys, "argv", ["x", *extra, *arguments, "--no-cache", "--ipc", "1"])
        with pytest.raises(SystemExit) as exit:
            cli.main("x", command._main)
        error = capsys.readouterr().err.splitlines()
        assert (exit.value.code, len(error)) == (2, 1)
        assert "raised ValueError: no network for 2 classes" in error[0]
    assert not out.exists()


# ---- in the commands -----------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["plain", "Embedding", "dropout", "own_layers", "lazy"])
def test_condensing_resumes_to_the_bit(function: str, path: str, tmp_path: Path) -> None:
    config = CondenseConfig(
        dataset=path,
        model=f"{FILE}:{function}",
        iterations=6,
        checkpoint_every=2,
        report_every=1,
        **SETTINGS,
    )
    condense.run(replace(config, out=str(tmp_path / "whole")))
    condense.run(replace(config, out=str(tmp_path / "parts"), iterations=4))
    torch.rand(5)
    condense.run(replace(config, out=str(tmp_path / "parts"), resume=True))
    left, right = (
        load_file(tmp_path / name / "checkpoint.safetensors") for name in ("whole", "parts")
    )
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.mark.parametrize("function", ["plain", "own_layers", "dropout", "attention", "whole"])
def test_the_loss_falls(function: str, path: str) -> None:
    data = load(path, cache=False)
    network = get_network(f"{FILE}:{function}", 3, 2, (8, 8), seed=0)
    images = initial_images(data, 1, "noise", 0)
    options = {"batch_real": 4, "strategy": "", "seed": 0, "momentum": 0.0, "device": CPU}
    loss, gradient = Matcher(data, network, images, lr=1.0, **options).gradient(0)
    lr = float(0.3 * loss / gradient.square().sum())
    matcher = Matcher(data, network, images, lr=lr, **options)
    losses = [float(matcher.step(0)) for _ in range(4)]
    assert losses[-1] < 0.8 * losses[0]


def loop_losses(path: str, function: str, recorder: Tape | None) -> tuple[list[float], list[str]]:
    """Those of the iterations of a loop, and what it says."""
    data = load(path, cache=False)
    network = get_network(f"{FILE}:{function}", 3, 2, (8, 8), seed=0)
    images = initial_images(data, 2, "noise", 0)
    options = {"batch_real": 4, "strategy": "crop", "seed": 0, "lr": 0.1, "momentum": 0.5}
    matcher = Matcher(data, network, images, device=CPU, **options)
    said: list[str] = []
    with Loop(matcher, recorder=recorder, note=said.append) as loop:
        for _ in range(5):
            loop.advance()
        return loop.read()().losses, said


@pytest.mark.parametrize("function", ["plain@2", "Embedding", "lazy", "tied", "dropout", "whole"])
def test_an_iteration_is_recorded_where_torch_draws_nothing(function: str, path: str) -> None:
    tape = Tape()
    losses, said = loop_losses(path, function, tape)
    assert losses == loop_losses(path, function, None)[0]
    assert len(set(losses)) == 5
    if function in ("dropout", "whole"):  # the host has to know the iteration
        assert tape.recorded == 0
        assert "no CUDA graph, as an iteration could not be captured" in said[0]
    else:
        assert (tape.replayed, said) == (3, [])


@pytest.mark.parametrize("function", ["dropout", "own_layers", "lazy"])
def test_an_evaluated_network_does_not_depend_on_others(
    function: str, path: str, tmp_path: Path
) -> None:
    evaluation = EvaluateConfig(
        whole=True,
        dataset=path,
        model=f"{FILE}:{function}",
        networks=3,
        epochs=2,
        device="cpu",
        cache=False,
        out=str(tmp_path / "at once"),
    )
    at_once = evaluate.run(evaluation)
    parts = replace(evaluation, out=str(tmp_path / "parts"))
    for networks in (1, 2, 3):
        torch.rand(networks)
        by_parts = evaluate.run(replace(parts, networks=networks))
    assert by_parts.accuracies == at_once.accuracies


@pytest.mark.cuda
@pytest.mark.parametrize("function", ["plain", "dropout", "own_layers", "attention", "lazy"])
def test_on_a_gpu(function: str, path: str, tmp_path: Path) -> None:
    config = CondenseConfig(
        dataset=path,
        model=f"{FILE}:{function}",
        iterations=8,
        **SETTINGS | {"device": "cuda"},
    )
    runs = [condense.run(replace(config, out=str(tmp_path / name))) for name in ("a", "b")]
    assert torch.equal(runs[0].images, runs[1].images)
    assert runs[0].images.isfinite().all()


def test_gradient_matching_and_a_coreset(path: str, tmp_path: Path) -> None:
    for function in ("dropout", "lazy", "own_layers"):
        config = CondenseConfig(
            dataset=path,
            method="dsa",
            model=f"{FILE}:{function}",
            iterations=2,
            outer_loops=2,
            inner_loops=1,
            out=str(tmp_path / function),
            **SETTINGS,
        )
        assert condense.run(config).images.isfinite().all()
    for method in ("herding", "forgetting"):
        config = CoresetConfig(
            method=method,
            dataset=path,
            ipc=1,
            model=f"{FILE}:tied",
            epochs=1,
            device="cpu",
            out=str(tmp_path / method),
            cache=False,
        )
        chosen = coreset.run(config)
        assert torch.equal(chosen.indices, coreset.run(replace(config, overwrite=True)).indices)
    made = json.loads((tmp_path / "herding" / "coreset.json").read_text())
    assert made["network"]["model_file"] == model_file(config.model)


def test_a_network_that_diverges_is_named(path: str, tmp_path: Path) -> None:
    """And what came before it is kept."""
    model, out = f"{FILE}:Exploding", str(tmp_path / "run")
    options = {"dataset": path, "iterations": 20, "checkpoint_every": 5, "lr_img": 1.0, "out": out}
    with pytest.raises(InputError) as raised:
        condense.run(CondenseConfig(model=model, **options, **SETTINGS))
    words = str(raised.value)
    assert "\n" not in words
    assert words.startswith(("the loss is ", "the images are not finite "))
    assert (
        f"choose a smaller --lr-img than 1, or have {model} keep its embedding in bounds, as by a "
        "norm; the checkpoint of iteration "
    ) in words
    condense.run(CondenseConfig(model="MLP", **options, overwrite=True, **SETTINGS))
    evaluation = EvaluateConfig(
        set=out, model=model, networks=8, epochs=10, device="cpu", cache=False
    )
    words = (
        rf"^--model {re.escape(model)}: the logits of network (\d), trained at a learning rate of "
        r"0.01, are not finite: look for [^\n]*$"
    )
    with pytest.raises(InputError, match=words) as raised:
        evaluate.run(evaluation)
    number = int(re.match(words, str(raised.value))[1])
    partial = json.loads((tmp_path / "run" / "evaluation.partial.json").read_text())
    assert len(partial["accuracies"]) == number - 1
    assert not (tmp_path / "run" / "evaluation.json").exists()


def test_a_class_may_be_masked(path: str, tmp_path: Path) -> None:
    """By a logit of minus infinity, which has a softmax."""
    options = {"baseline": "random", "ipc": 1, "networks": 1, "epochs": 0, "device": "cpu"}
    config = EvaluateConfig(
        dataset=path, model=f"{FILE}:Masked", out=str(tmp_path), cache=False, **options
    )
    assert evaluate.run(config).accuracies == (50.0,)


def test_a_profile(path: str, tmp_path: Path) -> None:
    result = profile.run(
        ProfileConfig(
            images="3x8x8",
            classes=2,
            ipc=1,
            batch_real=4,
            model=f"{FILE}:plain",
            device="cpu",
            iterations=3,
            baselines=False,
        )
    )
    assert result["options"]["model"] == f"{FILE}:plain"


def test_what_is_recorded(path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("models").mkdir()
    shutil.copy(FILE, "models/nets.py")
    name = "models/nets.py:plain@2"
    config = CondenseConfig(dataset=path, model=name, iterations=1, **SETTINGS)
    condense.run(config)
    out = Path("runs/set-npz-nets-plain-2-ipc2-seed3")
    options = json.loads((out / "config.json").read_text())["options"]
    assert (options["model"], options["model_file"]) == (name, model_file(name))

    evaluation = EvaluateConfig(
        set=str(out), dataset=path, networks=2, epochs=1, device="cpu", cache=False
    )
    accuracies = evaluate.run(evaluation).accuracies
    assert json.loads((out / "evaluation.json").read_text())["model"] == name
    # Network 1 is the same alone, and another network is another evaluation.
    evaluator = evaluate.run(replace(evaluation, networks=1, out="alone"))
    assert evaluator.accuracies == accuracies[:1]
    assert evaluate.run(replace(evaluation, out="alone")).accuracies == accuracies
    with pytest.raises(InputError, match="is of another evaluation"):
        evaluate.run(replace(evaluation, model="MLP"))

    again = replace(config, resume=True, iterations=2, out=str(out))
    with Path("models/nets.py").open("a") as file:
        file.write("\n# changed\n")
    with pytest.raises(InputError, match=r"the file of --model models/nets.py:plain@2 is not what"):
        condense.run(again)
    with pytest.raises(InputError, match=r"begun with --model 'models/nets.py:plain@2', not"):
        condense.run(replace(again, model="models/nets.py:plain"))
    shutil.copy(FILE, "models/nets.py")
    condense.run(again)


def test_names_in_folders() -> None:
    assert short_name("a b/nets.py:tiny@body.2") == "nets-tiny-body-2"
    assert short_name("ConvNetD4BN") == "ConvNetD4BN"
    assert model_file("ConvNet") is None


def test_the_table() -> None:
    (row,) = table([f"{FILE}:plain"], 3, 2, (8, 8))
    parameters = 4 * 27 + 4 + 8 + 256 * 2 + 2
    flop = 2 * (4 * 27 * 64 + 256 * 2)
    assert (row["parameters"], row["embedding"], row["flop"]) == (parameters, 256, flop)
    (row,) = table([f"{FILE}:attention"], 3, 2, (8, 8))
    # 4 tokens of 8: their making, the four products of 8x8, the scores and what they weigh.
    assert row["flop"] == 2 * (4 * 8 * 48 + 4 * 4 * 64 + 2 * 4 * 4 * 8 + 8 * 2)
