# SPDX-License-Identifier: MIT
"""The loop over iterations: recorded and replayed, read from, out of memory, without a graph."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from recording import Tape, waits
from test_condense import ARGUMENTS, assert_same_run, command, small
from test_matching import matcher, three_classes
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dmfast import _condense_options, _convnet, condense, devices, loop, matching
from dmfast.errors import InputError
from dmfast.evaluator import EvaluationResult
from dmfast.graphs import CudaGraphs, recorder_of
from dmfast.loop import Loop, Reading
from dmfast.matching import Matcher, initial_images
from dmfast.networks import get_network
from dmfast.runs import RunFolder

#: One that goes by the fused blocks, the same by torch's layers, and others that always do.
MODELS = ["ConvNetD2W16", "ConvNetD2W16 direct", "ConvNetD2W8BN", "ConvNetD1W8LN", "ConvNetD2W8NN"]


@pytest.fixture(autouse=True)
def nothing_is_read(monkeypatch) -> None:
    """Values are checked on the CPU only, where reading them waits for nothing."""
    monkeypatch.setattr(_convnet, "_check_values", lambda *tensors: None)


def build(model: str = MODELS[0], **options) -> Matcher:
    name, _, way = model.partition(" ")
    subject = matcher(three_classes(), name, **options)
    subject._network.fused = way != "direct"
    return subject


def state(matcher: Matcher) -> tuple[Tensor, Tensor]:
    return matcher.images.clone(), matcher.momentum_buffer.clone()


def assert_same(actual: Matcher, expected: Matcher) -> None:
    for a, b in zip(state(actual), state(expected), strict=True):
        assert torch.equal(a, b)


def run(loop: Loop, until: int) -> list[float]:
    with loop:
        while loop.iteration < until:
            loop.advance()
        return loop.read()().losses


def plain(matcher: Matcher, steps: range) -> list[float]:
    """Without any loop: each iteration told its number."""
    return [matcher.step(step).item() for step in steps]


# ---- recorded and replayed


@pytest.mark.parametrize("whole_gradient", [True, False])
@pytest.mark.parametrize("model", ["ConvNetD2W16BN", "ConvNetD2W8BN"])
def test_batch_norm_in_parts_can_be_recorded(
    model: str, whole_gradient: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matching, "_BATCH_NORM_BYTES", 0)
    if not whole_gradient:
        monkeypatch.setattr(matching, "_BATCH_NORM_GRADIENT_BYTES", 0)
    monkeypatch.setitem(matching._PIXELS_PER_PASS, "cpu", 5 * 12 * 8)
    replayed, eager = build(model), build(model)
    assert len(replayed._chunks[0].passes) > 1
    tape = Tape()
    losses = run(Loop(replayed, recorder=tape, required=True), 5)
    assert tape.replayed == 3
    assert losses == run(Loop(eager), 5)
    assert_same(replayed, eager)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_replayed_iterations_are_eager_ones(model: str, precision: str) -> None:
    replayed, eager, told = (build(model, precision=precision) for _ in range(3))
    tape = Tape()
    losses = run(Loop(replayed, recorder=tape, required=True), 7)
    assert (tape.recorded, tape.replayed) == (1, 5)
    assert losses == run(Loop(eager), 7) == plain(told, range(7))
    assert len(set(losses)) == 7
    assert_same(replayed, told)
    assert_same(eager, told)


@pytest.mark.parametrize("budget", [None, 0])
def test_a_loop_begins_at_any_iteration(budget: int | None) -> None:
    straight, resumed = build(), build(memory_budget=budget)
    expected = plain(straight, range(9))
    losses = run(Loop(resumed, recorder=Tape()), 4)
    losses += run(Loop(resumed, 4, recorder=Tape()), 9)
    assert losses == expected
    assert_same(resumed, straight)


@pytest.mark.parametrize("most_unread", [1, 3, 100])
def test_losses_come_in_order_whenever_they_are_read(most_unread: int) -> None:
    expected = plain(build(), range(11))
    with Loop(build(), recorder=Tape(), most_unread=most_unread) as subject:
        read = [subject.read()()]
        for _ in range(11):
            subject.advance()
            if subject.iteration in (1, 3, 8):
                read.append(subject.read()())
        read.append(subject.read()())
    assert [part.first for part in read] == [0, 0, 1, 3, 8]
    assert [len(part.losses) for part in read] == [0, 1, 2, 5, 3]
    assert [loss for part in read for loss in part.losses] == expected


def test_a_reading_is_of_its_moment() -> None:
    expected = plain(build(), range(8))
    subject = build()
    with Loop(subject, recorder=Tape(), most_unread=2) as going:
        for _ in range(5):
            going.advance()
        read = going.read()
        for _ in range(2):
            going.advance()
        subject.images[0, 0, 0, 0] = torch.nan
        going.advance()
        later = going.read()
    assert read() == Reading(0, expected[:5], True)
    first, losses, finite = later()
    assert (first, losses[:2], finite) == (5, expected[5:7], False)
    assert losses[2] != losses[2]


class NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not waits(func, args), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("model", MODELS)
def test_an_iteration_waits_for_nothing(model: str) -> None:
    subject = Loop(build(model))
    with NoWaiting():
        subject.advance()
        subject.advance()
    assert len(subject.read()().losses) == 2


@pytest.mark.parametrize(
    "call", [lambda x: x.sum().item(), lambda x: x[x > 0], lambda x: x + torch.tensor([1.0, 2.0])]
)
def test_what_waits_is_noticed(call: Callable[[Tensor], object]) -> None:
    """So that the test before this can fail."""
    x = torch.ones(2)
    with pytest.raises(AssertionError), NoWaiting():
        call(x)
    with pytest.raises(RuntimeError, match="not permitted when stream is capturing"):
        Tape().record(lambda: call(x))


def test_recording_takes_no_effect_and_bakes_in_what_the_host_has() -> None:
    """As on a GPU: what a test shows by a tape would else not show."""
    x, number = torch.zeros(2), [1]
    replay = Tape().record(lambda: x.add_(number[0]))
    assert x.tolist() == [0, 0]
    number[0] = 5
    replay()
    assert x.tolist() == [1, 1]


# ---- without a graph


class Failing(Tape):
    """Fails while it records, and again when the recording is ended, as CUDA does."""

    def __init__(self, *errors: Exception) -> None:
        super().__init__()
        self._errors = list(errors)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        if not self._errors:
            return super().record(function)
        try:
            raise self._errors.pop(0)
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")


def test_where_recording_fails_iterations_are_made_eagerly() -> None:
    subject, expected = build(), build()
    notes: list[str] = []
    failing = Failing(RuntimeError("operation not permitted\nand forty lines more"))
    assert run(Loop(subject, recorder=failing, note=notes.append), 6) == plain(expected, range(6))
    assert_same(subject, expected)
    assert notes == [
        "no CUDA graph, as an iteration could not be captured (operation not permitted): slower"
    ]


def test_where_it_is_required_that_is_an_error() -> None:
    subject, expected = build(), build()
    failing = Loop(subject, recorder=Failing(RuntimeError("no\nway")), required=True)
    with pytest.raises(InputError, match=r"^--graph required: .* \(no\); leave the option out"):
        run(failing, 6)
    assert failing.iteration == Tape.warm_up
    plain(expected, range(Tape.warm_up))
    assert_same(subject, expected)


def test_a_graph_cannot_be_required_of_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert recorder_of("auto", cpu) is recorder_of("off", cpu) is None
    with pytest.raises(InputError, match=r"--graph required: .*--device cuda"):
        recorder_of("required", cpu)
    with pytest.raises(InputError, match="--graph: unknown value 'on'; choose from auto, required"):
        recorder_of("on", cpu)


# ---- out of memory


@contextmanager
def room_for(classes: int) -> Iterator[None]:
    """A pass over more classes at once finds no memory."""
    original = matching._embed_real

    def embed(network, real, index, params, chunk, precision):
        if chunk.classes.stop - chunk.classes.start > classes:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return original(network, real, index, params, chunk, precision)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matching, "_embed_real", embed)
        yield


@pytest.mark.parametrize("recorder", [None, Tape])
def test_out_of_memory_halves_the_classes_and_makes_the_same_iteration(recorder) -> None:
    subject, expected, fewer = build(), build(), build(classes_per_step=2)
    notes: list[str] = []
    tape = recorder and recorder()
    with Loop(subject, recorder=tape, note=notes.append) as going:
        for _ in range(2):
            going.advance()
        with room_for(2):
            for _ in range(5):
                going.advance()
        losses = going.read()().losses
    assert losses[:2] == plain(expected, range(2))
    fewer.images.copy_(expected.images)
    fewer.momentum_buffer.copy_(expected.momentum_buffer)
    assert losses[2:] == plain(fewer, range(2, 7))
    assert_same(subject, fewer)
    assert notes == [
        "cpu has no memory for 3 classes at once: going on with 2 classes at once, as "
        "--classes-per-step 2 does from the start"
    ]
    if tape:  # warmed up anew, then recorded anew
        assert (tape.recorded, tape.replayed) == (1, 3)


def test_out_of_memory_while_recording_halves_them_too() -> None:
    subject, expected, fewer = build(), build(), build(classes_per_step=2)
    notes: list[str] = []
    failing = Failing(torch.OutOfMemoryError("CUDA out of memory."))
    losses = run(Loop(subject, recorder=failing, required=True, note=notes.append), 7)
    assert losses[:2] == plain(expected, range(2))
    fewer.images.copy_(expected.images)
    fewer.momentum_buffer.copy_(expected.momentum_buffer)
    assert losses[2:] == plain(fewer, range(2, 7))
    assert_same(subject, fewer)
    assert len(notes) == 1
    assert failing.replayed == 3


def test_where_one_class_is_too_many_the_error_says_what_to_lower(monkeypatch) -> None:
    monkeypatch.setattr(loop, "free_memory", lambda device: " (1.5 GiB of 79 GiB free)")
    subject, untouched = build(), build()
    notes: list[str] = []
    words = (
        r"^cpu has no memory for one class at a time \(1.5 GiB of 79 GiB free\): lower "
        r"--batch-real or --ipc, or choose --precision bfloat16 or a smaller --model$"
    )
    with room_for(0), pytest.raises(InputError, match=words):
        run(Loop(subject, note=notes.append), 1)
    assert [note.rpartition(" going on with ")[2].split(",")[0] for note in notes] == [
        "2 classes at once",
        "one class at a time",
    ]
    assert_same(subject, untouched)


def test_batch_norm_cannot_do_with_fewer_classes() -> None:
    with room_for(2), pytest.raises(InputError, match="no memory for 3 classes at once: lower"):
        run(Loop(build("ConvNetD2W8BN")), 1)


@pytest.mark.parametrize(
    ("error", "is_short"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("gather_augment: no memory for a tensor of shape [9, 3]"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_only_a_lack_of_memory_is_met_by_fewer_classes(
    monkeypatch, error: Exception, is_short: bool
) -> None:
    subject, errors, original = build(), [error], Matcher.gradient

    def gradient(self, step):
        if errors:
            raise errors.pop()
        return original(self, step)

    monkeypatch.setattr(Matcher, "gradient", gradient)
    if is_short:
        assert len(run(Loop(subject), 1)) == 1
        assert subject.classes_per_step == 2
    else:
        with pytest.raises(RuntimeError, match="illegal memory access"):
            run(Loop(subject), 1)


# ---- runs


@pytest.fixture
def tapes(monkeypatch) -> list[Tape]:
    """What runs record with, as if there were a GPU."""
    made: list[Tape] = []

    def recorder_of(graph: str, device: torch.device) -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(condense, "recorder_of", recorder_of)
    return made


@pytest.mark.parametrize("model", ["ConvNetD1W8", "ConvNetD1W16", "ConvNetD1W8BN"])
def test_a_replayed_run_is_an_eager_one(tmp_path, monkeypatch, tapes, model: str) -> None:
    options = {"model": model, "report_every": 3}
    small(tmp_path / "replayed", iterations=7, **options, graph="required")
    small(tmp_path / "replayed", resume=True, **options, memory_budget="0")
    assert [tape.replayed for tape in tapes] == [5, 3]
    monkeypatch.undo()
    small(tmp_path / "eager", iterations=7, **options, graph="off")
    small(tmp_path / "eager", resume=True, **options)
    assert_same_run(tmp_path / "replayed", tmp_path / "eager")


def test_an_interrupt_between_replays_leaves_the_run_so_far(tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "stopped"

    def interrupt(number: int) -> None:
        if number == 5:  # in the middle of iteration 7, which is finished first
            signal.raise_signal(signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(condense, "recorder_of", lambda *_: Tape(interrupt))
        assert command(*ARGUMENTS, "--iterations", 12, "--out", out) == 130
    assert "stopped after iteration 7; --resume continues" in capsys.readouterr().out
    assert RunFolder(out).read_checkpoint().iteration == 7
    small(out, resume=True)
    small(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", out)


def test_a_run_is_evaluated_between_replays(tmp_path, monkeypatch, tapes) -> None:
    seen: list[float] = []

    def evaluate_set(images, labels, data, **options):
        seen.append(float(images.mean()))
        return EvaluationResult((50.0,), 0.0)

    monkeypatch.setattr(condense, "evaluate_set", evaluate_set)
    small(tmp_path / "replayed", evaluate_every=3)
    assert tapes[0].recorded == 1
    monkeypatch.undo()
    for iterations, mean in zip((3, 6, 9, 12), seen, strict=True):
        straight = small(tmp_path / "eager", iterations=iterations, resume=iterations > 3)
        assert mean == float(straight.images.mean())


@pytest.mark.parametrize("replays", [False, True])
def test_the_rate_has_the_time_of_the_device_and_not_of_the_disk(
    tmp_path, monkeypatch, replays: bool
) -> None:
    clock, read = [0.0], Loop.read

    def slow(seconds: float, call: Callable[..., object]) -> Callable[..., object]:
        def wait(*arguments: object) -> object:
            clock[0] += seconds
            return call(*arguments)

        return wait

    def reading(self: Loop) -> Callable[[], object]:
        made = self.iteration - self._read
        return slow(10.0 * made, read(self))

    monkeypatch.setattr(Loop, "read", reading)
    monkeypatch.setattr(RunFolder, "write_checkpoint", slow(1e6, RunFolder.write_checkpoint))
    monkeypatch.setattr(condense.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(condense, "recorder_of", lambda *_: Tape() if replays else None)
    small(tmp_path / "run", iterations=12, report_every=2, checkpoint_every=3)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images_per_second"] for line in lines] == [8.0] * 6


def test_a_run_out_of_memory_ends_in_one_line(tmp_path, tapes, capsys) -> None:
    out = tmp_path / "run"
    small(out, iterations=4)
    capsys.readouterr()
    with room_for(0):
        assert command(*ARGUMENTS, "--iterations", 12, "--resume", "--out", out) == 2
    *notes, line = capsys.readouterr().err.splitlines()
    assert [note.partition(": going on with ")[2].partition(" at ")[0] for note in notes] == [
        *("5 classes", "3 classes", "2 classes", "one class")
    ]
    assert all(note.startswith("dmfast.condense: cpu has no memory for ") for note in notes)
    assert line.endswith("or a smaller --model; the checkpoint of iteration 4 is kept for --resume")
    small(out, resume=True)
    small(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", out)


def test_a_gpu_too_small_for_the_set_is_named(tmp_path, monkeypatch) -> None:
    def full(self, *arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 16.00 GiB.")

    monkeypatch.setattr(condense, "Matcher", full)
    monkeypatch.setattr(condense, "recorder_of", lambda *_: None)
    monkeypatch.setattr(_condense_options, "resolve_device", lambda name: torch.device("cuda"))
    monkeypatch.setattr(condense, "memory_budget", lambda *_: 0)
    monkeypatch.setattr(devices, "free_memory", lambda device: " (1.5 GiB of 79 GiB free)")
    words = (
        r"^cuda has no memory for the images \(1.5 GiB of 79 GiB free\): choose a smaller --ipc "
        r"than 2, or --memory-budget 0$"
    )
    with pytest.raises(InputError, match=words):
        small(tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- on a GPU


def on_gpu(model: str, ipc: int = 2, **options) -> Matcher:
    data = three_classes()
    network = get_network(model, data.channels, data.classes, data.size, seed=0)
    settings = {"batch_real": 8, "strategy": "color_crop_cutout_flip_scale_rotate", "seed": 7}
    settings |= {"lr": 1.0, "momentum": 0.5, "precision": "bfloat16"}
    images = initial_images(data, ipc, "noise", seed=1)
    return Matcher(data, network, images, device=torch.device("cuda"), **(settings | options))


def graphs() -> CudaGraphs:
    return CudaGraphs(torch.device("cuda"))


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes_per_step", [None, 1])
@pytest.mark.parametrize("model", ["ConvNet", "ConvNetD2BN", "ConvNetD2W8LN", "ConvNetD2W8NNMP"])
def test_a_captured_iteration_is_an_eager_one(model: str, classes_per_step, precision) -> None:
    options = {"classes_per_step": classes_per_step, "precision": precision}
    captured, eager = on_gpu(model, **options), on_gpu(model, **options)
    losses = run(Loop(captured, recorder=graphs(), required=True), 20)
    assert losses == run(Loop(eager), 20)
    assert_same(captured, eager)


@pytest.mark.cuda
@pytest.mark.parametrize("budget", [None, 0])
def test_a_captured_run_goes_on_from_any_iteration(budget: int | None) -> None:
    straight, resumed = on_gpu("ConvNet"), on_gpu("ConvNet", memory_budget=budget)
    expected = run(Loop(straight, recorder=graphs(), required=True), 20)
    losses = run(Loop(resumed, recorder=graphs(), required=True), 9)
    losses += run(Loop(resumed, 9, recorder=graphs(), required=True), 20)
    assert losses == expected
    assert_same(resumed, straight)


@pytest.mark.cuda
@pytest.mark.parametrize("budget", [None, 0])
@pytest.mark.parametrize("model", ["ConvNet", "ConvNetBN"])
def test_replays_ask_nothing_of_the_host(model: str, budget: int | None) -> None:
    with Loop(on_gpu(model, memory_budget=budget), recorder=graphs(), required=True) as subject:
        for _ in range(CudaGraphs.warm_up + 1):
            subject.advance()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                subject.advance()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(subject.read()().losses) == CudaGraphs.warm_up + 21


@pytest.mark.cuda
def test_out_of_memory_on_a_gpu_halves_the_classes() -> None:
    """Eagerly and while it is captured: the limit is on what the process may take."""
    wide = {"ipc": 600, "classes_per_step": 3}
    total = torch.cuda.mem_get_info()[1]

    def taken(**options) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        subject = on_gpu("ConvNet", **(wide | options))
        expected.append(run(Loop(subject, recorder=graphs(), required=True), 8))
        return torch.cuda.max_memory_reserved()

    expected: list[list[float]] = []
    together, apart = taken(), taken(classes_per_step=2)
    if together < 1.2 * apart:
        pytest.skip("two classes take as much memory as three")
    subject, notes = on_gpu("ConvNet", **wide), []
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((together + apart) / 2 / total)
    try:
        losses = run(Loop(subject, recorder=graphs(), required=True, note=notes.append), 8)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert losses == expected[1]
    assert len(notes) == 1
    assert "no memory for 3 classes at once (" in notes[0]


@pytest.mark.cuda
def test_a_captured_run_is_an_eager_one(tmp_path) -> None:
    options = {"model": "ConvNet", "device": "cuda", "report_every": 3}
    small(tmp_path / "captured", iterations=7, **options, graph="required")
    small(tmp_path / "captured", resume=True, **options, graph="required", memory_budget="0")
    small(tmp_path / "eager", **options, graph="off")
    assert_same_run(tmp_path / "captured", tmp_path / "eager")


@pytest.mark.cuda
def test_a_capture_that_waits_is_named_and_the_run_goes_on(monkeypatch) -> None:
    captured, eager = on_gpu("ConvNet"), on_gpu("ConvNet")
    original, notes = Matcher.gradient, []

    def gradient(self, step):
        if torch.cuda.is_current_stream_capturing():
            step.item()
        return original(self, step)

    monkeypatch.setattr(Matcher, "gradient", gradient)
    losses = run(Loop(captured, recorder=graphs(), note=notes.append), 8)
    assert losses == run(Loop(eager), 8)
    assert len(notes) == 1
    assert notes[0].startswith("no CUDA graph, as an iteration could not be captured (")
