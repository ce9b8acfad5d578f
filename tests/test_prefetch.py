# SPDX-License-Identifier: MIT
"""Batches that are sent to the device: the bits of a set that lies there; how the thread ends."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recording import Tape
from test_condense import ARGUMENTS, assert_same_run, command, small
from test_loop import assert_same, run
from test_matching import matcher, three_classes
from torch import Tensor

from dmfast import _convnet, ops, prefetch
from dmfast.errors import InputError
from dmfast.loop import Loop
from dmfast.prefetch import Prefetcher
from dmfast.runs import RunFolder

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert "dmfast-prefetch" not in {thread.name for thread in threading.enumerate()}


@pytest.fixture
def images() -> Tensor:
    return torch.arange(40 * 6, dtype=torch.uint8).reshape(40, 1, 2, 3)


def index_of(step: int) -> Tensor:
    return torch.tensor([step, 2 * step, 39 - step])


@pytest.fixture
def batches(images: Tensor) -> Iterator[Prefetcher]:
    subject = Prefetcher(images, index_of, 3, CPU)
    yield subject
    subject.close()


# ---- the batches


def test_each_iteration_has_its_images_in_the_same_memory(batches, images) -> None:
    where = batches.batch.data_ptr()
    for step in (0, 1, 2, 2, 3, 10, 11, 4, 5, 5, 0):
        batches.load(step)
        assert torch.equal(batches.batch, images[index_of(step)])
    assert batches.batch.data_ptr() == where


def test_two_batches_are_gathered_ahead_and_no_more(images) -> None:
    drawn, held, more = [], threading.Semaphore(0), threading.Event()

    def draw(step: int) -> Tensor:
        drawn.append(step)
        held.release()
        if step == 4:
            more.set()
        return index_of(step)

    subject = Prefetcher(images, draw, 3, CPU)
    assert drawn == []
    subject.load(1)
    for _ in range(3):
        assert held.acquire(timeout=60)
    assert not more.wait(0.2)
    assert drawn == [1, 2, 3]
    subject.load(2)
    assert more.wait(60)
    subject.close()
    assert drawn == [1, 2, 3, 4]


def test_it_can_be_closed_and_loaded_again(batches, images) -> None:
    for step in (0, 1, 2):
        batches.load(step)
        batches.close()
        batches.close()
        assert torch.equal(batches.batch, images[index_of(step)])


def test_a_batch_that_cannot_be_gathered_is_an_error_of_its_iteration(images) -> None:
    def draw(step: int) -> Tensor:
        if step == 2:
            raise RuntimeError("the disk is gone\nand forty lines more")
        return index_of(step)

    subject = Prefetcher(images, draw, 3, CPU)
    subject.load(0)
    subject.load(1)
    for _ in range(2):
        with pytest.raises(InputError, match=r"of iteration 2 .* gathered: the disk is gone$"):
            subject.load(2)
    subject.load(1)
    assert torch.equal(subject.batch, images[index_of(1)])
    subject.close()


def test_an_interrupt_while_a_batch_is_awaited_loses_none(batches, images, monkeypatch) -> None:
    batches.load(0)

    def interrupted(slot: object, batch: Tensor) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prefetch._Slot, "read_into", interrupted)
        with pytest.raises(KeyboardInterrupt):
            batches.load(1)
    for step in (1, 2, 3):
        batches.load(step)
        assert torch.equal(batches.batch, images[index_of(step)])


# ---- iterations and runs on them


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("model", ["ConvNetD2W16", "ConvNetD2W8", "ConvNetD2W8BN"])
def test_iterations_have_the_bits_of_a_set_on_the_device(model: str, dtype, monkeypatch) -> None:
    monkeypatch.setattr(_convnet, "_check_values", lambda *tensors: None)
    data = three_classes()
    if dtype == torch.float32:
        data = replace(data, train_images=data.train_images / 255)
    resident, told, sent = (matcher(data, model, memory_budget=b) for b in (10**6, 0, 1))
    assert (resident.streams, told.streams, sent.streams) == (False, True, True)
    expected = [resident.step(step).item() for step in range(6)]
    assert [told.step(step).item() for step in range(6)] == expected
    assert run(Loop(sent, recorder=Tape()), 6) == expected
    assert_same(told, resident)
    assert_same(sent, resident)
    told.close()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run"


def test_a_run_has_the_bits_of_one_with_its_set_on_the_device(out: Path, capsys) -> None:
    small(out, iterations=8, memory_budget="64K")
    small(out, resume=True, memory_budget="0")
    words = capsys.readouterr().err
    assert words.count("\n") == 2
    assert words.startswith(
        "dmfast.condense: the real images take 0.088 MiB, and --memory-budget leaves 0.0625 MiB "
        "of cpu to them: they stay on the host, which sends each batch\n"
    )
    small(out.parent / "resident", memory_budget="1G")
    assert capsys.readouterr().err == ""
    assert_same_run(out.parent / "resident", out)


@pytest.mark.parametrize(
    ("error", "status"), [(KeyboardInterrupt, 130), (RuntimeError("no such image"), 2)]
)
def test_a_run_that_stops_ends_the_thread(out: Path, monkeypatch, capsys, error, status) -> None:
    original = ops.draw_batch

    def draw(*arguments, **options):
        if options.get("step") == 6 and threading.current_thread() is not threading.main_thread():
            raise RuntimeError("no such image")
        return original(*arguments, **options)

    def interrupted(slot, batch):
        reads.append(slot)
        if len(reads) == 6:
            raise KeyboardInterrupt
        return read(slot, batch)

    reads, read = [], prefetch._Slot.read_into
    with monkeypatch.context() as patch:
        if status == 130:
            patch.setattr(prefetch._Slot, "read_into", interrupted)
        else:
            patch.setattr(ops, "draw_batch", draw)
        arguments = (*ARGUMENTS, "--iterations", 12, "--memory-budget", 0, "--out", out)
        assert command(*arguments) == status
    if status == 130:
        assert RunFolder(out).read_checkpoint().iteration == 5
    else:
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.endswith(
            "the real images of iteration 6 could not be gathered: no such image; the checkpoint "
            "of iteration 4 is kept for --resume"
        )
    small(out, resume=True)
    small(out.parent / "straight")
    assert_same_run(out.parent / "straight", out)
