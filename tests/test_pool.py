# SPDX-License-Identifier: MIT
"""Pools of trained networks: training them, what is kept, and matching on them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from recording import Tape
from safetensors.torch import load_file

from dmfast import InputError, _convnet, condense, data, pool, pretrain
from dmfast.condense import CondenseConfig
from dmfast.loop import Loop
from dmfast.matching import Matcher, initial_images
from dmfast.networks import get_network
from dmfast.pool import NetworkPool, State, parse_band
from dmfast.pretrain import PretrainConfig

MODEL = "ConvNetD2W16"
CPU = torch.device("cpu")


def config(out: Path, **options: Any) -> PretrainConfig:
    settings = {"model": MODEL, "networks": 2, "epochs": 3, "validation": 200}
    return PretrainConfig(**(settings | options), out=str(out))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("pools") / "pool"
    pretrain.run(config(folder))
    return folder


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits")


# ---- training


def test_a_state_is_kept_for_every_band_that_a_network_comes_to(
    trained: Path, digits: data.ImageData
) -> None:
    facts, states = pool.read(trained)
    assert facts["format"] == "dmfast-pool-1"
    assert (facts["dataset"], facts["model"], facts["validation"]) == ("digits", MODEL, 200)
    assert {state.network for state in states} == {0, 1}
    for number in (0, 1):
        of_network = [state for state in states if state.network == number]
        bands = [int(state.accuracy // 10) for state in of_network]
        assert len(set(bands)) == len(bands) >= 3
        assert of_network[0].step == 0
        steps = [state.step for state in of_network]
        assert steps == sorted(steps)
    files = {state.file for state in states}
    assert {path.name for path in trained.glob("*.safetensors")} == files
    expected = get_network(MODEL, 1, 10, (8, 8), seed=0).state_dict()
    for file in files:
        weights = load_file(trained / file)
        assert {name: w.shape for name, w in weights.items()} == {
            name: w.shape for name, w in expected.items()
        }


def test_accuracies_are_of_images_that_no_network_was_trained_on(
    digits: data.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And of the weights in the file."""
    seen: list[torch.Tensor] = []
    train = pretrain.train

    def spy(network: Any, images: Any, *rest: Any, **options: Any) -> None:
        seen.append(images.images)
        train(network, images, *rest, **options)

    monkeypatch.setattr(pretrain, "train", spy)
    states = pretrain.run(config(tmp_path / "p", networks=1))
    order = torch.randperm(len(digits.train_labels), generator=torch.Generator().manual_seed(0))
    apart = order[:200]
    rest = digits.train_images[order[200:].sort().values]
    assert torch.equal(seen[0], rest)
    network = get_network(MODEL, 1, 10, (8, 8), seed=0).eval()
    for state in states:
        network.load_state_dict(load_file(tmp_path / "p" / state.file))
        with torch.no_grad():
            logits = network(digits.normalise(digits.train_images[apart]))
        right = (logits.argmax(1) == digits.train_labels[apart]).double().mean().item()
        # Products of bfloat16 in training may decide a close one otherwise.
        assert 100 * right == pytest.approx(state.accuracy, abs=1.5)


def test_more_networks_are_the_same_as_at_once(trained: Path, tmp_path: Path) -> None:
    pretrain.run(config(tmp_path / "p", networks=1))
    pretrain.run(config(tmp_path / "p"))
    assert pool.read(tmp_path / "p")[1] == pool.read(trained)[1]
    for state in pool.read(trained)[1]:
        ours, others = load_file(tmp_path / "p" / state.file), load_file(trained / state.file)
        assert all(torch.equal(ours[name], others[name]) for name in others)


def test_interrupted_it_goes_on_with_the_same_network(
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    written: list[Path] = []
    write = pool.write_state

    def interrupt(path: Path, network: Any) -> None:
        write(path, network)
        written.append(path)
        if path.name.startswith("0001") and len(written) > 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pool, "write_state", interrupt)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(config(tmp_path / "p"))
    assert "1 of 2 networks are kept" in capsys.readouterr().err
    assert not list((tmp_path / "p").glob("0001-*"))
    pretrain.run(config(tmp_path / "p"))
    assert pool.read(tmp_path / "p")[1] == pool.read(trained)[1]


@pytest.mark.parametrize("number", [0, 1])
def test_killed_it_goes_on_with_the_same_network(
    number: int, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the network had written is there, and none of the handlers has run."""
    left = tmp_path / "p" / f"{number:04d}-999999.safetensors"
    seen: list[Path] = []

    def kill(path: Path, network: Any) -> None:
        write(path, network)
        if path.name.startswith(f"{number:04d}"):
            seen.extend(path.parent.iterdir())
            raise KeyboardInterrupt

    write = pool.write_state
    with monkeypatch.context() as patch:
        patch.setattr(pool, "write_state", kill)
        with pytest.raises(KeyboardInterrupt):
            pretrain.run(config(tmp_path / "p"))
    left.write_bytes(b"")
    (tmp_path / "p" / ".pool.1.partial.json").write_bytes(b"{")
    pretrain.run(config(tmp_path / "p"))
    assert tmp_path / "p" / "pool.json" in seen
    assert not left.exists()
    assert pool.read(tmp_path / "p")[1] == pool.read(trained)[1]


def test_what_is_there_is_not_trained_again(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pretrain, "train", None)
    pretrain.run(config(trained))
    assert "nothing was trained" in capsys.readouterr().err


def test_another_pool_is_kept(trained: Path, tmp_path: Path) -> None:
    before = (trained / "pool.json").read_bytes()
    with pytest.raises(InputError, match=r"another pool \(seed is 0, not 1\): --overwrite"):
        pretrain.run(config(trained, seed=1))
    assert (trained / "pool.json").read_bytes() == before
    (tmp_path / "thesis.txt").write_text("")
    with pytest.raises(InputError, match=r"holds thesis.txt, and no pool"):
        pretrain.run(config(tmp_path))
    pretrain.run(config(tmp_path / "p", networks=1, epochs=0))
    states = pretrain.run(config(tmp_path / "p", networks=1, epochs=0, seed=5, overwrite=True))
    files = {path.name for path in (tmp_path / "p").glob("*.safetensors")}
    assert files == {state.file for state in states}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"networks": 0}, "--networks must be 1 or more"),
        ({"validation": 0}, "--validation must be 1 or more"),
        ({"epochs": -1}, "--epochs must be 0 or more"),
        ({"seed": -1}, "--seed must be"),
        ({"precision": "half"}, "--precision"),
        ({"validation": 10_000}, r"--validation 10000: digits has \d+ training images"),
        ({"model": "ConvNetX"}, "unknown model"),
        ({"model": "nets.py:tiny"}, "a pool is of dmfast's networks"),
    ],
)
def test_wrong_options(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=named):
        pretrain.run(config(tmp_path / "p", **options))
    assert not (tmp_path / "p" / "pool.json").exists()


def test_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "dmfast.pretrain", "--networks", "0"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--networks must be 1 or more, got 0" in done.stderr


# ---- bands and drawing


@pytest.mark.parametrize(
    ("words", "inside", "outside"),
    [
        ("40-50", [40.0, 49.99], [39.99, 50.0]),
        ("70-", [70.0, 100.0], [69.9]),
        ("all", [0.0, 100.0], []),
        ("12.5-13", [12.5], [13.0]),
    ],
)
def test_bands(words: str, inside: list[float], outside: list[float]) -> None:
    band = parse_band(words)
    assert all(accuracy in band for accuracy in inside)
    assert not any(accuracy in band for accuracy in outside)


@pytest.mark.parametrize("words", ["", "40", "50-40", "40-40", "-40", "a-b", "40-50-60", "40%-50%"])
def test_words_that_are_no_band(words: str) -> None:
    with pytest.raises(InputError, match="--band must be LOW-HIGH"):
        parse_band(words)


def test_states_of_the_band_are_drawn_evenly_by_seed_and_step(trained: Path) -> None:
    network = get_network(MODEL, 1, 10, (8, 8), seed=0)
    states = pool.read(trained)[1]
    chosen = [state for state in states if 10 <= state.accuracy < 80]
    subject = NetworkPool(trained, "10-80", network, MODEL)
    assert subject.states == chosen
    first = [load_file(trained / state.file)["features.0.weight"] for state in chosen]

    def drawn(seed: int, step: int | torch.Tensor) -> int:
        subject.load_(seed, step)
        weights = dict(network.named_parameters())
        (which,) = [i for i, w in enumerate(first) if torch.equal(w, weights["features.0.weight"])]
        file = load_file(trained / chosen[which].file)
        assert all(torch.equal(file[name], weight) for name, weight in weights.items())
        return which

    made = [drawn(0, step) for step in range(200)]
    assert made == [drawn(0, torch.tensor([step])) for step in range(200)]
    assert made != [drawn(1, step) for step in range(200)]
    counts = torch.bincount(torch.tensor(made), minlength=len(chosen))
    assert counts.min() > 200 / len(chosen) / 3


def test_pools_that_cannot_be_used(trained: Path, tmp_path: Path) -> None:
    network = get_network(MODEL, 1, 10, (8, 8), seed=0)
    with pytest.raises(InputError, match=r"holds no pool.json: name the folder"):
        NetworkPool(tmp_path, "all", network, MODEL)
    with pytest.raises(InputError, match=r"no network of an accuracy in --band 99.9-.*from (0|10)"):
        NetworkPool(trained, "99.9-", network, MODEL)
    with pytest.raises(InputError, match=f"give --model {MODEL}"):
        NetworkPool(trained, "all", network, "ConvNet")
    larger = get_network(MODEL, 1, 10, (12, 12), seed=0)
    with pytest.raises(InputError, match="does not fit"):
        NetworkPool(trained, "all", larger, MODEL)
    for text in ("{}", "[" * 100_000):
        (tmp_path / "pool.json").write_text(text)
        with pytest.raises(InputError, match="is no pool of this program"):
            NetworkPool(tmp_path, "all", network, MODEL)
    facts, states = pool.read(trained)
    for state in (State("../x.safetensors", 0, 0, 50.0), State("x", 0, 0, float("nan"))):
        pool.write(tmp_path, facts, [state])
        with pytest.raises(InputError, match="is no pool of this program"):
            NetworkPool(tmp_path, "all", network, MODEL)
    pool.write(tmp_path, facts, [State("gone.safetensors", 0, 0, 50.0), *states])
    with pytest.raises(InputError, match=r"gone.safetensors cannot be read"):
        NetworkPool(tmp_path, "50-60", network, MODEL)


# ---- matching


def matcher(digits: data.ImageData, folder: Path) -> Matcher:
    network = get_network(MODEL, 1, 10, (8, 8), seed=0)
    return Matcher(
        digits,
        network,
        initial_images(digits, 1, "real", 0),
        **{"batch_real": 16, "strategy": "crop", "seed": 2, "lr": 1.0, "momentum": 0.5},
        pool=NetworkPool(folder, "30-", network, MODEL),
        device=CPU,
    )


def test_matching_goes_by_the_drawn_network(digits: data.ImageData, trained: Path) -> None:
    subject, other = matcher(digits, trained), matcher(digits, trained)
    losses = [subject.step(step).item() for step in range(6)]
    assert [other.step(step).item() for step in range(6)] == losses
    network = get_network(MODEL, 1, 10, (8, 8), seed=0)
    drawn = NetworkPool(trained, "30-", network, MODEL)
    random = Matcher(
        digits,
        network,
        initial_images(digits, 1, "real", 0),
        **{"batch_real": 16, "strategy": "crop", "seed": 2, "lr": 1.0, "momentum": 0.5},
        device=CPU,
    )
    # The same iteration with weights that are put there by hand.
    drawn.load_(2, 0)
    weights = {name: w.clone() for name, w in network.named_parameters()}
    random._draw_weights = lambda step: network.load_state_dict(weights)
    assert random.step(0).item() == losses[0]


def test_replayed_iterations_draw_from_the_pool(
    digits: data.ImageData, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Values are checked on the CPU only, where reading them waits for nothing.
    monkeypatch.setattr(_convnet, "_check_values", lambda *tensors: None)
    subject, eager = matcher(digits, trained), matcher(digits, trained)
    tape = Tape()
    loop = Loop(subject, recorder=tape, required=True)
    with loop:
        while loop.iteration < 6:
            loop.advance()
        losses = loop.read()().losses
    assert tape.replayed == 4
    assert losses == [eager.step(step).item() for step in range(6)]


def test_condensing_and_resuming_on_a_pool(trained: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {
        **{"dataset": "digits", "model": MODEL, "ipc": 1, "batch_real": 16, "iterations": 4},
        **{"networks_from": str(trained), "band": "30-", "checkpoint_every": 2},
    }
    whole = condense.run(CondenseConfig(**options, out=str(tmp_path / "whole")))
    condense.run(CondenseConfig(**(options | {"iterations": 2}), out=str(tmp_path / "parts")))
    # The pool may be somewhere else, but must be the same.
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in trained.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    again = options | {"networks_from": str(moved), "resume": True, "out": str(tmp_path / "parts")}
    parts = condense.run(CondenseConfig(**again))
    assert torch.equal(parts.images, whole.images)
    assert json.loads((tmp_path / "parts" / "config.json").read_text())["options"]["band"] == "30-"
    plain = condense.run(
        CondenseConfig(
            **(options | {"networks_from": None, "band": None}), out=str(tmp_path / "plain")
        )
    )
    assert not torch.equal(plain.images, whole.images)
    with pytest.raises(InputError, match="was begun with --band '30-', not '40-'"):
        condense.run(CondenseConfig(**(again | {"band": "40-"})))
    facts, states = pool.read(moved)
    pool.write(moved, facts, states[:-1])
    with pytest.raises(InputError, match=r"with --networks-from, a pool of digest '\w+', not"):
        condense.run(CondenseConfig(**again))


def test_a_pool_of_another_data_set_is_mentioned(
    trained: Path,
    digits: data.ImageData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It may be meant, so it is no error; what shares no more than the shape is used as well."""

    def notes(name: str, change: int = 0) -> list[str]:
        images = digits.train_images + change
        changed = replace(digits, name=name, train_images=images)
        monkeypatch.setattr(condense, "load_data", lambda *_, **__: changed)
        capsys.readouterr()
        options = {"model": MODEL, "ipc": 1, "batch_real": 16, "iterations": 1, "device": "cpu"}
        condense.run(
            CondenseConfig(
                **options, networks_from=str(trained), out=str(tmp_path / "run"), overwrite=True
            )
        )
        return capsys.readouterr().err.splitlines()

    assert notes("digits") == []
    assert notes("/elsewhere/digits.npz") == []  # the same images by another name
    assert notes("mnist", 1) == [
        f"dmfast.condense: the networks of {trained} were trained on digits, and what is condensed "
        "is mnist: if that is not meant, name a pool of python -m dmfast.pretrain --dataset mnist"
    ]
    (note,) = notes("digits", 1)
    assert "were trained on other images of the same name, and what is condensed is digits:" in note


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"band": "40-50"}, "--band goes with --networks-from"),
        ({"networks_from": "there", "band": "x"}, "--band must be"),
        ({"networks_from": "there"}, r"there holds no pool.json"),
        ({"networks_from": "there", "method": "dc"}, "--networks-from goes with --method dm"),
    ],
)
def test_wrong_options_of_condensing(
    options: dict[str, Any], named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named):
        condense.run(CondenseConfig(**options))
    assert not list(tmp_path.iterdir())


def test_tests_are_counted_as_they_are_made(trained: Path, tmp_path: Path, monkeypatch) -> None:
    tests = 0
    original = pretrain._Trainer._accuracy

    def counted(self):
        nonlocal tests
        tests += 1
        return original(self)

    monkeypatch.setattr(pretrain._Trainer, "_accuracy", counted)
    data_set = data.load("digits")
    pretrain.run(config(tmp_path / "pool", networks=1, epochs=9))
    assert tests == pretrain.count_tests(len(data_set.train_labels) - 200, 9)
