# SPDX-License-Identifier: MIT
"""Evaluation: the protocol to the step, seeds, what is written, interruption, and bad input."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from dmfast import InputError, data, evaluate, evaluator, ops, presets, training
from dmfast.evaluate import EvaluateConfig, EvaluationResult, evaluate_set
from dmfast.networks import get_network, initialise_
from dmfast.ops import Stream
from dmfast.runs import locked
from dmfast.synthetic import FORMATS, SyntheticSet

MODEL = "ConvNetD1W8"
STRATEGY = "color_crop_cutout_scale_rotate"
# For commands in other processes: this checkout, wherever they run.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(evaluate.__file__).parents[1])}


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits")


@pytest.fixture(scope="module")
def small(digits: data.ImageData) -> SyntheticSet:
    """Two real images a class, in the place of condensed ones."""
    order, offsets = digits.by_class()
    index = torch.cat([order[start : start + 2] for start in offsets[:-1].tolist()])
    return SyntheticSet(
        digits.normalise(digits.train_images[index]),
        digits.train_labels[index],
        mean=digits.mean,
        std=digits.std,
        class_names=digits.class_names,
        config={"dataset": "digits"},
    )


@pytest.fixture
def saved(small: SyntheticSet, tmp_path: Path) -> Path:
    path = tmp_path / "synthetic.safetensors"
    small.save(path)
    return path


def quick(**options: Any) -> EvaluateConfig:
    return EvaluateConfig(**{"model": MODEL, "networks": 2, "epochs": 20} | options)


def written(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "evaluation.json").read_text())
    return content


# ---- the protocol ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "epochs", "decay_after"),
    [("", 3, 2), (STRATEGY, 3, 2), ("", 6, 4), (STRATEGY, 7, 4)],
)
def test_training_follows_the_published_protocol(
    digits: data.ImageData, strategy: str, epochs: int, decay_after: int
) -> None:
    """Against the update written out: two batches an epoch, the second one smaller."""
    seed, index, n = 5, 2, 300
    images, labels = digits.normalise(digits.train_images[:n]), digits.train_labels[:n]
    network = get_network(MODEL, 1, 10, (8, 8), seed=seed)
    expected = get_network(MODEL, 1, 10, (8, 8), seed=seed)
    training.train(
        network, images, labels, epochs=epochs, seed=seed, index=index, strategy=strategy
    )

    whole = torch.tensor([0, n])
    weights = list(expected.parameters())
    learning_rate, velocity = 0.01, [torch.zeros_like(w) for w in weights]
    for epoch in range(epochs + 1):
        order = ops.draw_batch(
            torch.arange(n),
            whole,
            whole,
            n,
            seed,
            epoch,
            first_class=index,
            stream=Stream.EVALUATION_BATCH,
        )
        for batch, rows in enumerate((order[:256], order[256:])):
            x = images[rows]
            if strategy:
                params = ops.draw_augmentation(
                    strategy,
                    1,
                    (8, 8),
                    seed,
                    2 * epoch + batch,
                    rows=len(rows),
                    first_group=index,
                    stream=Stream.EVALUATION_AUGMENTATION,
                )
                x = ops.siamese_augment(x, params)
            loss = F.cross_entropy(expected(x), labels[rows])
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for w, v, gradient in zip(weights, velocity, gradients, strict=True):
                    v.mul_(0.9).add_(gradient + 5e-4 * w)
                    w.sub_(learning_rate * v)
        if epoch == decay_after:
            learning_rate, velocity = 0.001, [torch.zeros_like(w) for w in weights]

    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("model", [MODEL, "ConvNetD1W8BN"])
def test_result_is_the_test_accuracy_after_the_last_epoch(
    digits: data.ImageData, small: SyntheticSet, model: str
) -> None:
    result = evaluate_set(
        small.images,
        small.labels,
        digits,
        model=model,
        networks=2,
        epochs=20,
        seed=3,
        strategy=STRATEGY,
        device="cpu",
    )
    for index, accuracy in enumerate(result.accuracies):
        network = get_network(model, 1, 10, (8, 8), seed=0)
        initialise_(network, 3, 0, network_index=index, stream=Stream.EVALUATION_WEIGHTS)
        training.train(
            network, small.images, small.labels, epochs=20, seed=3, index=index, strategy=STRATEGY
        )
        with torch.no_grad():
            predicted = network.eval()(digits.normalise(digits.test_images)).argmax(1)
        correct = (predicted == digits.test_labels).double().mean().item()
        assert accuracy == pytest.approx(100 * correct)


def test_networks_follow_from_the_seed_and_their_number_alone(
    digits: data.ImageData, small: SyntheticSet
) -> None:
    def accuracies(networks: int, seed: int = 0, model: str = "ConvNetD1W8BN") -> tuple[float, ...]:
        state = torch.get_rng_state()
        result = evaluate_set(
            small.images, small.labels, digits, model=model, networks=networks, epochs=5, seed=seed
        )
        assert torch.equal(torch.get_rng_state(), state)
        return result.accuracies

    three = accuracies(3)
    assert accuracies(1) == three[:1]
    assert accuracies(3) == three
    assert len(set(three)) == 3
    assert accuracies(3, seed=1) != three


def test_epochs_are_counted_to_the_end(digits: data.ImageData, small: SyntheticSet) -> None:
    calls: list[int] = []
    evaluate_set(
        small.images,
        small.labels,
        digits,
        model=MODEL,
        networks=2,
        epochs=3,
        on_epoch=calls.append,
    )
    assert calls == [1] * 2 * (3 + 1)


def test_bfloat16_trains_float32_weights(digits: data.ImageData, small: SyntheticSet) -> None:
    network = get_network(MODEL, 1, 10, (8, 8), seed=0)
    training.train(network, small.images, small.labels, epochs=1, seed=0, precision="bfloat16")
    exact = get_network(MODEL, 1, 10, (8, 8), seed=0)
    training.train(exact, small.images, small.labels, epochs=1, seed=0)
    for name, weight in network.state_dict().items():
        assert weight.dtype == torch.float32
        torch.testing.assert_close(weight, exact.state_dict()[name], rtol=0, atol=1e-3)
    assert not torch.equal(network.classifier.weight, exact.classifier.weight)


def test_statistics() -> None:
    result = EvaluationResult((51.0, 52.0, 53.0), 1.0)
    assert result.accuracy_mean == 52
    assert result.accuracy_std == pytest.approx(math.sqrt(2 / 3))
    # Student's t of 2 degrees of freedom: 4.303; the standard error: 1 / sqrt(3).
    assert result.interval_95 == pytest.approx((52 - 2.484, 52 + 2.484), abs=1e-3)
    assert EvaluationResult((51.0,), 1.0).interval_95 is None


# ---- what a run writes -------------------------------------------------------------------------


def test_run_writes_the_evaluation_beside_the_set(
    digits: data.ImageData, small: SyntheticSet, saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = evaluate.run(quick(set=str(saved.parent), seed=1), command="the command")
    expected = evaluate_set(
        small.images,
        small.labels,
        digits,
        model=MODEL,
        networks=2,
        epochs=20,
        seed=1,
        strategy=STRATEGY,
    )
    assert result.accuracies == expected.accuracies
    content = written(saved.parent)
    assert content["accuracies"] == list(result.accuracies)
    assert content["accuracy_mean"] == pytest.approx(sum(result.accuracies) / 2)
    assert content["accuracy_std"] == pytest.approx(
        abs(result.accuracies[0] - result.accuracies[1]) / 2
    )
    expected_facts = {
        "networks": 2,
        "dataset": "digits",
        "images_per_class": 2,
        "baseline": None,
        "model": MODEL,
        "protocol": "published",
        "epochs": 20,
        "augmentation": STRATEGY,  # the preset of digits: no flip
        "labels": "hard",
        "learning_rate": 0.01,
        "accuracy_of": "the last epoch",
        "seed": 1,
        "precision": "float32",
        "command": "the command",
    }
    assert {key: content[key] for key in expected_facts} == expected_facts
    assert content["versions"]["torch"] == torch.__version__
    assert content["machine"]["threads"] == torch.get_num_threads()
    assert content["seconds"] > 0
    assert sorted(path.name for path in saved.parent.iterdir()) == [
        "evaluation.json",
        "synthetic.safetensors",
    ]
    assert f"{content['accuracy_mean']:.2f} %" in capsys.readouterr().out


@pytest.mark.parametrize("format", FORMATS)
def test_any_exported_format_is_taken(
    small: SyntheticSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Those that do not keep mean and std are normalised as the data set is."""
    trained_on: list[torch.Tensor] = []

    def train(network: object, images: torch.Tensor, labels: torch.Tensor, **rest: Any) -> None:
        assert torch.equal(labels, small.labels)
        trained_on.append(images)

    monkeypatch.setattr(evaluator, "train", train)
    unit = 1.5 * small.unit_images() - 0.2
    mean, std = small.mean[0], small.std[0]
    exact = replace(small, images=(unit - mean) / std)
    exact.export(tmp_path / "set", format)
    if format == "png":  # as another program would write it
        (tmp_path / "set" / "dmfast.json").unlink()
    config = quick(
        set=str(tmp_path / "set"), dataset="digits", networks=1, out=str(tmp_path / "out")
    )
    evaluate.run(config)
    if format in ("safetensors", "res", "mtt"):
        assert torch.equal(trained_on[0], exact.images)
        return
    clipped = (unit.clamp(0, 1) - mean) / std
    step = 0 if format == "idc" else 0.5 / 255 / std
    torch.testing.assert_close(trained_on[0], clipped, rtol=0, atol=step + 1e-5)


def test_model_and_strategy_are_those_that_the_set_was_made_with(
    small: SyntheticSet, saved: Path, tmp_path: Path
) -> None:
    made_with = {"dataset": "digits", "model": MODEL, "dsa_strategy": ""}
    replace(small, config=made_with).save(saved)
    evaluate.run(EvaluateConfig(set=str(saved), networks=1, epochs=1))
    content = written(saved.parent)
    assert (content["model"], content["augmentation"]) == (MODEL, "none")
    given = {"model": "ConvNetD1W4", "dsa_strategy": "color", "out": str(tmp_path / "given")}
    evaluate.run(EvaluateConfig(set=str(saved), networks=1, epochs=1, **given))
    content = written(tmp_path / "given")
    assert (content["model"], content["augmentation"]) == ("ConvNetD1W4", "color")


@pytest.mark.parametrize(
    ("mode", "model", "names"),
    [
        ("SS", "ConvNetD4BN", ["ConvNetD4BN"]),
        ("S", "ConvNetD4BN", ["ConvNetD4"]),
        ("S", "ResNet18BN_AP", ["ResNet18_AP"]),
        ("S", "aBNb/nets.py:tiny", ["aBNb/nets.py:tiny"]),
        ("S", "ConvNet", ["ConvNet"]),
        ("C", "ConvNet", ["ConvNet"]),
        ("C", "VGG11", ["VGG11", "ConvNet"]),
        ("P", "VGG11", ["ConvNetNP", "ConvNetMP", "ConvNetAP"]),
    ],
)
def test_networks_of_a_published_mode(mode: str, model: str, names: list[str]) -> None:
    assert presets.evaluation_networks(mode, model) == names


def test_every_mode_names_networks_that_there_are() -> None:
    for mode in presets.EVALUATION_MODES:
        for name in presets.evaluation_networks(mode, "ConvNetBN"):
            get_network(name, 3, 10, (32, 32), seed=0)


def test_a_mode_evaluates_each_of_its_networks(
    small: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = replace(small, config=small.config | {"model": f"{MODEL}BN"})
    named.save(tmp_path / "synthetic.safetensors")
    options = ["--networks", "1", "--epochs", "2"]
    evaluate._main([str(tmp_path), "--eval-mode", "S", *options])
    assert written(tmp_path / MODEL)["model"] == MODEL
    results = evaluate.run_mode(
        EvaluateConfig(set=str(tmp_path), networks=1, epochs=2, out=str(tmp_path / "M")), "M"
    )
    out, error = capsys.readouterr()
    # AlexNet and the others halve images of 8x8 pixels too often.
    assert "MLP" in results
    assert "VGG11" not in results
    assert "VGG11 is left out: " in error
    for name, result in results.items():
        content = written(tmp_path / "M" / name)
        assert content["model"] == name
        assert content["accuracies"] == list(result.accuracies)
        assert f"{result.accuracy_mean:.2f} % +- 0.00" in out
    with pytest.raises(InputError, match="--eval-mode and --model exclude each other"):
        evaluate.run_mode(quick(set=str(tmp_path)), "S")
    with pytest.raises(InputError, match="--eval-mode: unknown value 'X'"):
        evaluate.run_mode(EvaluateConfig(set=str(tmp_path)), "X")


def test_the_folders_of_a_mode_are_none_of_the_sets(small: SyntheticSet, tmp_path: Path) -> None:
    """Neither taken for classes of a folder of pictures, nor where one's own network is."""
    small.export(tmp_path / "pictures", "png")
    (tmp_path / "pictures/dmfast.json").unlink()
    config = EvaluateConfig(set=str(tmp_path / "pictures"), dataset="digits", networks=1, epochs=1)
    for _ in range(2):
        assert list(evaluate.run_mode(config, "P")) == ["ConvNetNP", "ConvNetMP", "ConvNetAP"]
    assert written(tmp_path / "pictures-evaluation/ConvNetMP")["model"] == "ConvNetMP"
    own = f"{Path(__file__).parent}/own_networks.py:plain"
    (tmp_path / "own").mkdir()
    named = replace(small, config=small.config | {"model": own})
    named.save(tmp_path / "own/synthetic.safetensors")
    config = EvaluateConfig(set=str(tmp_path / "own"), networks=1, epochs=1)
    assert list(evaluate.run_mode(config, "S")) == [own]
    assert written(tmp_path / "own/own_networks-plain")["model"] == own


def test_a_folder_in_use_is_left_alone(saved: Path) -> None:
    with locked(saved.parent), pytest.raises(InputError, match=r"in use by another process.*--out"):
        evaluate.run(quick(set=str(saved)))
    assert list(saved.parent.iterdir()) == [saved]


def test_test_images_are_normalised_as_the_set_is(
    digits: data.ImageData, small: SyntheticSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "set.safetensors"
    other = replace(digits, mean=(0.1,), std=(0.7,))
    images = (small.unit_images() - 0.1) / 0.7
    replace(small, images=images, mean=other.mean, std=other.std).save(path)
    result = evaluate.run(quick(set=str(path)))
    assert "normalised as the set is" in capsys.readouterr().err
    expected = evaluate_set(
        images, small.labels, other, model=MODEL, networks=2, epochs=20, strategy=STRATEGY
    )
    assert result.accuracies == expected.accuracies


def test_no_augmentation(
    digits: data.ImageData, small: SyntheticSet, saved: Path, tmp_path: Path
) -> None:
    evaluate._main([str(saved), *["--model", "ConvNetD1W8", "--networks", "2", "--epochs", "20"]])
    plain = ["--no-augmentation", "--out", str(tmp_path / "plain")]
    evaluate._main(
        [str(saved), *["--model", "ConvNetD1W8", "--networks", "2", "--epochs", "20"], *plain]
    )
    content = written(tmp_path / "plain")
    assert content["augmentation"] == "none"
    assert content["command"].endswith(" ".join(plain))
    expected = evaluate_set(
        small.images, small.labels, digits, model=MODEL, networks=2, epochs=20, strategy=""
    )
    assert content["accuracies"] == list(expected.accuracies)
    assert content["accuracies"] != written(tmp_path)["accuracies"]


def test_random_baseline_draws_new_images_for_each_network(
    digits: data.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[torch.Tensor] = []

    def train(network: object, images: torch.Tensor, labels: torch.Tensor, **rest: Any) -> None:
        assert labels.bincount().tolist() == [3] * 10
        trained_on.append(images)

    monkeypatch.setattr(evaluator, "train", train)
    monkeypatch.chdir(tmp_path)
    evaluate.run(quick(baseline="random", ipc=3))
    evaluate.run(quick(baseline="random", ipc=3, networks=1, dsa_strategy="none"))
    first, second, first_again = trained_on
    real = {image.numpy().tobytes() for image in digits.normalise(digits.train_images)}
    assert {image.numpy().tobytes() for image in first} <= real
    assert not torch.equal(first, second)
    assert torch.equal(first, first_again)
    content = written(tmp_path / "runs" / "digits-random-ipc3-seed0")
    assert "drawn anew for each network" in content["baseline"]
    assert content["images_per_class"] == 3
    assert (tmp_path / "runs" / "digits-random-ipc3-seed0-no-augmentation").is_dir()


# ---- other protocols, labels and learning rates ------------------------------------------------


def caught(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What networks are trained on from now on, in place of training them."""
    calls: list[dict[str, Any]] = []

    def train(network: object, images: Any, labels: torch.Tensor, **rest: Any) -> None:
        calls.append({"images": images, "labels": labels, **rest})

    monkeypatch.setattr(evaluator, "train", train)
    return calls


def test_best_epoch_is_the_best_of_every_20th_and_the_last(
    digits: data.ImageData, small: SyntheticSet, saved: Path
) -> None:
    result = evaluate.run(quick(set=str(saved), epochs=65, networks=3, protocol="best-epoch"))
    test_images = digits.normalise(digits.test_images)
    last = []
    for index, accuracy in enumerate(result.accuracies):
        network = get_network(MODEL, 1, 10, (8, 8), seed=0)
        initialise_(network, 0, 0, network_index=index, stream=Stream.EVALUATION_WEIGHTS)
        seen: list[float] = []

        def test(network: Any = network, seen: list[float] = seen) -> None:
            with torch.no_grad():
                right = network(test_images).argmax(1) == digits.test_labels
            seen.append(100 * right.double().mean().item())

        training.train(
            network,
            small.images,
            small.labels,
            epochs=65,
            seed=0,
            index=index,
            strategy=STRATEGY,
            on_epoch=test,
        )
        assert len(seen) == 66
        assert accuracy == pytest.approx(max(seen[epoch] for epoch in (20, 40, 60, 65)))
        last.append(seen[-1])
    assert result.accuracies != pytest.approx(last), "the last is the best of all three networks"
    content = written(saved.parent)
    assert content["protocol"] == "best-epoch"
    assert content["accuracy_of"] == (
        "the best, on the test images, of every 20th epoch and the last"
    )


def test_tests_on_the_way_leave_the_training_as_it_is(
    digits: data.ImageData, small: SyntheticSet
) -> None:
    """With batch norm, whose statistics and mode a test could change."""

    def weights(protocol: str) -> dict[str, torch.Tensor]:
        trained = evaluator.Evaluator(
            digits,
            model="ConvNetD1W8BN",
            epochs=22,
            seed=0,
            strategy="",
            precision="float32",
            device="cpu",
            protocol=protocol,
        )
        trained([(small.images, small.labels)], 0)
        return trained._network.state_dict()

    torch.testing.assert_close(weights("best-epoch"), weights("published"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "networks", "epochs"),
    [
        ({}, 20, 1000),
        ({"dsa_strategy": ""}, 20, 1000),
        ({"protocol": "dc-bench"}, 5, 1000),
        ({"protocol": "dc-bench", "dsa_strategy": "none"}, 5, 300),
        ({"protocol": "dc-bench", "networks": 2, "epochs": 7}, 2, 7),
        ({"protocol": "best-epoch"}, 20, 1000),
    ],
)
def test_numbers_of_networks_and_epochs_are_the_protocols(
    saved: Path,
    options: dict[str, Any],
    networks: int,
    epochs: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = caught(monkeypatch)
    evaluate.run(EvaluateConfig(set=str(saved), model=MODEL, **options))
    assert len(calls) == networks
    assert {call["epochs"] for call in calls} == {epochs}
    assert (written(saved.parent)["networks"], written(saved.parent)["epochs"]) == (
        networks,
        epochs,
    )


def test_soft_labels_are_scores_whose_softmax_is_learned(
    digits: data.ImageData, small: SyntheticSet, tmp_path: Path
) -> None:
    """As published with soft labels: the loss is written out here, for one update."""
    scores = 3 * torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    soft = replace(small, soft_labels=scores, labels=scores.argmax(1))
    soft.export(tmp_path / "set", "mtt")
    evaluate.run(quick(set=str(tmp_path / "set"), dataset="digits", networks=1, epochs=1))
    assert written(tmp_path / "set")["labels"] == "softmax of the set's scores"

    network = get_network(MODEL, 1, 10, (8, 8), seed=0)
    training.train(network, small.images, scores.softmax(1), epochs=0, seed=0)
    expected = get_network(MODEL, 1, 10, (8, 8), seed=0)
    probabilities = scores.exp() / scores.exp().sum(1, keepdim=True)
    loss = -(probabilities * expected(small.images).log_softmax(1)).sum(1).mean()
    weights = list(expected.parameters())
    with torch.no_grad():
        for w, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            w.sub_(0.01 * (gradient + 5e-4 * w))
    torch.testing.assert_close(network.state_dict(), expected.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", ["safetensors", "mtt"])
def test_a_learned_rate_and_soft_labels_of_a_file_are_used(
    small: SyntheticSet,
    tmp_path: Path,
    format: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    calls = caught(monkeypatch)
    scores = torch.randn(20, 10)
    learned = replace(small, soft_labels=scores, labels=scores.argmax(1), learning_rate=0.0234)
    learned.export(tmp_path / "set", format)
    config = quick(
        set=str(tmp_path / "set"), dataset="digits", networks=1, out=str(tmp_path / "out")
    )
    evaluate.run(config)
    (call,) = calls
    assert torch.equal(call["labels"], scores.softmax(1))
    assert call["protocol"] == replace(training.Protocol(), learning_rate=pytest.approx(0.0234))
    assert "learning rate of 0.0234, which is used" in capsys.readouterr().err
    assert written(tmp_path / "out")["learning_rate"] == pytest.approx(0.0234)
    learned.learning_rate = 0.03  # all else the same
    (tmp_path / "set").rename(tmp_path / "old")
    learned.export(tmp_path / "set", format)
    with pytest.raises(InputError, match="training_images is"):
        evaluate.run(config)


# ---- other things to train on ------------------------------------------------------------------


def test_the_whole_set(
    digits: data.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        calls = caught(patch)
        evaluate._main(["--whole", "--model", MODEL, "--networks", "2"])
    assert [call["epochs"] for call in calls] == [50, 50]
    content = written(tmp_path / "runs" / "digits-whole-seed0")
    assert content["baseline"] == "the whole real set"
    assert content["images_per_class"] == len(digits.train_labels) / 10
    result = evaluate.run(quick(whole=True, networks=1, epochs=2, out=str(tmp_path / "out")))
    expected = evaluate_set(
        digits.normalise(digits.train_images),
        digits.train_labels,
        digits,
        model=MODEL,
        networks=1,
        epochs=2,
        strategy=STRATEGY,
    )
    assert result.accuracies == expected.accuracies
    for index in (torch.tensor([5, 0, 5]), torch.arange(7)):
        picked = calls[0]["images"][index]
        assert torch.equal(picked, digits.normalise(digits.train_images)[index])
    assert calls[0]["images"].shape == (len(digits.train_labels), 1, 8, 8)


@pytest.mark.parametrize(
    ("content", "options"),
    [
        ("[7, 0, 1400]", {"dataset": "digits"}),
        ('{"indices": [7, 0, 1400], "dataset": "digits"}', {}),
        ('{"indices": [7, 0, 1400], "dataset": "gone"}', {"dataset": "digits"}),
        ("7\n0\n1400\n", {"dataset": "digits"}),
        ("\ufeff[7, 0, 1400]", {"dataset": "digits"}),
    ],
)
def test_listed_images(
    digits: data.ImageData,
    content: str,
    options: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "list").write_text(content)
    calls = caught(monkeypatch)
    evaluate.run(quick(indices=str(tmp_path / "list"), networks=1, **options))
    index = torch.tensor([7, 0, 1400])
    assert torch.equal(calls[0]["images"], digits.normalise(digits.train_images[index]))
    assert torch.equal(calls[0]["labels"], digits.train_labels[index])
    assert written(tmp_path)["indices"] == str(tmp_path / "list")
    (tmp_path / "list").write_text("7")
    with pytest.raises(InputError, match="training_images is"):
        evaluate.run(quick(indices=str(tmp_path / "list"), networks=1, dataset="digits"))


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("[7, 0, 1442]", "lists image 1442, but digits has the training images 0 to 1441"),
        ("[-1]", "lists image -1, but"),
        ("[3, 4, 3]", "lists image 3 more than once"),
        ("[]", "holds no indices"),
        ("", "holds no indices"),
        ("[1.0]", "holds no indices"),
        ("[true]", "holds no indices"),
        ("1 2 x", "holds no indices"),
        ('{"index": [1]}', "holds no indices"),
        ("9" * 30, "lists image 9{30}, but"),
        ("[" * 100_000, "holds no indices"),
        ("[" + "9" * 30 + "]", "lists image 9{30}, but"),
    ],
)
def test_lists_that_cannot_be_used(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "list").write_text(content)
    with pytest.raises(InputError, match=named) as error:
        evaluate.run(quick(indices=str(tmp_path / "list"), dataset="digits"))
    assert str(tmp_path / "list") in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_says_of_which_set(tmp_path: Path) -> None:
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(InputError, match=r"does not say of which set .* give --dataset"):
        evaluate.run(quick(indices=str(tmp_path / "list")))


@pytest.mark.parametrize("soft", [False, True])
def test_classes_are_known_by_their_names(
    digits: data.ImageData, small: SyntheticSet, tmp_path: Path, soft: bool, monkeypatch: Any
) -> None:
    """A set that numbers them in another order is learned as one that does not."""
    calls = caught(monkeypatch)
    order = [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]  # the set's class k is the digits' class order[k]
    number = torch.tensor([order.index(k) for k in range(10)])
    scores = torch.randn(20, 10) if soft else None
    other = replace(
        small,
        labels=number[small.labels],
        class_names=tuple(digits.class_names[k] for k in order),
        soft_labels=None if scores is None else scores[:, torch.tensor(order)],
    )
    other.save(tmp_path / "set.safetensors")
    evaluate.run(quick(set=str(tmp_path / "set.safetensors"), networks=1))
    expected = small.labels if scores is None else scores.softmax(1)
    torch.testing.assert_close(calls[0]["labels"], expected)


def test_a_folder_of_pictures(
    digits: data.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of elsewhere: a folder a class, of any number of pictures, read as [0, 1]."""
    calls = caught(monkeypatch)
    picked = [k for k in range(40) if k % 7]
    for k in picked:
        folder = tmp_path / "set" / digits.class_names[digits.train_labels[k]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.train_images[k, ..., 0].numpy()).save(folder / f"{k:03}.png")
    config = quick(
        set=str(tmp_path / "set"), dataset="digits", networks=1, out=str(tmp_path / "out")
    )
    evaluate.run(config)
    by_class = sorted(picked, key=lambda k: digits.train_labels[k].item())
    expected = digits.normalise(digits.train_images[by_class])
    torch.testing.assert_close(calls[0]["images"], expected, rtol=0, atol=1e-6)
    assert torch.equal(calls[0]["labels"], digits.train_labels[by_class])
    assert written(tmp_path / "out")["images_per_class"] == len(picked) / 10


# ---- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_interrupted_evaluation_continues_to_the_same_result(
    saved: Path, tmp_path: Path, how: signal.Signals
) -> None:
    out = tmp_path / "out"
    options = {"set": str(saved), "networks": 2, "epochs": 150}
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dmfast.evaluate", str(saved), "--model", MODEL),
            *("--networks", "2", "--epochs", "150", "--out", str(out)),
        ],
        env=ENVIRONMENT | {"OMP_NUM_THREADS": str(torch.get_num_threads())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("network 1 of 2")
    time.sleep(0.05)
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == (130 if how == signal.SIGINT else -signal.SIGKILL)
    if how == signal.SIGINT:
        assert errors.splitlines()[-2:] == [
            f"1 of 2 networks are done and kept in {out / 'evaluation.partial.json'}; the same "
            "command continues with network 2, from its first epoch",
            "python -m dmfast.evaluate: interrupted",
        ]
    assert not (out / "evaluation.json").exists()
    began = json.loads((out / "evaluation.partial.json").read_text())
    assert len(began["accuracies"]) == 1

    result = evaluate.run(quick(**options, out=str(out)))
    whole = evaluate.run(quick(**options, out=str(tmp_path / "whole")))
    assert result.accuracies == whole.accuracies
    assert result.accuracies[0] == began["accuracies"][0]
    assert not (out / "evaluation.partial.json").exists()


@pytest.mark.parametrize("networks", [1, 2])
def test_an_interrupt_while_networks_are_kept_waits_until_they_are(
    saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], networks: int
) -> None:
    write = evaluate.write_bytes

    def interrupted(path: Path, content: bytes) -> None:
        if json.loads(content)["networks"] == networks:
            signal.raise_signal(signal.SIGINT)
        write(path, content)

    options = {"set": str(saved), "networks": 2, "networks_at_once": 1}
    partial = saved.parent / "evaluation.partial.json"
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "write_bytes", interrupted)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(quick(**options))
    goes_on = "continues with network 2, from its first epoch" if networks == 1 else "finishes"
    words = f"{networks} of 2 networks are done and kept in {partial}; the same command {goes_on}"
    assert words in capsys.readouterr().err
    assert len(json.loads(partial.read_text())["accuracies"]) == networks
    assert len(evaluate.run(quick(**options)).accuracies) == 2
    assert not partial.exists()
    assert written(saved.parent)["networks"] == 2


def test_an_interrupt_at_the_end_leaves_the_whole_evaluation(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = evaluate.write_bytes

    def interrupted(path: Path, content: bytes) -> None:
        if path.name == "evaluation.json":
            signal.raise_signal(signal.SIGINT)
        write(path, content)

    monkeypatch.setattr(evaluate, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(quick(set=str(saved)))
    assert len(written(saved.parent)["accuracies"]) == written(saved.parent)["networks"]
    assert not (saved.parent / "evaluation.partial.json").exists()


def test_finished_evaluation_is_read_and_extended_but_not_repeated(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    two = evaluate.run(quick(set=str(saved)))
    before = written(saved.parent)
    with monkeypatch.context() as patch:
        patch.delattr(training, "train")
        assert evaluate.run(quick(set=str(saved))).accuracies == two.accuracies
    assert written(saved.parent) == before
    three = evaluate.run(quick(set=str(saved), networks=3))
    assert three.accuracies[:2] == two.accuracies
    assert written(saved.parent)["networks"] == 3
    with pytest.raises(InputError, match="has 3 networks of this evaluation already"):
        evaluate.run(quick(set=str(saved), networks=2))


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"epochs": 21}, r"epochs is 20, not 21"),
        ({"seed": 9}, r"seed is 0, not 9"),
        ({"model": "ConvNetD1W4"}, r"model is 'ConvNetD1W8', not 'ConvNetD1W4'"),
        ({"dsa_strategy": "none"}, r"augmentation is .*, not 'none'"),
    ],
)
def test_another_evaluation_in_the_folder_is_kept(
    saved: Path, other: dict[str, Any], named: str
) -> None:
    evaluate.run(quick(set=str(saved), networks=1))
    before = written(saved.parent)
    with pytest.raises(InputError, match=f"{named}.*--out.*--overwrite"):
        evaluate.run(quick(set=str(saved), networks=1, **other))
    assert written(saved.parent) == before
    result = evaluate.run(quick(set=str(saved), networks=1, overwrite=True, **other))
    assert written(saved.parent)["accuracies"] == list(result.accuracies)


def test_another_set_under_the_same_name_is_noticed(small: SyntheticSet, saved: Path) -> None:
    evaluate.run(quick(set=str(saved), networks=1))
    replace(small, images=small.images + 1e-3).save(saved)
    with pytest.raises(InputError, match="training_images is"):
        evaluate.run(quick(set=str(saved), networks=1))


def test_foreign_file_is_kept(saved: Path) -> None:
    (saved.parent / "evaluation.json").write_text("[]")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="no evaluation of this program"):
            evaluate.run(quick(set=str(saved), overwrite=overwrite))
    assert (saved.parent / "evaluation.json").read_text() == "[]"


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, "nothing to evaluate.*--baseline random"),
        ({"set": "x", "baseline": "random", "ipc": 1}, "exclude each other"),
        ({"set": "x", "ipc": 1}, "--ipc goes with --baseline"),
        ({"whole": True, "ipc": 1}, "--ipc goes with --baseline random; --whole has its own"),
        ({"set": "x", "whole": True}, "x and --whole exclude each other"),
        ({"indices": "x", "baseline": "random", "ipc": 1}, "--indices and --baseline exclude"),
        ({"indices": "not/there"}, "not/there cannot be read: No such file"),
        ({"baseline": "random"}, "needs --ipc"),
        ({"baseline": "random", "ipc": 0}, "needs --ipc of 1 or more, got 0"),
        ({"baseline": "random", "ipc": 141}, "class '8' of digits has 140 images"),
        ({"baseline": "best", "ipc": 1}, "--baseline: unknown value 'best'; choose from random"),
        ({"set": "x", "networks": 0}, "--networks must be 1 or more, got 0"),
        ({"set": "x", "epochs": -1}, "--epochs must be 0 or more, got -1"),
        ({"set": "x", "seed": -1}, "--seed must be from 0"),
        ({"set": "x", "seed": 2**63}, "--seed must be from 0"),
        ({"set": "x", "protocol": "new"}, "--protocol: unknown value 'new'; .* published"),
        ({"set": "not/there"}, "not/there: no such file"),
        ({"set": "x", "out": ""}, "--out is empty"),
        ({"baseline": "random", "ipc": 1, "model": "ConvNe"}, "unknown model 'ConvNe'"),
        ({"baseline": "random", "ipc": 1, "model": "ConvNetD4"}, "too small for depth 4"),
        ({"baseline": "random", "ipc": 1, "dsa_strategy": "blur"}, "unknown transform 'blur'"),
        ({"baseline": "random", "ipc": 1, "precision": "int8"}, "--precision.*'int8'"),
        ({"baseline": "random", "ipc": 1, "device": "tpu"}, "unknown device 'tpu'"),
        ({"baseline": "random", "ipc": 1, "dataset": "nodata"}, "'nodata' is neither"),
    ],
)
def test_wrong_options(
    options: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named) as error:
        evaluate.run(quick(**options))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"images": torch.zeros(20, 1, 9, 8)}, "images of 9x8 pixels and 1 channel, digits of 8x8"),
        (
            {"images": torch.zeros(20, 3, 8, 8), "mean": (0.0,) * 3, "std": (1.0,) * 3},
            "3 channels, digits of 8x8 pixels and 1 channel",
        ),
        ({"class_names": (), "labels": torch.arange(20) % 5}, "has 5 classes, digits has 10"),
        ({"soft_labels": torch.zeros(20, 9)}, "has 9 classes, digits has 10"),
        ({"zca": True}, "ZCA-whitened"),
        ({"learning_rate": -0.1}, "learning rate of -0.1, with which nothing is learned"),
        ({"factor": 2}, "images that hold 2x2 others"),
        ({"config": {}}, "give --dataset"),
        ({"config": {"dataset": "/gone"}}, "'/gone' is neither.*made of /gone: give --data"),
    ],
)
def test_sets_that_do_not_fit(
    small: SyntheticSet, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    path = tmp_path / "set.safetensors"
    replace(small, **changes).save(path)
    with pytest.raises(InputError, match=named) as error:
        evaluate.run(quick(set=str(path)))
    assert str(path) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["set.safetensors"]


def test_out_that_is_a_file(saved: Path) -> None:
    with pytest.raises(InputError, match=r"cannot be written.*a file is in the place"):
        evaluate.run(quick(set=str(saved), out=str(saved)))


def test_wrong_option_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dmfast.evaluate", "--baseline", "random", "--ipc", "0"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "python -m dmfast.evaluate: error: --baseline random needs --ipc of 1 or more, got 0"
    ]
    assert not list(tmp_path.iterdir())
