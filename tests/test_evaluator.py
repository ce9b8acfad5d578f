# SPDX-License-Identifier: MIT
"""Many networks trained at once: what each of them comes to, recorded epochs, lack of memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Tape

from dmfast import InputError, data, evaluate, evaluator, training
from dmfast._stack import NetworkStack, can_stack
from dmfast.devices import autocast
from dmfast.evaluate import EvaluateConfig
from dmfast.evaluator import Evaluator, evaluate_set
from dmfast.networks import ConvNet, get_network, initialise_
from dmfast.ops import Stream

MODEL = "ConvNetD2W16"
STRATEGY = "color_crop_cutout_flip_scale_rotate"
CPU = torch.device("cpu")
SIZE = (20, 12)


def random_set(count: int, classes: int = 4, channels: int = 3) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn((count, channels, *SIZE), generator=generator)
    return images, torch.arange(count) % classes


def network(seed: int = 0, channels: int = 3, model: str = MODEL) -> ConvNet:
    made = get_network(model, channels, 4, SIZE, seed)
    assert isinstance(made, ConvNet)
    return made


def stack_of(networks: int, first: int, channels: int = 3) -> NetworkStack:
    stack = NetworkStack(network(channels=channels), networks)
    stack.initialise_(3, first, Stream.EVALUATION_WEIGHTS)
    return stack


def alone(index: int, channels: int = 3) -> ConvNet:
    single = network(channels=channels)
    initialise_(single, 3, 0, network_index=index, stream=Stream.EVALUATION_WEIGHTS)
    return single


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits")


@pytest.fixture(scope="module")
def few(digits: data.ImageData) -> tuple[torch.Tensor, torch.Tensor]:
    """Thirty images, three of each class."""
    order, offsets = digits.by_class()
    index = torch.cat([order[start : start + 3] for start in offsets[:-1].tolist()])
    return digits.normalise(digits.train_images[index]), digits.train_labels[index]


# ---- the stack


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_networks_of_a_stack_compute_what_they_would_alone(channels: int, precision: str) -> None:
    images, _ = random_set(3 * 5, channels=channels)
    stack = stack_of(3, first=7, channels=channels)
    copy = network(channels=channels)

    @torch.no_grad()
    def logits_of(module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        with autocast(CPU, precision):
            logits: torch.Tensor = module(images)
        return logits

    logits = logits_of(stack, images).view(3, 5, 4)
    for number in range(3):
        of_network = images[number * 5 : number * 5 + 5]
        assert torch.equal(logits[number], logits_of(alone(7 + number, channels), of_network))
        stack.copy_to(copy, number)
        assert torch.equal(logits[number], logits_of(copy, of_network))


def test_a_stack_learns_all_but_what_norms_cancel() -> None:
    learned = {tuple(weight.shape) for weight in stack_of(2, 0).parameters()}
    blocks = {(2, 16, 3, 3, 3), (2, 16, 16, 3, 3), (2, 16)}
    assert learned == blocks | {(2, 4, 16 * 5 * 3), (2, 16)}, "the last bias is padded"


@pytest.mark.parametrize(
    ("model", "can"),
    [(MODEL, True), ("ConvNetD2W8", False), ("ConvNetD2W16BN", False), ("ConvNetD1W16MP", False)],
)
def test_what_can_be_stacked(model: str, can: bool) -> None:
    assert can_stack(network(model=model), CPU) == can


# ---- training


@pytest.mark.parametrize("own_images", [False, True])
@pytest.mark.parametrize("strategy", ["", STRATEGY])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_networks_trained_at_once_are_those_trained_alone(
    precision: str, strategy: str, own_images: bool
) -> None:
    """With three steps an epoch and a rate that falls."""
    tolerance = 1e-6 if precision == "float32" else 1e-3
    protocol = training.Protocol(batch=8, learning_rate=0.05)
    options: dict[str, Any] = {"epochs": 4, "seed": 9, "strategy": strategy, "precision": precision}
    images, labels = random_set(20 * (3 if own_images else 1))
    stack = stack_of(3, first=2)
    training.train(
        stack,
        images,
        labels,
        index=2,
        networks=3,
        own_images=own_images,
        protocol=protocol,
        **options,
    )
    copies = [network() for _ in range(2)]
    for number in range(3):
        rows = slice(number * 20, number * 20 + 20) if own_images else slice(None)
        single, plain = stack_of(1, first=2 + number), alone(2 + number)
        start = {name: weight.clone() for name, weight in plain.named_parameters()}
        for trained in (single, plain):
            training.train(
                trained, images[rows], labels[rows], index=2 + number, protocol=protocol, **options
            )
        stack.copy_to(copies[0], number)
        single.copy_to(copies[1], 0)
        weights = [dict(copy.named_parameters()) for copy in (*copies, plain)]
        for name, of_stack, of_single, of_plain in zip(
            start, *(w.values() for w in weights), strict=True
        ):
            if name not in ("features.0.bias", "features.4.bias"):
                assert torch.equal(of_stack, of_single), name
                assert not torch.equal(start[name], of_single), name
                torch.testing.assert_close(of_single, of_plain, rtol=0, atol=tolerance)


def test_soft_labels_are_learned_at_once() -> None:
    images, _ = random_set(12)
    labels = torch.rand(12, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
    stack, single, copy = stack_of(2, 0), alone(1), network()
    training.train(stack, images, labels, epochs=2, seed=0, networks=2)
    training.train(single, images, labels, epochs=2, seed=0, index=1)
    stack.copy_to(copy, 1)
    torch.testing.assert_close(copy.classifier.weight, single.classifier.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize("networks", [1, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_replayed_epochs_are_eager_ones(networks: int, precision: str) -> None:
    """Across the epoch whose rate falls, with a second and smaller batch."""
    images, labels = random_set(20)
    options: dict[str, Any] = {
        **{"epochs": 7, "seed": 1, "networks": networks, "strategy": STRATEGY},
        **{"precision": precision, "protocol": training.Protocol(batch=16, learning_rate=0.1)},
    }
    made: list[list[torch.Tensor]] = []
    tape = Tape()
    for recorder in (None, tape):
        trained = stack_of(networks, 0) if networks > 1 else alone(0)
        training.train(trained, images, labels, recorder=recorder, **options)
        made.append(list(trained.parameters()))
    assert (tape.recorded, tape.replayed) == (1, 6)
    for eager, replayed in zip(*made, strict=True):
        assert torch.equal(eager, replayed)


def test_epochs_of_real_images_can_be_recorded(digits: data.ImageData) -> None:
    """Which stay bytes until they are picked."""
    made = []
    for recorder in (None, Tape()):
        network = get_network(MODEL, 1, 10, (8, 8), seed=0)
        images, labels = digits.normalised(), digits.train_labels
        training.train(network, images, labels, epochs=3, seed=1, recorder=recorder)
        made.append(network.classifier.weight)
    assert torch.equal(*made)


# ---- the evaluator


def evaluated(digits: data.ImageData, few: Any, **options: Any) -> tuple[float, ...]:
    settings = {"model": MODEL, "networks": 5, "epochs": 12, "seed": 4, "strategy": STRATEGY}
    return evaluate_set(*few, digits, **(settings | options)).accuracies


def test_accuracies_do_not_depend_on_how_many_are_trained_at_once(
    digits: data.ImageData, few: Any
) -> None:
    expected = evaluated(digits, few, networks_at_once=1)
    assert len(set(expected)) > 1
    for at_once in (2, 3, 5, None):
        assert evaluated(digits, few, networks_at_once=at_once) == expected
    best = [
        evaluated(digits, few, networks_at_once=n, protocol="best-epoch", epochs=90) for n in (1, 4)
    ]
    assert best[0] == best[1] != evaluated(digits, few, epochs=90)


def test_as_many_at_once_as_are_of_use(digits: data.ImageData) -> None:
    def at_once(model: str, images: int, most: int | None = None) -> int:
        made = Evaluator(
            digits,
            **{"model": model, "epochs": 1, "seed": 0, "strategy": "", "precision": "float32"},
            **{"device": "cpu", "protocol": "published", "networks_at_once": most},
        )
        return made.networks_at_once(images)

    assert at_once(MODEL, 10) > at_once(MODEL, 100) > at_once(MODEL, 256) >= 1
    assert at_once(MODEL, 256) == at_once(MODEL, 50_000), "a batch counts, not the set"
    assert at_once(MODEL, 50_000, most=7) == 7
    assert at_once("ConvNetD2W16BN", 10) == at_once("ConvNetD2W16BN", 10, most=7) == 1


def test_progress_counts_networks(digits: data.ImageData, few: Any) -> None:
    calls: list[int] = []
    evaluated(digits, few, networks_at_once=3, epochs=2, on_epoch=calls.append)
    assert calls == [3] * 3 + [2] * 3


@pytest.mark.parametrize("set_", ["random", "whole", "indices"])
def test_every_kind_of_training_set_at_once(set_: str, tmp_path: Path) -> None:
    listed = tmp_path / "indices.json"
    listed.write_text(json.dumps(list(range(0, 600, 7))))
    what: dict[str, Any] = {
        "random": {"baseline": "random", "ipc": 2},
        "whole": {"whole": True, "epochs": 0},
        "indices": {"indices": str(listed), "dataset": "digits"},
    }[set_]
    made = [
        evaluate.run(
            EvaluateConfig(
                **{"model": MODEL, "networks": 3, "epochs": 3} | what,
                networks_at_once=at_once,
                out=str(tmp_path / str(at_once)),
            )
        ).accuracies
        for at_once in (1, 2, 3)
    ]
    assert made[0] == made[1] == made[2]


def test_a_finished_evaluation_is_extended_by_any_number_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(networks: int, at_once: int, out: str) -> tuple[float, ...]:
        config = EvaluateConfig(
            **{"baseline": "random", "ipc": 1, "model": MODEL, "epochs": 2},
            **{"networks": networks, "networks_at_once": at_once, "out": str(tmp_path / out)},
        )
        return evaluate.run(config).accuracies

    run(2, 2, "a")
    assert "networks 1 to 2 of 2: " in capsys.readouterr().out
    extended = run(5, 2, "a")
    said = capsys.readouterr().out
    assert "networks 3 to 4 of 5: " in said
    assert "network 5 of 5: " in said
    assert extended == run(5, 5, "b")


class OutOfMemory:
    """Stands in for training where at most some networks fit."""

    def __init__(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[int] = []
        train = training.train

        def limited(*arguments: Any, networks: int, on_epoch: Any, **options: Any) -> None:
            self.asked.append(networks)
            if networks > most:
                on_epoch()
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
            train(*arguments, networks=networks, on_epoch=on_epoch, **options)

        monkeypatch.setattr(evaluator, "train", limited)


def test_with_too_little_memory_fewer_are_trained_at_once(
    digits: data.ImageData, few: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluated(digits, few, precision="float32")
    notes: list[str] = []
    options: dict[str, Any] = {
        **{"model": MODEL, "epochs": 12, "seed": 4, "strategy": STRATEGY, "precision": "float32"},
        **{"device": "cpu", "protocol": "published", "note": notes.append},
    }
    epochs: list[int] = []
    stand_in = OutOfMemory(2, monkeypatch)
    trained = Evaluator(digits, **options)
    assert tuple(trained([few] * 5, 0, epochs.append)) == expected
    assert stand_in.asked == [5, 2, 3, 1, 2]
    assert sum(epochs) == 5 * 13
    assert trained.networks_at_once(30) <= 2
    assert [note for note in notes if "--networks-at-once 2" in note]
    OutOfMemory(0, monkeypatch)
    with pytest.raises(InputError, match=r"no memory for 1 network at once.*--precision bfloat16"):
        trained([few], 0)


def test_an_epoch_that_cannot_be_recorded_is_made_eagerly(
    digits: data.ImageData, few: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluated(digits, few, precision="float32")

    class Broken(Tape):
        def record(self, function: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(evaluator, "recorder_of", lambda graph, device: Broken())
    notes: list[str] = []
    options: dict[str, Any] = {
        **{"model": MODEL, "epochs": 12, "seed": 4, "strategy": STRATEGY, "precision": "float32"},
        **{"device": "cpu", "protocol": "published", "note": notes.append},
    }
    assert tuple(Evaluator(digits, **options)([few] * 5, 0)) == expected
    assert len(notes) == 1
    assert "could not be captured" in notes[0]
    assert "\n" not in notes[0]
    with pytest.raises(InputError, match=r"--graph required: .*not permitted"):
        Evaluator(digits, graph="required", **options)([few] * 5, 0)


def test_recorded_epochs_give_the_same_accuracies(
    digits: data.ImageData, few: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluated(digits, few), evaluated(digits, few, protocol="best-epoch", epochs=22)
    tape = Tape()
    monkeypatch.setattr(evaluator, "recorder_of", lambda graph, device: tape)
    assert evaluated(digits, few) == expected[0]
    assert evaluated(digits, few, protocol="best-epoch", epochs=22) == expected[1]
    assert tape.recorded == 2


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"networks_at_once": 0}, "--networks-at-once must be 1 or more, got 0"),
        ({"graph": "on"}, "--graph"),
    ],
)
def test_wrong_options(options: dict[str, Any], named: str) -> None:
    with pytest.raises(InputError, match=named):
        EvaluateConfig(whole=True, **options)


def test_wrong_arguments(digits: data.ImageData, few: Any) -> None:
    for name in ("networks", "networks_at_once"):
        with pytest.raises(InputError, match=f"{name} must be 1 or more, got 0"):
            evaluated(digits, few, **{name: 0})
    images, labels = few
    with pytest.raises(InputError, match="0 images with 0 labels"):
        evaluated(digits, (images[:0], labels[:0]))
    with pytest.raises(InputError, match="30 images with 29 labels"):
        evaluated(digits, (images, labels[:29]))


def test_graphs_are_of_a_gpu(digits: data.ImageData, few: Any) -> None:
    with pytest.raises(InputError, match="--graph required: there are CUDA graphs on a GPU only"):
        evaluated(digits, few, graph="required")


@pytest.mark.cuda
def test_captured_epochs_on_a_gpu_give_the_accuracies_of_eager_ones(
    digits: data.ImageData, few: Any
) -> None:
    options: dict[str, Any] = {"device": "cuda", "precision": "float32", "epochs": 40}
    captured, eager, single = (
        evaluated(digits, few, graph="required", **options),
        evaluated(digits, few, graph="off", **options),
        evaluated(digits, few, graph="off", networks_at_once=1, **options),
    )
    assert captured == pytest.approx(eager, abs=2)
    assert single == pytest.approx(eager, abs=5)
