# SPDX-License-Identifier: MIT
"""Coresets: each choice against the algorithm written out, what is written, and interruption."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dmfast import InputError, coreset, data, evaluate, evaluator, selection, training
from dmfast.coreset import CoresetConfig, Forgetting, most_forgotten
from dmfast.evaluate import EvaluateConfig
from dmfast.networks import get_network
from dmfast.synthetic import SyntheticSet

MODEL = "ConvNetD1W8"
# For commands in other processes: this checkout, wherever they run.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(coreset.__file__).parents[1])}


@pytest.fixture(scope="module")
def digits() -> data.ImageData:
    return data.load("digits")


def choose(method: str, **options: Any) -> coreset.Coreset:
    if method != "random" and "trained" not in options:
        options = {"model": MODEL, "epochs": 2} | options
    return coreset.run(CoresetConfig(method, **{"ipc": 3} | options))


# ---- the greedy choices ------------------------------------------------------------------------


def plain_herding(features: np.ndarray, count: int) -> list[int]:
    mean, chosen = features.mean(0), []
    for k in range(count):
        target = mean * (k + 1) - features[chosen].sum(0)
        left = [i for i in range(len(features)) if i not in chosen]
        chosen.append(min(left, key=lambda i: np.square(target - features[i]).sum()))
    return chosen


def plain_k_center(features: np.ndarray, count: int) -> list[int]:
    chosen = [int(np.square(features - features.mean(0)).sum(1).argmin())]
    while len(chosen) < count:
        distances = np.square(features[:, None] - features[chosen]).sum(2).min(1)
        distances[chosen] = -1
        chosen.append(int(distances.argmax()))
    return chosen


GREEDY = [(selection.herding, plain_herding), (selection.k_center, plain_k_center)]


@pytest.mark.parametrize(("greedy", "plain"), GREEDY)
@pytest.mark.parametrize("shape", [(1, 3), (7, 1), (60, 5), (130, 33)])
def test_a_choice_is_that_of_the_algorithm_written_out(greedy, plain, shape) -> None:
    features = torch.randn(shape, generator=torch.Generator().manual_seed(1)).relu() + 0.1
    expected = plain(features.double().numpy(), shape[0])
    assert greedy(features, shape[0]).tolist() == expected
    assert greedy(features, 1).tolist() == expected[:1]


@pytest.mark.parametrize(("greedy", "plain"), GREEDY)
def test_of_equals_the_first_is_chosen(greedy, plain) -> None:
    """Whole numbers whose mean float64 holds exactly; every row is there twice."""
    rows = torch.randint(0, 3, (16, 4), generator=torch.Generator().manual_seed(0)).float()
    features = torch.cat([rows, rows])
    expected = plain(features.double().numpy(), 32)
    assert sorted(expected) == list(range(32))
    assert greedy(features, 32).tolist() == expected


@pytest.mark.parametrize(("greedy", "plain"), GREEDY)
def test_what_float32_cannot_tell_apart_is_chosen_as_in_exact_arithmetic(greedy, plain) -> None:
    """The rows differ in the last bits of numbers whose squares float32 rounds."""
    noise = torch.randint(0, 8, (40, 6), generator=torch.Generator().manual_seed(0))
    features = 4096 + noise.float() * 2**-10
    assert greedy(features, 20).tolist() == plain(features.double().numpy(), 20)


@pytest.mark.parametrize(("greedy", "plain"), GREEDY)
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_blocks_make_no_difference(greedy, plain, rows, monkeypatch) -> None:
    features = torch.randn(50, 9, generator=torch.Generator().manual_seed(2))
    whole = greedy(features, 30)
    monkeypatch.setattr(selection, "_ROWS", rows)
    assert torch.equal(greedy(features, 30), whole)


@pytest.mark.parametrize("count", [0, 5])
def test_a_count_that_cannot_be(count: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 4, got {count}"):
        selection.herding(torch.zeros(4, 2), count)


# ---- forgetting --------------------------------------------------------------------------------


def test_forgetting_events_are_counted_as_defined() -> None:
    """Right answers of four images over five epochs, in batches of another order each."""
    labels = torch.tensor([0, 1, 0, 1])
    right = [[1, 0, 0, 1], [0, 0, 1, 1], [1, 0, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1]]
    counter = Forgetting(labels)
    for epoch, answers in enumerate(right):
        order = torch.randperm(4, generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(3):
            said = torch.where(torch.tensor(answers)[rows].bool(), labels[rows], 1 - labels[rows])
            counter.see(rows, torch.eye(2)[said])
    assert counter.events().tolist() == [2, torch.inf, 1, 0]


def test_those_forgotten_most_are_chosen_and_equals_in_a_seeded_order(
    digits: data.ImageData,
) -> None:
    small = replace(
        digits,
        train_images=digits.train_images[:12],
        train_labels=torch.tensor([0, 1] * 6),
        class_names=("a", "b"),
    )
    forgotten = torch.tensor([0, 9, 5, 9, torch.inf, 9, 2, 9, 5, 9, 5, 9])
    first, tied = most_forgotten(small, forgotten, 3, seed=0).split(3)
    assert first[0] == 4
    assert set(first[1:].tolist()) < {2, 8, 10}
    for seed in range(3):
        drawn = coreset.draw_random(small, 3, seed, 0)
        assert torch.equal(most_forgotten(small, forgotten, 3, seed)[3:], drawn[3:])
    assert not torch.equal(most_forgotten(small, forgotten, 3, 1)[3:], tied)
    all_equal = torch.zeros(len(digits.train_labels))
    drawn = coreset.draw_random(digits, 100, 5, 0)
    assert torch.equal(most_forgotten(digits, all_equal, 100, 5), drawn)


def test_the_network_is_trained_as_an_evaluated_one_and_watched(
    digits: data.ImageData, tmp_path: Path
) -> None:
    """The counts and the choice, from the batches that the training says it made."""
    chosen = choose("forgetting", out=str(tmp_path / "out"), seed=4, precision="float32")
    network = get_network(MODEL, 1, 10, (8, 8), seed=0)
    coreset.initialise_(
        network, 4, 0, network_index=2**24, stream=coreset.Stream.EVALUATION_WEIGHTS
    )
    was_right, events, learned = (np.zeros(len(digits.train_labels), int) for _ in range(3))

    def watch(rows: torch.Tensor, logits: torch.Tensor) -> None:
        for row, answer in zip(rows.tolist(), logits.argmax(1).tolist(), strict=True):
            right = answer == digits.train_labels[row]
            events[row] += was_right[row] and not right
            was_right[row] = right
            learned[row] |= int(right)

    training.train(
        network,
        digits.normalise(digits.train_images),
        digits.train_labels,
        epochs=2,
        seed=4,
        index=2**24,
        on_batch=watch,
    )
    forgotten = np.where(learned == 1, events, np.inf)
    assert len(set(forgotten.tolist())) > 2
    expected = most_forgotten(digits, torch.tensor(forgotten), 3, 4)
    assert torch.equal(chosen.indices, expected)
    weights = coreset._read_features(tmp_path / "out" / "features.safetensors")[1]
    for name, weight in network.state_dict().items():
        assert torch.equal(weights[name], weight)


# ---- the command -------------------------------------------------------------------------------


@pytest.mark.parametrize("method", coreset.METHODS)
def test_a_coreset_is_balanced_repeats_and_evaluates(
    method: str, digits: data.ImageData, tmp_path: Path
) -> None:
    first = choose(method, out=str(tmp_path / "first"))
    labels = digits.train_labels[first.indices]
    assert torch.equal(labels, torch.arange(10).repeat_interleave(3))
    assert len(set(first.indices.tolist())) == 30
    again = choose(method, out=str(tmp_path / "again"))
    assert torch.equal(first.indices, again.indices)
    fewer = choose(method, out=str(tmp_path / "fewer"), ipc=2)
    assert torch.equal(fewer.indices, first.indices.view(10, 3)[:, :2].flatten())
    if method != "k-center":  # which may well find the same extremes
        other = choose(method, out=str(tmp_path / "other"), seed=1)
        assert not torch.equal(first.indices, other.indices)

    described = json.loads((tmp_path / "first" / "coreset.json").read_text())
    assert described["indices"] == first.indices.tolist()
    assert (described["method"], described["images_per_class"]) == (method, 3)
    assert (described["network"] is None) == (method == "random")
    assert {path.name for path in (tmp_path / "first").iterdir()} - {"features.safetensors"} == {
        "coreset.json",
        "grid.png",
        "synthetic.safetensors",
    }
    kept = SyntheticSet.load(tmp_path / "first")
    assert torch.equal(kept.images, digits.normalise(digits.train_images[first.indices]))
    assert torch.equal(kept.labels, labels)
    options = {"model": MODEL, "networks": 1, "epochs": 2}
    of_set = evaluate.run(EvaluateConfig(set=str(tmp_path / "first"), **options))
    of_indices = evaluate.run(
        EvaluateConfig(
            indices=str(tmp_path / "first" / "coreset.json"), out=str(tmp_path / "i"), **options
        )
    )
    assert of_set.accuracies == of_indices.accuracies


def test_random_is_the_baseline_of_the_first_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained_on: list[torch.Tensor] = []
    monkeypatch.setattr(evaluator, "train", lambda net, images, *_, **__: trained_on.append(images))
    random = choose("random", out=str(tmp_path / "a"), seed=7)
    options = {"networks": 1, "epochs": 0, "seed": 7, "model": MODEL}
    evaluate.run(EvaluateConfig(baseline="random", ipc=3, out=str(tmp_path / "b"), **options))
    assert torch.equal(random.synthetic.images, trained_on[0])


@pytest.mark.parametrize("method", ["herding", "k-center"])
def test_the_embeddings_of_a_class_are_compared(
    method: str, digits: data.ImageData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the trained network, at once, and in batches as small as one image."""
    chosen = choose(method, out=str(tmp_path / "a"), precision="float32")
    _, weights = coreset._read_features(tmp_path / "a" / "features.safetensors")
    weights.pop("forgotten")
    network = get_network(MODEL, 1, 10, (8, 8), seed=0)
    network.load_state_dict(weights)
    with torch.no_grad():
        features = network.eval().embed(digits.normalise(digits.train_images)).double().numpy()
    plain = {"herding": plain_herding, "k-center": plain_k_center}[method]
    expected = []
    for label in range(10):
        rows = np.flatnonzero(digits.train_labels.numpy() == label)
        expected += rows[plain(features[rows], 3)].tolist()
    assert chosen.indices.tolist() == expected
    monkeypatch.setattr(coreset, "_BATCH", 1)
    options = {"trained": str(tmp_path / "a"), "precision": "float32"}
    assert choose(method, out=str(tmp_path / "b"), **options).indices.tolist() == expected


def test_a_trained_network_is_taken_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    choose("herding", out=str(tmp_path / "a"), dsa_strategy="none")
    direct = choose("forgetting", out=str(tmp_path / "b"))
    monkeypatch.delattr(coreset, "train")
    shared = choose("forgetting", out=str(tmp_path / "c"), trained=str(tmp_path / "a"))
    assert torch.equal(shared.indices, direct.indices)
    assert not (tmp_path / "c" / "features.safetensors").exists()


def test_another_set_has_another_network(tmp_path: Path, digits: data.ImageData) -> None:
    choose("herding", out=str(tmp_path / "a"))
    np.savez(
        tmp_path / "set.npz",
        **{
            f"{split}_{what}": getattr(digits, f"{split}_{what}").numpy()[:200]
            for split in ("train", "test")
            for what in ("images", "labels")
        },
    )
    with pytest.raises(InputError, match=r"a/features.safetensors was trained on other images"):
        choose("herding", dataset=str(tmp_path / "set.npz"), trained=str(tmp_path / "a"))


# ---- folders and interruption ------------------------------------------------------------------


def test_a_coreset_is_read_replaced_only_if_asked_and_its_evaluation_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    first = choose("herding", out=str(out))
    for name in ("synthetic.safetensors", "grid.png"):
        (out / name).unlink()  # as a process that was killed between the two would leave it
    (out / "evaluation.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.delattr(coreset, "train")
        assert torch.equal(choose("herding", out=str(out)).indices, first.indices)
        assert "nothing was chosen" in capsys.readouterr().err
        assert (out / "grid.png").exists()
        with pytest.raises(InputError, match=r"images_per_class is 3, not 2.*--overwrite.*--out"):
            choose("herding", out=str(out), ipc=2)
        assert (out / "evaluation.json").exists()
        # The network is the same: it is not trained again.
        assert len(choose("herding", out=str(out), ipc=2, overwrite=True).indices) == 20
    assert not (out / "evaluation.json").exists()
    assert torch.equal(
        choose("herding", out=str(out), epochs=3, overwrite=True).indices,
        choose("herding", out=str(tmp_path / "fresh"), epochs=3).indices,
    )


@pytest.mark.parametrize(
    "changed", [[5, 999_999], [-1, 3], [3, 3], [0]], ids=["beyond", "below", "twice", "short"]
)
def test_a_damaged_coreset_is_named(changed: list[int], tmp_path: Path) -> None:
    choose("random", out=str(tmp_path))
    description = tmp_path / "coreset.json"
    content = json.loads(description.read_text())
    content["indices"][: len(changed)] = changed
    if len(changed) == 1:
        del content["indices"][0]
    description.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"coreset.json is damaged: --overwrite chooses anew"):
        choose("random", out=str(tmp_path))


def test_what_cannot_be_made_replaces_nothing(tmp_path: Path) -> None:
    first = choose("herding", out=str(tmp_path))
    with pytest.raises(InputError, match="too small for depth 9"):
        choose("herding", out=str(tmp_path), model="ConvNetD9", overwrite=True)
    assert torch.equal(choose("herding", out=str(tmp_path)).indices, first.indices)


@pytest.mark.parametrize("name", ["config.json", "synthetic.safetensors", "evaluation.json"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_files_of_something_else_are_left_alone(name: str, overwrite: bool, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {name} of something else than a coreset"):
        choose("random", out=str(tmp_path), overwrite=overwrite)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("content", ["[]", "{}", '{"indices": ["a"]}', "{"])
def test_a_description_of_something_else_is_left_alone(content: str, tmp_path: Path) -> None:
    (tmp_path / "coreset.json").write_text(content)
    with pytest.raises(InputError, match=r"coreset.json is no coreset of this program"):
        choose("random", out=str(tmp_path), overwrite=True)
    assert (tmp_path / "coreset.json").read_text() == content


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_training_starts_over(how: signal.Signals, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "dmfast.coreset", "herding", "--out", str(out)),
            *("--model", MODEL, "--ipc", "3", "--epochs", "100000"),
        ],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().startswith("training a ConvNetD1W8 on the whole real set")
    process.send_signal(how)
    _, errors = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert errors.splitlines() == [
            "nothing was kept; the same command starts over",
            "python -m dmfast.coreset: interrupted",
        ]
        assert not out.exists()
        choose("herding", out=str(out))
    else:
        assert json.loads((out / "coreset.json").read_text())["indices"] is None
        with pytest.raises(InputError, match="holds no indices"):
            evaluate.run(EvaluateConfig(indices=str(out / "coreset.json")))
        with pytest.raises(InputError, match=r"holds another coreset .*'epochs': 100000"):
            choose("herding", out=str(out))
        choose("herding", out=str(out), overwrite=True)
    assert torch.equal(
        SyntheticSet.load(out).images,
        choose("herding", out=str(tmp_path / "straight")).synthetic.images,
    )


def test_a_choice_that_is_interrupted_keeps_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(coreset, "embed", interrupt)
        with pytest.raises(KeyboardInterrupt):
            choose("herding", out=str(tmp_path))
    assert "the same command goes on from there" in capsys.readouterr().err
    monkeypatch.delattr(coreset, "train")
    assert len(choose("herding", out=str(tmp_path)).indices) == 30


# ---- bad input ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "options", "named"),
    [
        ("best", {}, "METHOD: unknown value 'best'; choose from random, herding"),
        ("random", {"ipc": 0}, "--ipc must be 1 or more, got 0"),
        ("herding", {"ipc": 141}, "--ipc 141: class '8' of digits has 140 images"),
        ("herding", {"epochs": -1}, "--epochs must be 0 or more, got -1"),
        ("random", {"seed": -1}, "--seed must be from 0"),
        ("random", {"out": ""}, "--out is empty"),
        ("random", {"precision": "int8"}, "--precision.*'int8'"),
        ("random", {"device": "tpu"}, "unknown device 'tpu'"),
        ("random", {"dataset": "nodata"}, "'nodata' is neither"),
        ("random", {"epochs": 3}, "--epochs is of a network, and random needs none"),
        ("random", {"trained": "x"}, "--trained is of a network"),
        ("herding", {"trained": "x", "epochs": 3}, "--epochs and --trained exclude each other"),
        ("herding", {"trained": "not/there"}, r"not/there/features.safetensors is not there"),
        ("herding", {"model": "ConvNe"}, "unknown model 'ConvNe'"),
        ("herding", {"model": "ConvNetD4"}, "too small for depth 4"),
        ("herding", {"dsa_strategy": "blur"}, "unknown transform 'blur'"),
    ],
)
def test_wrong_options(
    method: str,
    options: dict[str, Any],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=named) as error:
        choose(method, **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_network(tmp_path: Path) -> None:
    (tmp_path / "features.safetensors").write_bytes(b"mine")
    with pytest.raises(InputError, match=r"features.safetensors is no network of this program"):
        choose("herding", trained=str(tmp_path), out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_wrong_option_ends_with_status_2_and_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "dmfast.coreset", "random", "--ipc", "0"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    assert result.returncode == 2
    assert result.stderr.splitlines() == [
        "python -m dmfast.coreset: error: --ipc must be 1 or more, got 0"
    ]
    assert not list(tmp_path.iterdir())
