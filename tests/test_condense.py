# SPDX-License-Identifier: MIT
"""Runs of the condensing command: what they leave, how they end, and how they go on."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dmfast import _condense_options, cli, condense, devices, evaluate, matching
from dmfast.condense import CondenseConfig
from dmfast.errors import InputError
from dmfast.presets import preset
from dmfast.runs import RunFolder
from dmfast.synthetic import SyntheticSet

#: A run of a few milliseconds an iteration.
SMALL = CondenseConfig(
    model="ConvNetD1W8",
    ipc=2,
    iterations=12,
    batch_real=8,
    seed=5,
    device="cpu",
    report_every=2,
    checkpoint_every=4,
)
ARGUMENTS = (
    *("--model", "ConvNetD1W8", "--ipc", "2", "--batch-real", "8", "--seed", "5"),
    *("--device", "cpu", "--report-every", "2", "--checkpoint-every", "4"),
)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def small(out: Path, **changes) -> SyntheticSet:
    return condense.run(replace(SMALL, out=str(out), **changes))


def command(*arguments: object) -> int:
    """The exit status of the command with these arguments."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["dmfast.condense", *map(str, arguments)])
        # What it does to the allocator would outlast it.
        patch.setattr(condense, "keep_freed_pages", lambda: True)
        with pytest.raises(SystemExit) as exit:
            cli.main("dmfast.condense", condense._main)
    return exit.value.code


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, float]]:
    return [(record["iteration"], record["loss"]) for record in metrics(out)]


def assert_same_run(a: Path, b: Path) -> None:
    """To the bit, but for the time it took."""
    for name in ("checkpoint", "synthetic"):
        left, right = (load_file(out / f"{name}.safetensors") for out in (a, b))
        assert left.keys() == right.keys()
        for key in left:
            assert torch.equal(left[key], right[key]), (name, key)
    assert RunFolder(a).read_checkpoint().iteration == RunFolder(b).read_checkpoint().iteration
    assert losses(a) == losses(b)


# ---- a run and what it leaves


def test_a_run_leaves_its_folder(out: Path) -> None:
    result = small(out, iterations=30, lr_img=2.0)
    assert {path.name for path in out.iterdir()} == {
        *("config.json", "metrics.jsonl", "checkpoint.safetensors", "synthetic.safetensors"),
        *("grid.png", "loss.png"),
    }
    stored = SyntheticSet.load(out)
    assert torch.equal(stored.images, result.images)
    assert stored.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert stored.config["dataset"] == "digits"
    assert stored.config["iterations"] == 30

    config = json.loads((out / "config.json").read_text())
    assert config["options"]["lr_img"] == 2.0
    assert config["options"]["dsa_strategy"] == "color_crop_cutout_scale_rotate"
    assert config["versions"]["torch"] == torch.__version__

    records = metrics(out)
    assert [record["iteration"] for record in records] == list(range(2, 31, 2))
    assert records[-1].keys() == {
        *("iteration", "loss", "seconds", "images_per_second", "peak_memory_bytes")
    }
    first, last = (np.mean([r["loss"] for r in part]) for part in (records[:5], records[-5:]))
    assert last < 0.8 * first
    assert [r["seconds"] for r in records] == sorted(r["seconds"] for r in records)
    assert records[-1]["peak_memory_bytes"] > 50e6


def test_options_without_a_value_are_the_presets(out: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    condense.run(CondenseConfig(ipc=1, iterations=1, batch_real=2))
    options = json.loads(Path("runs/digits-ConvNet-ipc1-seed0/config.json").read_text())["options"]
    assert (options["model"], options["lr_img"], options["momentum"]) == ("ConvNet", 10.0, 0.5)
    assert options["classes_per_step"] == "auto"
    assert options["device"] in ("cpu", "cuda")


@pytest.mark.parametrize(
    ("dataset", "ipc", "model", "lr_img", "flips"),
    [
        ("mnist", 1, "ConvNet", 1, False),
        ("digits", 10, "ConvNet", 10, False),
        ("svhn", 10, "ConvNet", 1, False),
        ("fashion-mnist", 10, "ConvNet", 1, True),
        ("cifar10", 99, "ConvNet", 1, True),
        ("cifar10", 100, "ConvNet", 10, True),
        ("cifar100", 100, "ConvNet", 1, True),
        ("tiny-imagenet", 10, "ConvNetD4", 1, True),
        ("/some/folder", 10, "ConvNet", 1, True),
    ],
)
def test_the_presets_are_the_papers(dataset, ipc, model, lr_img, flips) -> None:
    chosen = preset(dataset, ipc)
    assert (chosen.model, chosen.lr_img, "flip" in chosen.dsa_strategy) == (model, lr_img, flips)
    assert (chosen.iterations, chosen.batch_real) == (20_000, 256)


@pytest.mark.parametrize(
    ("dataset", "ipc", "lr_img"),
    [
        ("cifar10", 1, 1),
        ("mnist", 10, 4),
        ("cifar10", 50, 4),
        ("cifar10", 100, 10),
        ("digits", 1, 10),
    ],
)
def test_the_fast_preset_sees_fewer_real_images(dataset, ipc, lr_img) -> None:
    paper, fast = preset(dataset, ipc), preset(dataset, ipc, "fast")
    assert (fast.iterations, fast.batch_real, fast.lr_img) == (500, 64, lr_img)
    assert (fast.model, fast.dsa_strategy) == (paper.model, paper.dsa_strategy)


def test_options_come_before_the_preset(out: Path) -> None:
    assert command(*ARGUMENTS, "--preset", "fast", "--iterations", 2, "--out", out) == 0
    options = json.loads((out / "config.json").read_text())["options"]
    named = {name: options[name] for name in ("preset", "batch_real", "iterations", "lr_img")}
    assert named == {"preset": "fast", "batch_real": 8, "iterations": 2, "lr_img": 10}
    # On resuming, too, only what follows from it counts.
    rest = ["--lr-img", 10, "--iterations", 4, "--out", out, "--resume"]
    assert command(*ARGUMENTS, *rest) == 0


@pytest.mark.parametrize(
    ("kernels", "model", "precision"),
    [
        ("avx512_bf16", "ConvNet", "bfloat16"),
        ("avx512_bf16", "ConvNetD4W64INAP", "bfloat16"),
        ("avx512_bf16,direct", "ConvNet", "float32"),
        ("avx512", "ConvNet", "float32"),
        ("avx512_bf16", "ConvNetBN", "float32"),
        ("avx512_bf16", "ConvNetW40", "float32"),
        ("avx512_bf16", "ConvNetMP", "float32"),
        ("avx512_bf16", "ConvNetAL", "float32"),
    ],
)
def test_auto_is_bfloat16_where_the_cpu_multiplies_it(monkeypatch, kernels, model, precision):
    monkeypatch.setattr(devices, "cpu_kernels", lambda: kernels)
    assert devices.resolve_precision("auto", torch.device("cpu"), model) == precision
    assert devices.resolve_precision("auto", torch.device("cuda"), model) == "bfloat16"
    for given in ("float32", "bfloat16"):
        assert devices.resolve_precision(given, torch.device("cpu"), model) == given


def test_small_classes_are_mentioned_once(out: Path, capsys) -> None:
    small(out, batch_real=142, iterations=4)
    words = capsys.readouterr().err
    assert words.count("fewer images than --batch-real 142") == 1
    assert "'8', has 140" in words


def test_other_settings_make_another_set(tmp_path: Path) -> None:
    changes = [
        *({}, {"seed": 6}, {"init": "noise"}, {"lr_img": 0.5}, {"momentum": 0.0}),
        *({"dsa_strategy": "none"}, {"batch_real": 9}, {"model": "ConvNetD1W8BN"}),
    ]
    sums = [
        small(tmp_path / str(i), iterations=2, **change).images.sum().item()
        for i, change in enumerate(changes)
    ]
    assert len(set(sums)) == len(changes)


def test_classes_per_step_changes_rounding_only(tmp_path: Path) -> None:
    together = small(tmp_path / "a")
    apart = small(tmp_path / "b", classes_per_step=3)
    torch.testing.assert_close(apart.images, together.images, rtol=1e-3, atol=1e-3)


# ---- stopping and going on


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path: Path) -> None:
    small(tmp_path / "straight", iterations=20)
    small(tmp_path / "resumed", iterations=8)
    # What a session wrote after its last checkpoint is not to be seen twice, or half.
    with (tmp_path / "resumed/metrics.jsonl").open("a") as file:
        file.write('{"iteration": 10, "loss": 1.0}\n{"iteration": 12, "lo')
    (tmp_path / "resumed/.checkpoint.7.partial.safetensors").write_bytes(b"half")
    small(tmp_path / "resumed", iterations=20, resume=True, checkpoint_every=3)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    assert not list((tmp_path / "resumed").glob(".*"))
    seconds = [record["seconds"] for record in metrics(tmp_path / "resumed")]
    assert seconds == sorted(seconds)


def start(*arguments: object, script: str = "") -> subprocess.Popen:
    """The command as a process of its own, after some lines of Python."""
    program = f"""
import sys
from dmfast import cli, condense
{script}
cli.main("dmfast.condense", condense._main)
"""
    return subprocess.Popen(
        [sys.executable, "-c", program, *ARGUMENTS, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )


def test_a_killed_run_is_resumed_to_the_same_bits(tmp_path: Path) -> None:
    out, folder = tmp_path / "killed", RunFolder(tmp_path / "killed")
    process = start("--iterations", 1_000_000, "--out", out)
    try:
        deadline = time.monotonic() + 600  # against a hang, not for speed
        while not (folder.checkpoint.exists() and folder.read_checkpoint().iteration >= 8):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    iterations = folder.read_checkpoint().iteration + 6
    small(out, iterations=iterations, resume=True)
    small(tmp_path / "straight", iterations=iterations)
    assert_same_run(tmp_path / "straight", out)


# Dies at its third checkpoint, when the new file lies beside the old one.
DIE_IN_REPLACE = """
import os, signal
from dmfast import files
replace, targets = os.replace, []
def dying(source, target):
    targets.append(target)
    if sum(target.name == "checkpoint.safetensors" for target in targets) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)
files.os.replace = dying
"""


@pytest.mark.slow
def test_a_run_killed_while_it_writes_a_checkpoint_has_the_last(tmp_path: Path) -> None:
    out = tmp_path / "killed"
    process = start("--iterations", 12, "--out", out, script=DIE_IN_REPLACE)
    _, words = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, words
    assert len(list(out.glob(".*.partial.*"))) == 1
    assert RunFolder(out).read_checkpoint().iteration == 4
    small(out, resume=True)
    small(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", out)
    assert not list(out.glob(".*"))


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path: Path, capsys) -> None:
    out = tmp_path / "killed"
    small(out, iterations=8)
    (out / "checkpoint.safetensors").unlink()
    small(out, resume=True)
    assert "has no checkpoint yet: starting over" in capsys.readouterr().err
    small(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", out)


@pytest.mark.parametrize("place", ["gradient", "update"])
def test_an_interrupt_leaves_the_run_so_far(tmp_path: Path, monkeypatch, capsys, place) -> None:
    out, original, calls = tmp_path / "stopped", getattr(matching.Matcher, place), []

    def interrupted(self, argument):
        calls.append(argument)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return original(self, argument)

    with monkeypatch.context() as patch:
        patch.setattr(matching.Matcher, place, interrupted)
        assert command(*ARGUMENTS, "--iterations", 12, "--out", out) == 130
    # In the middle of an update it is finished first; a gradient is dropped.
    made = 7 if place == "update" else 6
    output = capsys.readouterr()
    assert f"stopped after iteration {made}; --resume continues" in output.out
    assert output.err == "python -m dmfast.condense: interrupted\n"
    assert RunFolder(out).read_checkpoint().iteration == made
    assert SyntheticSet.load(out).config["iterations"] == made
    assert (out / "grid.png").exists()
    small(out, resume=True)
    small(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", out)


def test_a_finished_run_is_not_continued(out: Path, capsys) -> None:
    first = small(out)
    before = (out / "checkpoint.safetensors").read_bytes()
    (out / "synthetic.safetensors").unlink()
    assert command(*ARGUMENTS, "--iterations", 10, "--out", out, "--resume") == 0
    assert "has made its 12 iterations already" in capsys.readouterr().out
    assert (out / "checkpoint.safetensors").read_bytes() == before
    assert torch.equal(SyntheticSet.load(out).images, first.images)


def test_resuming_where_nothing_was_begun_starts(tmp_path: Path, capsys) -> None:
    small(tmp_path / "a", resume=True)
    assert f"{tmp_path / 'a'} holds no run yet: starting one" in capsys.readouterr().err
    small(tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_path_is_kept_for_commands_from_elsewhere(tmp_path: Path, monkeypatch) -> None:
    images = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8, 1)
    labels = np.array([0, 0, 1, 1])
    arrays = {"train_images": images, "train_labels": labels}
    np.savez(tmp_path / "set.npz", **arrays, test_images=images, test_labels=labels)
    monkeypatch.chdir(tmp_path)
    small(tmp_path / "run", dataset="set.npz", ipc=1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    small(tmp_path / "run", dataset="../set.npz", ipc=1, resume=True, iterations=14)
    config = evaluate.EvaluateConfig(set=str(tmp_path / "run"), networks=1, epochs=0)
    assert len(evaluate.run(config).accuracies) == 1


def test_the_rate_counts_the_real_images_of_the_time_between(out: Path, monkeypatch) -> None:
    clock = iter(range(0, 10**6, 10))
    monkeypatch.setattr(condense.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(condense._Condensation, "_write_checkpoint", lambda self: None)
    small(out, iterations=6, report_every=2)
    # A report reads the clock twice: for the time between the reports, and for that of the run.
    rates = [record["images_per_second"] for record in metrics(out)]
    assert rates[1] == 2 * 10 * 8 / 20


# ---- evaluations on the way


@pytest.fixture
def evaluations(monkeypatch) -> list[SimpleNamespace]:
    """Calls of the evaluation, which is replaced by the mean of the images."""
    calls: list[SimpleNamespace] = []

    def evaluate_set(images, labels, data, **options):
        calls.append(SimpleNamespace(images=images, labels=labels, data=data, **options))
        return evaluate.EvaluationResult((float(images.mean()),), 0.0)

    monkeypatch.setattr(condense, "evaluate_set", evaluate_set)
    return calls


def test_evaluations_are_recorded(out: Path, evaluations, capsys) -> None:
    result = small(out, evaluate_every=6)
    records = [record for record in metrics(out) if "accuracy_mean" in record]
    assert [record["iteration"] for record in records] == [6, 12]
    assert records[1]["accuracies"] == [pytest.approx(result.images.mean().item())]
    call = evaluations[0]
    assert call.epochs == 1000
    words = capsys.readouterr().out
    assert "iteration 6: training a network for 1001 epochs\niteration 6: accuracy" in words
    assert (call.model, call.networks, call.seed) == ("ConvNetD1W8", 1, 5)
    assert call.strategy == "color_crop_cutout_scale_rotate"


def test_without_graphs_evaluations_are_without(out: Path, evaluations) -> None:
    small(out, evaluate_every=6)
    small(out, evaluate_every=6, graph="off", overwrite=True)
    assert [call.graph for call in evaluations] == ["auto", "auto", "off", "off"]


def test_an_evaluation_that_was_interrupted_is_made_on_resuming(
    out: Path, evaluations, monkeypatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(condense, "evaluate_set", lambda *_, **__: signal.raise_signal(signal.SIGINT))
        with pytest.raises(KeyboardInterrupt):
            small(out, evaluate_every=6)
    assert RunFolder(out).read_checkpoint().iteration == 6
    small(out, evaluate_every=6, resume=True)
    small(out, evaluate_every=6, resume=True, iterations=14)
    records = [record for record in metrics(out) if "accuracy_mean" in record]
    assert [record["iteration"] for record in records] == [6, 12]


# ---- input that cannot be used


def errors_of(capsys) -> str:
    """The one line on stderr."""
    words = capsys.readouterr().err
    assert words.count("\n") == 1, words
    assert words.startswith("python -m dmfast.condense: error: ")
    return words


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--dataset nothing", "'nothing'"),
        ("--dataset cifar10 --data-root /not/there", "/not/there"),
        ("--model ConvNetQ", "'ConvNetQ'"),
        ("--model ConvNetD9", "too small"),
        ("--preset quick", "'quick'; choose from paper, fast"),
        ("--dsa-strategy color_blur", "'blur'.*rotate"),
        ("--init zeros", "--init.*'zeros'.*real, noise"),
        ("--precision half", "--precision.*'half'.*float32"),
        ("--graph on", "--graph: unknown value 'on'; choose from auto, required, off"),
        ("--graph required --device cpu", "--graph required: .*on a GPU only"),
        ("--memory-budget plenty", "--memory-budget must be auto or .*got 'plenty'"),
        ("--device tpu", "'tpu'"),
        ("--out=", "--out is empty"),
        (f"--ipc {10**12} --init noise", f"no memory for .*smaller --ipc than {10**12}$"),
        (f"--ipc {10**20} --init noise", f"no memory for .*smaller --ipc than {10**20}$"),
        (f"--ipc {10**17} --init noise", f"no memory for .*smaller --ipc than {10**17}$"),
        ("--ipc 0", "--ipc must be 1 or more, got 0"),
        ("--ipc 141", "--ipc 141.*class '8' of digits has 140.*noise"),
        ("--iterations -1", "--iterations must be from 1"),
        (f"--iterations {2**32 + 1}", "--iterations must be from 1"),
        ("--batch-real 0", "--batch-real must be 1"),
        (f"--batch-real {2**63}", f"--batch-real {2**63} is beyond any number of images"),
        ("--lr-img nan", "--lr-img must be a positive number, got nan"),
        ("--lr-img 0", "--lr-img"),
        ("--lr-img inf", "--lr-img"),
        ("--momentum 1", "--momentum"),
        ("--seed -1", "--seed"),
        (f"--seed {2**63}", "--seed"),
        ("--report-every 0", "--report-every"),
        ("--checkpoint-every 0", "--checkpoint-every"),
        ("--evaluate-every -1", "--evaluate-every"),
        ("--classes-per-step 0", "--classes-per-step must be auto, or 1 or more, got 0"),
        ("--classes-per-step some", "--classes-per-step"),
        ("--classes-per-step 2 --model ConvNetBN", "--classes-per-step: ConvNetBN normalises"),
        ("--resume --overwrite", "--resume and --overwrite exclude"),
        ("--ipc ten", "--ipc: invalid int value: 'ten'"),
        ("--blur 1", "--blur"),
        ("--num_exp 5", "--num_exp has no counterpart.*--seed"),
        ("--num_eval 20", "--num_eval.*--networks"),
        ("--epoch_eval_train 1000", "--epoch_eval_train.*--epochs"),
        ("--eval_mode SS", "--eval_mode.*--eval-mode"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(out: Path, capsys, arguments, words) -> None:
    assert command("--out", out, *arguments.split()) == 2
    line = errors_of(capsys)
    assert re.search(words, line), line
    assert not out.exists()


@pytest.mark.parametrize("precision", [[], ["--precision", "float32"]], ids=["auto", "float32"])
def test_a_wrong_dmfast_cpu_is_named_in_one_line(out: Path, precision: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dmfast.condense", *ARGUMENTS, *precision, "--out", out],
        env=os.environ | {"DMFAST_CPU": "sse9"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "DMFAST_CPU must be" in done.stderr
    assert "'sse9'" in done.stderr
    assert done.stderr.count("\n") == 1
    assert not out.exists()


def test_published_flags_are_taken(out: Path) -> None:
    published = (
        "--dataset digits --model ConvNetD1W8 --ipc 1 --Iteration 3 --lr_img 2 --batch_real 4 "
        f"--init noise --dsa_strategy color_crop --data_path . --save_path {out}"
    )
    assert command(*published.split()) == 0
    options = json.loads((out / "config.json").read_text())["options"]
    assert (options["iterations"], options["lr_img"], options["batch_real"]) == (3, 2.0, 4)
    assert (options["dsa_strategy"], options["data_root"]) == ("color_crop", ".")


def test_help_names_every_option(capsys) -> None:
    assert command("--help") == 0
    words = capsys.readouterr().out
    for field in CondenseConfig.__dataclass_fields__:
        assert ("--no-cache" if field == "cache" else _condense_options.flag(field)) in words


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"lr_img": 3.0}, "--lr-img 10.0, not 3.0"),
        ({"seed": 6}, "--seed 5, not 6"),
        ({"ipc": 3}, "--ipc 2, not 3"),
        ({"init": "noise"}, "--init 'real', not 'noise'"),
        ({"precision": "bfloat16"}, "--precision 'float32', not 'bfloat16'"),
        ({"dsa_strategy": "none"}, "--dsa-strategy 'color_crop_cutout_scale_rotate', not ''"),
    ],
)
def test_resuming_with_another_option_is_an_error(out: Path, option: dict, words: str) -> None:
    small(out, iterations=4)
    with pytest.raises(InputError, match=words):
        small(out, resume=True, **option)
    assert RunFolder(out).read_checkpoint().iteration == 4


def test_resuming_with_other_images_is_an_error(out: Path, tmp_path: Path) -> None:
    def write(fill: int) -> str:
        images = np.full((4, 8, 8, 1), fill, dtype=np.uint8)
        images[::2] = 0
        labels = np.array([0, 0, 1, 1])
        path = tmp_path / "set.npz"
        np.savez(
            path, train_images=images, train_labels=labels, test_images=images, test_labels=labels
        )
        return str(path)

    small(out, dataset=write(100), ipc=1)
    with pytest.raises(InputError, match="not those that"):
        small(out, dataset=write(101), ipc=1, resume=True, iterations=20)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint at all", None])
def test_a_damaged_checkpoint_is_named(out: Path, content: bytes | None) -> None:
    small(out, iterations=4)
    checkpoint = out / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-9] if content is None else content)
    with pytest.raises(InputError, match=r"checkpoint\.safetensors is not .*--overwrite"):
        small(out, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(out: Path, monkeypatch) -> None:
    original, count = matching.Matcher.gradient, []

    def exploding(self, step):
        loss, gradient = original(self, step)
        count.append(step)
        return (loss * torch.nan if len(count) == 7 else loss), gradient

    monkeypatch.setattr(matching.Matcher, "gradient", exploding)
    with pytest.raises(InputError, match=r"loss is nan at iteration 7: .*--lr-img.*iteration 4 is"):
        small(out)
    checkpoint = RunFolder(out).read_checkpoint()
    assert checkpoint.iteration == 4
    assert checkpoint.images.isfinite().all()


def test_images_that_are_not_finite_are_not_kept(out: Path, monkeypatch) -> None:
    original = matching.Matcher.update

    def exploding(self, gradient):
        original(self, gradient)
        self.images[0, 0, 0, 0] = torch.inf

    monkeypatch.setattr(matching.Matcher, "update", exploding)
    with pytest.raises(InputError, match=r"finite after iteration 1: .*iteration 0 is kept"):
        small(out, report_every=1)
    assert RunFolder(out).read_checkpoint().images.isfinite().all()


def test_a_run_leaves_the_global_generator_alone(out: Path) -> None:
    state = torch.get_rng_state()
    small(out, init="noise")
    assert torch.equal(torch.get_rng_state(), state)
