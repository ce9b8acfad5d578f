# SPDX-License-Identifier: MIT
"""The condensed set: every format there and back, what is refused, and the picture."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from test_files import largest_file
from torch.utils.data import DataLoader, TensorDataset

from dmfast import export
from dmfast.errors import InputError
from dmfast.synthetic import FORMATS, SyntheticSet, save_grid

MEAN, STD = (0.49, 0.48, 0.45), (0.2, 0.25, 0.3)
FILE_FORMATS = tuple(name for name in FORMATS if name not in ("mtt", "png"))


def make_set(
    channels: int = 3, classes: int = 3, per_class: int = 2, **fields: Any
) -> SyntheticSet:
    """Images of which some leave [0, 1]."""
    torch.manual_seed(0)
    return SyntheticSet(
        1.5 * torch.randn(classes * per_class, channels, 8, 6),
        torch.arange(classes).repeat_interleave(per_class),
        **{
            "mean": MEAN[:channels],
            "std": STD[:channels],
            "class_names": tuple(f"class {label}" for label in range(classes)),
            "config": {"dataset": "cifar10", "lr_img": 1.0, "nested": {"ipc": 2}},
            **fields,
        },
    )


def same_tensor(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b is None or (a is not None and b is not None and torch.equal(a, b))


def test_native_format_loses_nothing(tmp_path: Path) -> None:
    condensed = make_set(
        soft_labels=torch.randn(6, 3), learning_rate=0.0123, zca=True, factor=2, config={"a": None}
    )
    condensed.save(tmp_path / "run" / "synthetic.safetensors")
    for path in (tmp_path / "run" / "synthetic.safetensors", tmp_path / "run"):
        back = SyntheticSet.load(path)
        for name in ("images", "labels", "soft_labels"):
            assert same_tensor(getattr(back, name), getattr(condensed, name)), name
        for name in ("mean", "std", "class_names", "config", "learning_rate", "zca", "factor"):
            assert getattr(back, name) == getattr(condensed, name), name


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("channels", [1, 3])
def test_there_and_back(tmp_path: Path, format: str, channels: int) -> None:
    condensed = make_set(channels)
    report = condensed.export(tmp_path / "set", format)
    # What each format says for itself has precedence over what is given here.
    given = {"res": True, "mtt": True, "idc": True}.get(format, False)
    back = SyntheticSet.load(
        tmp_path / "set",
        mean=condensed.mean if given else (0.5,) * channels,
        std=condensed.std if given else (0.5,) * channels,
        class_names=condensed.class_names if given else ("x",),
    )
    assert (back.mean, back.std) == (condensed.mean, condensed.std)
    assert back.class_names == condensed.class_names
    assert back.config == ({} if given else condensed.config)
    assert torch.equal(back.labels, condensed.labels)
    assert back.soft_labels is None
    if format in ("safetensors", "res", "mtt"):
        assert torch.equal(back.images, condensed.images)
        assert report == "nothing clipped or rounded"
        return
    clipped = condensed.unit_images().clamp(0, 1)
    step = 0.0 if format == "idc" else 0.5 / 255
    torch.testing.assert_close(back.unit_images(), clipped, rtol=0, atol=step + 1e-6)
    outside = (condensed.unit_images() != clipped).float().mean().item()
    assert f"{outside:.2%} of the values were outside [0, 1]" in report
    change = (back.images - condensed.images).abs().max().item()
    assert f"largest change {change:.2g} standard deviations" in report


def test_images_made_of_8_bits_come_back_unchanged(tmp_path: Path) -> None:
    condensed = make_set()
    condensed.export(tmp_path / "once", "png")
    once = SyntheticSet.load(tmp_path / "once")
    report = once.export(tmp_path / "twice", "parquet")
    assert "0.00% of the values were outside" in report
    assert torch.equal(SyntheticSet.load(tmp_path / "twice").images, once.images)


def test_soft_labels_and_learning_rate(tmp_path: Path) -> None:
    condensed = make_set(soft_labels=torch.eye(3).repeat_interleave(2, 0), learning_rate=1.0)
    report = condensed.export(tmp_path / "mtt", "mtt")
    assert "left out" not in report
    for path in (tmp_path / "mtt", *(tmp_path / "mtt").glob("*s_best.pt")):
        back = SyntheticSet.load(path)
        assert same_tensor(back.soft_labels, condensed.soft_labels)
        assert torch.equal(back.labels, condensed.labels)
        assert back.learning_rate == 1.0
    assert condensed.export(tmp_path / "res", "res").endswith(
        "; left out: soft labels, learning rate"
    )


@pytest.mark.parametrize("rate", [0.03, torch.tensor(0.03), torch.tensor([0.03])])
def test_published_mtt_files(tmp_path: Path, rate: object) -> None:
    torch.save(torch.randn(4, 3, 8, 8), tmp_path / "images_best.pt")
    torch.save(torch.tensor([0, 0, 1, 1]), tmp_path / "labels_best.pt")
    torch.save(rate, tmp_path / "lr_best.pt")
    back = SyntheticSet.load(tmp_path)
    assert (back.mean, back.class_names, back.classes) == ((), (), 2)
    assert back.learning_rate == pytest.approx(0.03)


def published_res(path: Path, experiments: int = 2) -> list[torch.Tensor]:
    """A file as the published code writes it: accuracies are numpy's numbers."""
    images = [torch.randn(2, 3, 4, 4) for _ in range(experiments)]
    data = [[image, torch.tensor([0, 1])] for image in images]
    accuracies = {"ConvNet": [np.float64(48.5), np.float64(49.25)], "AlexNet": [np.float32(7.5)]}
    torch.save({"data": data, "accs_all_exps": accuracies}, path)
    return images


def test_published_res_file(tmp_path: Path) -> None:
    path = tmp_path / "res_DM_CIFAR10_ConvNet_1ipc.pt"
    images = published_res(path)
    for experiment, wanted in ((-1, 1), (0, 0), (1, 1), (-2, 0)):
        back = SyntheticSet.load(path, experiment)
        assert torch.equal(back.images, images[wanted])
    accuracies = back.config["accs_all_exps"]
    assert accuracies == {"ConvNet": [48.5, 49.25], "AlexNet": [7.5]}
    for experiment in (2, -3):
        with pytest.raises(InputError, match=f"no experiment {experiment}: choose from 0 to 1"):
            SyntheticSet.load(path, experiment)

    back.export(tmp_path / "ours.pt", "res")
    ours = torch.load(tmp_path / "ours.pt")
    assert ours.keys() == {"data", "accs_all_exps"}
    assert ours["accs_all_exps"] == accuracies
    assert torch.equal(ours["data"][-1][0], back.images)
    assert ours["data"][-1][1].dtype == torch.int64


def test_published_res_file_of_numpy_1(tmp_path: Path) -> None:
    published_res(tmp_path / "new.pt")
    with (
        zipfile.ZipFile(tmp_path / "new.pt") as new,
        zipfile.ZipFile(tmp_path / "old.pt", "w") as old,
    ):
        for name in new.namelist():
            old.writestr(name, new.read(name).replace(b"numpy._core.", b"numpy.core."))
    assert SyntheticSet.load(tmp_path / "old.pt").config["accs_all_exps"]["ConvNet"] == [
        48.5,
        49.25,
    ]


# ---- exports, read as their readers do: plain torch.load, and the same subscripts --------------


def step_on(images: torch.Tensor, labels: torch.Tensor) -> None:
    """What every reader does with them: batches of a network's inputs and targets."""
    dataset = TensorDataset(images.detach().float(), labels.detach())
    for batch, targets in DataLoader(dataset, batch_size=4):
        logits = batch.flatten(1)[:, :3].requires_grad_()
        torch.nn.functional.cross_entropy(logits, targets).backward()


def exported(tmp_path: Path, format: str, **fields: Any) -> tuple[Path, SyntheticSet]:
    """In another layout than the usual one, and leaving [0, 1]."""
    condensed = make_set(**fields)
    condensed.images = condensed.images.to(memory_format=torch.channels_last)
    condensed.export(tmp_path / "set", format)
    return tmp_path / "set", condensed


def test_the_published_script_and_dc_bench_read_res(tmp_path: Path) -> None:
    """DC-BENCH: the last of ``data``; the published script and IDC's tests the same."""
    path, condensed = exported(tmp_path, "res", config={})
    content = torch.load(path)
    assert content["accs_all_exps"] == {}
    (experiment,) = content["data"]
    images, labels = experiment
    assert isinstance(experiment, list)
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(images, condensed.images)  # normalised, not clamped
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    step_on(images, labels)


def test_accuracies_of_res_are_plain_numbers(tmp_path: Path) -> None:
    """numpy's, as the published code writes them, are what a plain torch.load refuses."""
    published_res(tmp_path / "published.pt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load(tmp_path / "published.pt")
    SyntheticSet.load(tmp_path / "published.pt").export(tmp_path / "ours.pt", "res")
    accuracies = torch.load(tmp_path / "ours.pt")["accs_all_exps"]["ConvNet"]
    assert [type(accuracy) for accuracy in accuracies] == [float, float]


def test_mtt_and_dc_bench_read_mtt(tmp_path: Path) -> None:
    folder, condensed = exported(tmp_path, "mtt", learning_rate=0.02)
    assert sorted(path.name for path in folder.iterdir()) == [
        "images_best.pt",
        "labels_best.pt",
        "lr_best.pt",
    ]
    images = torch.load(folder / "images_best.pt")
    labels = torch.load(folder / "labels_best.pt")
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(images, condensed.images)
    step_on(images, labels.long())
    assert float(torch.load(folder / "lr_best.pt")) == 0.02


def test_the_readers_of_soft_labels_read_mtt(tmp_path: Path) -> None:
    """DATM and its like: one row of scores an image, and a rate for ``float``."""
    scores = torch.randn(6, 3)
    folder, _ = exported(tmp_path, "mtt", soft_labels=scores, learning_rate=0.02)
    labels = torch.load(folder / "labels_best.pt").float()
    assert torch.equal(labels, scores)
    step_on(torch.load(folder / "images_best.pt"), labels.softmax(1))


@pytest.mark.parametrize("soft", [False, True])
def test_dd_ranking_reads_mtt(tmp_path: Path, soft: bool) -> None:
    """Hard labels it numbers by itself, class by class, from the images a class."""
    fields = {"soft_labels": torch.randn(6, 3)} if soft else {}
    folder, condensed = exported(tmp_path, "mtt", learning_rate=0.02, **fields)
    images = torch.load(folder / "images_best.pt", map_location="cpu")
    assert torch.equal(images, condensed.images)
    labels = torch.load(folder / "labels_best.pt", map_location="cpu")
    if not soft:
        ipc = len(images) // condensed.classes
        assert labels.tolist() == [label for label in range(condensed.classes) for _ in range(ipc)]
    step_on(images, labels.softmax(1) if soft else labels)
    # What it publishes itself is named without "best".
    for kind in ("images", "labels", "lr"):
        (folder / f"{kind}_best.pt").rename(folder / f"{kind}.pt")
    back = SyntheticSet.load(folder)
    assert torch.equal(back.images, condensed.images)
    assert same_tensor(back.soft_labels, condensed.soft_labels)
    assert back.learning_rate == 0.02


def test_dd_ranking_itself_takes_mtt(tmp_path: Path) -> None:
    utils = pytest.importorskip("ddranking.utils", reason="ddranking does not import here")
    folder, condensed = exported(tmp_path, "mtt")
    dataset = utils.TensorDataset(
        *(torch.load(folder / f"{kind}_best.pt") for kind in ("images", "labels"))
    )
    assert len(dataset) == len(condensed.images)
    image, label = dataset[3]
    assert torch.equal(image, condensed.images[3])
    assert int(label) == 1


def test_idc_and_ncfm_read_idc(tmp_path: Path) -> None:
    """In [0, 1]: they normalise by themselves."""
    path, condensed = exported(tmp_path, "idc")
    content = torch.load(path)
    assert isinstance(content, list)
    images, labels = content
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert (images.min(), images.max()) == (0, 1)
    torch.testing.assert_close(images, condensed.unit_images().clamp(0, 1), rtol=0, atol=0)
    assert labels.tolist() == [0, 0, 1, 1, 2, 2]
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (MEAN, STD))
    step_on((images - mean) / std, labels)


class Malicious:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_file_is_not_run(tmp_path: Path, zipped: bool) -> None:
    path, made = tmp_path / "res.pt", tmp_path / "made"
    content = {"data": [[torch.zeros(1, 3, 4, 4), torch.tensor([0])]], "x": Malicious(made)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"asks for posix.mkdir.*unsafe=True"):
        SyntheticSet.load(path)
    assert not made.exists()
    SyntheticSet.load(path, unsafe=True)
    assert made.exists()


def test_pictures_from_elsewhere(tmp_path: Path) -> None:
    for index, name in enumerate(["cat/1.png", "dog/a.jpg", "dog/b.png"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (6, 8), (51 * index, 0, 255)).save(tmp_path / name, quality=100)
    with pytest.raises(InputError, match="mean and std"):
        SyntheticSet.load(tmp_path)
    back = SyntheticSet.load(tmp_path, mean=MEAN, std=STD)
    assert back.class_names == ("cat", "dog")
    assert back.labels.tolist() == [0, 1, 1]
    assert back.unit_images()[2, :, 0, 0].tolist() == pytest.approx([0.4, 0, 1], abs=1e-6)


def test_parquet_is_what_hugging_face_reads(tmp_path: Path) -> None:
    make_set().export(tmp_path / "set.parquet", "parquet")
    table = parquet.read_table(tmp_path / "set.parquet")
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features == {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": ["class 0", "class 1", "class 2"]},
    }
    assert str(table.schema.field("image").type) == "struct<bytes: binary, path: string>"
    assert table["label"].to_pylist() == [0, 0, 1, 1, 2, 2]
    # As another program would write it: without what this package adds.
    stripped = table.replace_schema_metadata({"huggingface": json.dumps({"info": {}})})
    parquet.write_table(stripped, tmp_path / "other.parquet")
    assert SyntheticSet.load(tmp_path / "other.parquet", mean=MEAN, std=STD).class_names == ()


def test_png_folders_are_in_the_order_of_the_labels(tmp_path: Path) -> None:
    names = (*"abcdefghij", "../x y")
    make_set(classes=11, class_names=names).export(tmp_path / "set", "png")
    folders = sorted(path.name for path in (tmp_path / "set").iterdir() if path.is_dir())
    assert folders[0] == "00_a"
    assert folders[-1] == "10_.._x_y"
    assert sorted(path.name for path in (tmp_path / "set" / "00_a").iterdir()) == [
        "00.png",
        "01.png",
    ]
    assert SyntheticSet.load(tmp_path / "set").class_names == names


def test_a_class_may_be_without_images(tmp_path: Path) -> None:
    condensed = make_set()
    condensed.labels[condensed.labels == 1] = 0
    for format in ("png", "parquet"):
        condensed.export(tmp_path / format, format)
        assert SyntheticSet.load(tmp_path / format).labels.tolist() == [0, 0, 0, 0, 2, 2]


IMAGES, LABELS = torch.rand(4, 3, 8, 8), torch.tensor([0, 0, 1, 1])
NAN = torch.full_like(IMAGES, float("nan"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"images": IMAGES}, "'data'"),
        ({"data": []}, "'data'"),
        ({"data": [[IMAGES]]}, "plain tensors of images and labels"),
        ({"data": [[IMAGES, LABELS.tolist()]]}, "plain tensors of images and labels"),
        ({"data": [[IMAGES.to_sparse(), LABELS]]}, "plain tensors of images and labels"),
        ({"data": [[IMAGES, LABELS]], "accs_all_exps": {"ConvNet": "x"}}, "accs_all_exps"),
        ({"data": [[NAN, LABELS]]}, "NaN"),
        ({"data": [[IMAGES[0], LABELS]]}, r"\[N, C, H, W\], not torch.float32 \[3, 8, 8\]"),
        ({"data": [[IMAGES[:0], LABELS[:0]]]}, r"\[0, 3, 8, 8\]"),
        ({"data": [[IMAGES, LABELS[:3]]]}, "one for each of 4 images"),
        ({"data": [[IMAGES, LABELS.float()]]}, "must be integers"),
        ({"data": [[IMAGES, LABELS.cfloat()]]}, "plain tensors of images and labels"),
        ([IMAGES.cfloat(), LABELS], "plain tensors of images and labels"),
        ({"data": [[IMAGES, LABELS - 1]]}, "from -1 to 0"),
        ({"data": [[IMAGES, LABELS + 9]]}, "from 9 to 10.* 0 to 9, as there are 10 class names"),
        ([IMAGES, LABELS, LABELS], "plain tensors of images and labels"),
        ([IMAGES * 2 - 1, LABELS], r"images from -\S+ to \S+ as \[images, labels\]"),
        ([NAN, LABELS], "images from nan"),
        ([IMAGES[:, :2], LABELS], "3 values, but the images 2 channels"),
        (IMAGES, r"name it images\*.pt"),
        ("text", "plain tensors of images and labels"),
    ],
)
def test_contents_that_are_no_set(tmp_path: Path, content: object, words: str) -> None:
    torch.save(content, tmp_path / "set.pt")
    with pytest.raises(InputError, match=words) as raised:
        SyntheticSet.load(
            tmp_path / "set.pt", mean=MEAN, std=STD, class_names=tuple(map(str, range(10)))
        )
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "set.pt") in str(raised.value)


@pytest.mark.parametrize(
    ("format", "keep"),
    # The last byte of a PNG file is part of a check sum that decoders leave alone.
    [
        (name, keep)
        for name in FORMATS
        for keep in (0, 0.3, 0.9, 0.999)
        if (name, keep) != ("png", 0.999)
    ],
)
def test_truncated_files(tmp_path: Path, format: str, keep: float) -> None:
    make_set().export(tmp_path / "set", format)
    file = max([tmp_path / "set", *(tmp_path / "set").rglob("*.p*")], key=lambda p: p.is_file())
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(InputError) as raised:
        SyntheticSet.load(tmp_path / "set", mean=MEAN, std=STD)
    assert "\n" not in str(raised.value)
    assert str(file) in str(raised.value)


def test_places_without_a_set(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "empty").mkdir()
    for name, words in (
        ("absent", "no such"),
        ("text.txt", "no known format"),
        ("empty", "no cond"),
    ):
        with pytest.raises(InputError, match=words):
            SyntheticSet.load(tmp_path / name)
    torch.save(IMAGES, tmp_path / "images_best.pt")
    with pytest.raises(InputError, match=r"labels_best.pt is missing"):
        SyntheticSet.load(tmp_path)
    make_set().save(tmp_path / "set.safetensors")
    with pytest.raises(InputError, match="no experiment 3"):
        SyntheticSet.load(tmp_path / "set.safetensors", 3)


def test_a_folder_of_runs(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_set().save(tmp_path / name / "synthetic.safetensors")
        save_grid(tmp_path / name / "grid.png", make_set())
    with pytest.raises(InputError, match="holds the runs a, b: name one of them"):
        SyntheticSet.load(tmp_path)


def test_an_archive_of_arrays(tmp_path: Path) -> None:
    np.savez(tmp_path / "set.npz", images=IMAGES.numpy())
    with pytest.raises(InputError, match="no known format: choose one of safetensors, res, mtt"):
        SyntheticSet.load(tmp_path / "set.npz")


def test_labels_in_a_column(tmp_path: Path) -> None:
    torch.save({"data": [[IMAGES, LABELS[:, None]]]}, tmp_path / "set.pt")
    back = SyntheticSet.load(tmp_path / "set.pt")
    assert torch.equal(back.labels, LABELS)
    assert back.soft_labels is None


def test_pictures_of_two_sizes(tmp_path: Path) -> None:
    make_set().export(tmp_path / "set", "png")
    Image.new("RGB", (7, 7)).save(tmp_path / "set" / "0_class_0" / "9.png")
    with pytest.raises(InputError, match=r"9\.png.* 7 x 7"):
        SyntheticSet.load(tmp_path / "set")


def test_parquet_without_a_label(tmp_path: Path) -> None:
    make_set().export(tmp_path / "set", "parquet")
    parquet.write_table(parquet.read_table(tmp_path / "set").drop(["label"]), tmp_path / "set")
    with pytest.raises(InputError, match="label"):
        SyntheticSet.load(tmp_path / "set")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 2}, "written by dmfast .*later"),
        ({"mean": "x"}, "cannot be read"),
        ({"std": [0.0, 1.0, 1.0]}, "std above 0"),
        ({"class_names": ["one"]}, "1 class names"),
        ({"config": None}, "cannot be read"),
    ],
)
def test_damaged_description(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    make_set().export(tmp_path / "set", "png")
    sidecar = tmp_path / "set" / "dmfast.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    with pytest.raises(InputError, match=words):
        SyntheticSet.load(tmp_path / "set")


@pytest.mark.parametrize("format", FORMATS)
def test_full_disk_leaves_what_was_there(tmp_path: Path, format: str) -> None:
    path = tmp_path / "set"
    if format in FILE_FORMATS:
        path.write_bytes(b"old")
    with largest_file(100), pytest.raises(OSError, match="too large") as raised:
        make_set().export(path, format)
    assert raised.value.filename == str(path)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"old"] * (format in FILE_FORMATS)


@pytest.mark.parametrize(
    ("fields", "format", "words"),
    [
        ({}, "gif", "'gif'; choose from safetensors, res, mtt, idc, png, parquet"),
        ({"zca": True}, "png", "ZCA"),
        ({"mean": ()}, "idc", "mean and std"),
        ({"channels": 2}, "parquet", "not 2"),
    ],
)
def test_exports_that_cannot_be(
    tmp_path: Path, fields: dict[str, Any], format: str, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        make_set(**fields).export(tmp_path / "set", format)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("format", FORMATS)
def test_exports_replace_no_folder(tmp_path: Path, format: str) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "mine").touch()
    with pytest.raises(InputError, match="name another place"):
        make_set().export(tmp_path / "set", format)
    assert [path.name for path in (tmp_path / "set").iterdir()] == ["mine"]


def grid(tmp_path: Path, condensed: SyntheticSet) -> np.ndarray[Any, Any]:
    save_grid(tmp_path / "grid.png", condensed)
    with Image.open(tmp_path / "grid.png") as picture:
        return np.asarray(picture)


def test_grid_shows_each_class_in_its_row(tmp_path: Path) -> None:
    condensed = make_set(channels=1, classes=10, per_class=10, mean=(0.0,), std=(1.0,))
    # Every image one grey level, told from its neighbours.
    levels = torch.arange(100) * 2
    condensed.images[:] = (levels / 255).view(-1, 1, 1, 1)
    condensed.images[99] = 7  # to be clipped
    picture = grid(tmp_path, condensed)
    assert picture.shape == (10 * (8 * 8 + 2) + 2, 10 * (6 * 8 + 2) + 2, 3)
    shown = picture[34 :: 8 * 8 + 2, 26 :: 6 * 8 + 2, 0]
    assert shown.flatten().tolist() == [*levels[:99].tolist(), 255]


@pytest.mark.parametrize(
    ("classes", "per_class", "shape"),
    [
        (10, 1, (2, 5)),
        (10, 50, (10, 10)),
        (47, 2, (10, 10)),
        (100, 1, (10, 10)),
        (100, 50, (20, 20)),
        (200, 10, (25, 32)),
    ],
)
def test_grid_is_about_square(
    tmp_path: Path, classes: int, per_class: int, shape: tuple[int, int]
) -> None:
    condensed = make_set(classes=classes, per_class=per_class)
    condensed.images = torch.zeros(classes * per_class, 3, 40, 40)
    picture = grid(tmp_path, condensed)
    cells = tuple(side // 42 for side in picture.shape[:2])
    assert cells[0] == shape[0]
    assert 0 <= cells[1] - shape[1] <= 1  # gaps between the classes


def test_export_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    published_res(tmp_path / "res.pt")
    options = ["--mean", "0.5", "0.5", "0.5", "--std", "0.2", "0.2", "0.2", "--experiment", "0"]
    out = tmp_path / "pictures"
    export._main([str(tmp_path / "res.pt"), "--format", "png", "--out", str(out), *options])
    assert f"{out}: 2 images, png: clipped and rounded" in capsys.readouterr().out
    assert SyntheticSet.load(out).mean == (0.5, 0.5, 0.5)

    command = [sys.executable, "-m", "dmfast.export", str(tmp_path / "res.pt"), "--format", "idc"]
    failed = subprocess.run(
        [*command, "--out", str(tmp_path / "x")], capture_output=True, text=True, check=False
    )
    assert failed.returncode == 2
    assert failed.stderr.count("\n") == 1
    assert "mean and std" in failed.stderr
    assert not (tmp_path / "x").exists()
