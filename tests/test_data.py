# SPDX-License-Identifier: MIT
"""Image sets: every layout read back as written, every bad one refused in one line."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from image_sets import (
    LAYOUTS,
    encoded,
    idx_bytes,
    make,
    table,
    write_cifar10,
    write_npz,
    write_parquet,
    write_parquet_shards,
    write_tree,
)
from PIL import Image
from pyarrow import parquet

from dmfast import data
from dmfast.errors import InputError


@pytest.fixture(autouse=True)
def cache_home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("DMFAST_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "cache"


def by_label(images: Any, labels: Any) -> list[tuple[int, bytes]]:
    """An order-free form: layouts of class folders keep no order of the whole."""
    pairs = zip(np.asarray(labels).tolist(), np.asarray(images), strict=True)
    return sorted((label, image.tobytes()) for label, image in pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_is_read_as_it_was_written(tmp_path, layout):
    written = make()
    if layout.startswith("idx"):
        written = written.grey()
    LAYOUTS[layout](tmp_path, written)
    read = data.load(str(tmp_path / "set.npz" if layout == "npz" else tmp_path))
    assert read.train_images.dtype == torch.uint8
    assert read.train_labels.dtype == read.test_labels.dtype == torch.int64
    assert by_label(read.train_images, read.train_labels) == by_label(*written[:2])
    assert by_label(read.test_images, read.test_labels) == by_label(*written[2:])
    if not layout.startswith(("tree", "tiny")):
        assert np.array_equal(read.train_labels, written.train_labels)
    unnamed = layout.startswith(("idx", "npz", "svhn"))
    assert read.class_names == tuple(f"{'' if unnamed else 'class '}{i}" for i in range(10))
    scaled = written.train_images / 255
    assert read.mean == pytest.approx(scaled.mean((0, 1, 2)), rel=1e-12)
    assert read.std == pytest.approx(scaled.std((0, 1, 2)), rel=1e-9)


def test_digits_need_no_files_and_are_split_by_class():
    digits = data.load("digits")
    assert digits.train_images.shape == (1442, 8, 8, 1)
    assert digits.test_images.shape == (355, 8, 8, 1)
    assert digits.train_images.max() == 255
    sizes = torch.bincount(digits.train_labels)
    tests = torch.bincount(digits.test_labels)
    assert torch.equal(tests, (sizes + tests) // 5)


def test_grey_and_palette_images_of_a_colour_set_become_rgb(tmp_path):
    written = make()
    write_tree(tmp_path, written)
    picture = min((tmp_path / "train" / "class 3").iterdir())
    grey = Image.fromarray(written.train_images[0]).convert("L")
    for mode in ("L", "P", "RGBA"):
        grey.convert(mode).save(picture)
        read = data.load(str(tmp_path))
        image = read.train_images[read.train_labels == 3][0]
        assert torch.equal(image, torch.tensor(np.array(grey))[..., None].expand(32, 32, 3))


@pytest.mark.parametrize("mode", ["L", "1", "LA", "P"])
def test_a_set_of_grey_images_alone_has_one_channel(tmp_path, mode):
    written = make().grey()
    if mode == "1":
        written = written._replace(train_images=written.train_images // 128 * 255)
    for split, images, labels in (("train", *written[:2]), ("test", *written[2:])):
        cells = [encoded(image, mode=mode if split == "train" else None) for image in images]
        parquet.write_table(table(cells, labels), tmp_path / f"{split}.parquet")
    assert np.array_equal(data.load(str(tmp_path)).train_images, written.train_images)


def test_names_in_metadata_do_not_make_classes(tmp_path):
    write_parquet_shards(tmp_path, make())
    assert data.load(str(tmp_path)).classes == 10


def test_float_sets_stay_float(tmp_path):
    written = make()
    scaled = written._replace(
        train_images=written.train_images / 255,
        test_images=(written.test_images / 255).astype(np.float16),
        train_labels=written.train_labels[:, None].astype(np.uint8),
    )
    write_npz(tmp_path, scaled)
    read = data.load(str(tmp_path / "set.npz"))
    assert read.train_images.dtype == read.test_images.dtype == torch.float32
    assert np.array_equal(read.train_images, scaled.train_images.astype(np.float32))
    assert np.array_equal(read.train_labels, written.train_labels)
    assert read.mean == pytest.approx((written.train_images / 255).mean((0, 1, 2)), rel=1e-6)


# ImageData


def test_classes_are_grouped_in_their_own_order(tmp_path):
    labels = np.array([2, 0, 1, 0, 2, 2, 1, 0, 2])
    write_npz(tmp_path, make(8, 3, train=9, test=3)._replace(train_labels=labels))
    read = data.load(str(tmp_path / "set.npz"))
    order, class_offsets = read.by_class()
    assert order.tolist() == [1, 3, 7, 2, 6, 0, 4, 5, 8]
    assert class_offsets.tolist() == [0, 3, 5, 9]
    offsets, rows = read.batch_offsets(3)
    assert (offsets.tolist(), rows) == ([0, 3, 5, 8], 8)
    assert offsets.dtype == class_offsets.dtype == order.dtype == torch.int64


@pytest.mark.parametrize("scale", [1, 255])
def test_normalise(tmp_path, scale):
    written = make(8)
    if scale == 255:
        written = written._replace(
            train_images=(written.train_images / 255).astype(np.float32),
            test_images=(written.test_images / 255).astype(np.float32),
        )
    write_npz(tmp_path, written)
    read = data.load(str(tmp_path / "set.npz"))
    normalised = read.normalise(read.train_images)
    expected = written.train_images.astype(np.float64) / (255 // scale)
    expected = (expected - read.mean) / read.std
    assert normalised.dtype == torch.float32
    assert normalised.is_contiguous()
    np.testing.assert_allclose(normalised, expected.transpose(0, 3, 1, 2), atol=1e-6)
    assert normalised.std((0, 2, 3), correction=0) == pytest.approx(1, abs=1e-5)


def test_a_constant_channel_normalises_to_zero(tmp_path):
    written = make(8)
    written.train_images[..., 2] = 77
    write_npz(tmp_path, written)
    read = data.load(str(tmp_path / "set.npz"))
    assert read.normalise(read.train_images)[:, 2].abs().max() < 1e-6


# The cache


@pytest.fixture
def count_decoded(monkeypatch) -> list[int]:
    opened: list[int] = []
    real = Image.open

    def counting(*args: Any, **options: Any) -> Image.Image:
        opened.append(1)
        return real(*args, **options)

    monkeypatch.setattr(Image, "open", counting)
    return opened


def test_images_are_decoded_once_until_a_byte_changes(tmp_path, cache_home, count_decoded):
    write_tree(tmp_path / "set", make())
    first = data.load(str(tmp_path / "set"))
    assert count_decoded
    count_decoded.clear()
    (tmp_path / "set").rename(tmp_path / "moved")
    again = data.load(str(tmp_path / "moved"))
    assert not count_decoded
    assert torch.equal(again.train_images, first.train_images)
    assert torch.equal(again.test_labels, first.test_labels)
    assert again.class_names == first.class_names
    changed = next((tmp_path / "moved" / "train" / "class 3").iterdir())
    changed.write_bytes(encoded(np.zeros((32, 32, 3), np.uint8)))
    assert not torch.equal(data.load(str(tmp_path / "moved")).train_images, first.train_images)
    changed.rename(changed.parents[1] / "class 4" / changed.name)
    moved = data.load(str(tmp_path / "moved"))
    assert (moved.train_labels == 4).sum() == 3


@pytest.mark.parametrize("damage", ["flipped", "truncated", "emptied"])
def test_a_damaged_cache_is_written_anew(tmp_path, cache_home, count_decoded, damage):
    write_parquet(tmp_path, make())
    first = data.load(str(tmp_path))
    (file,) = cache_home.rglob("*.npz")
    content = bytearray(whole := file.read_bytes())
    content[len(content) // 3] ^= 1
    file.write_bytes({"flipped": content, "truncated": whole[:-1000], "emptied": b""}[damage])
    count_decoded.clear()
    assert torch.equal(data.load(str(tmp_path)).train_images, first.train_images)
    assert count_decoded
    assert np.array_equal(np.load(file)["train_images"], first.train_images)


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_parquet(tmp_path, make())
    assert data.load(str(tmp_path)).classes == 10


def test_the_cache_can_be_turned_off(tmp_path, cache_home):
    write_parquet(tmp_path, make())
    data.load(str(tmp_path), cache=False)
    assert not cache_home.exists()


# Sets from elsewhere


class HubSplit:
    """The part of a split of the package ``datasets`` that is used."""

    def __init__(self, whole: pyarrow.Table) -> None:
        self.whole, self.column_names, self.cache_files = whole, whole.column_names, []

    def cast_column(self, column: str, feature: object) -> HubSplit:
        assert (column, feature) == ("image", {"decode": False})
        return self

    def with_format(self, kind: str) -> HubSplit:
        assert kind == "arrow"
        return self

    def __getitem__(self, rows: slice) -> pyarrow.Table:
        return self.whole[rows]


def test_a_hub_set_comes_through_datasets(monkeypatch):
    written = make()
    cells = [[{"bytes": encoded(i), "path": None} for i in images] for images in written[::2]]

    def load_dataset(name: str, configuration: str | None) -> dict[str, HubSplit]:
        if name != "owner/name":
            raise ConnectionError("no\nsuch set")
        assert configuration == "plain"
        train, test = (table(*pair) for pair in zip(cells, written[1::2], strict=True))
        return {"train": HubSplit(train), "valid": HubSplit(test)}

    package = types.SimpleNamespace(load_dataset=load_dataset, Image=dict)
    monkeypatch.setitem(sys.modules, "datasets", package)
    read = data.load("hf:owner/name:plain")
    assert np.array_equal(read.train_images, written.train_images)
    assert np.array_equal(read.test_labels, written.test_labels)
    with pytest.raises(InputError, match=r"hf:owner/other could not be fetched \(no such set\)"):
        data.load("hf:owner/other")


def test_downloading_by_torchvision(tmp_path, monkeypatch):
    def cifar10(root: str, download: bool) -> None:
        assert download
        folder = Path(root, "cifar-10-batches-py")
        folder.mkdir(parents=True)
        write_cifar10(folder, make())

    def mnist(root: str, download: bool) -> None:
        raise RuntimeError("no\nnetwork")

    torchvision = types.ModuleType("torchvision")
    torchvision.datasets = types.SimpleNamespace(CIFAR10=cifar10, MNIST=mnist)
    monkeypatch.setitem(sys.modules, "torchvision", torchvision)
    assert data.load("cifar10", tmp_path / "new", download=True).classes == 10
    assert data.load("cifar10", tmp_path / "new").classes == 10
    with pytest.raises(InputError, match=r"mnist could not be downloaded \(no network\)"):
        data.load("mnist", download=True)


def test_without_the_packages_one_line_says_what_to_install(monkeypatch):
    for package in ("datasets", "torchvision"):
        monkeypatch.setitem(sys.modules, package, None)
    for name in ("cifar10", "hf:uoft-cs/cifar10"):
        with pytest.raises(InputError, match="pip install datasets"):
            data.load(name, download=True)


# Bad input


def refuses(match: str, name: str | Path, root: Path | None = None) -> str:
    with pytest.raises(InputError, match=match) as caught:
        data.load(str(name), root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def cut(name: str, keep: float = 0.5) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob(name)
        content = file.read_bytes()
        file.write_bytes(content[: int(len(content) * keep)])

    return damage


def remove(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob(name)
        shutil.rmtree(file) if file.is_dir() else file.unlink()

    return damage


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob(name)
        file.write_bytes(content)

    return damage


def rename_suffix(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (file,) = folder.glob(name)
        file.rename(file.with_suffix(".gif"))

    return damage


def pickled(content: object) -> Callable[[Path], None]:
    return overwrite("data_batch_2", pickle.dumps(content, 2))


ROWS = np.zeros((4, 3072), np.uint8)


@pytest.mark.parametrize(
    ("layout", "damage", "match"),
    [
        ("idx", remove("t10k-labels*"), "t10k-labels-idx1-ubyte.gz is missing"),
        ("idx", cut("train-images*"), r"train-images-idx3-ubyte holds \d+ values, but its header"),
        (
            "idx",
            overwrite("t10k-labels*", idx_bytes(ROWS)),
            "t10k-labels.* is not an idx file of 1",
        ),
        ("idx", overwrite("t10k-labels*", idx_bytes(np.arange(9))), "10 images but 9 labels"),
        ("idx", overwrite("t10k-labels*", idx_bytes(np.full(10, 10))), "label 10 is outside"),
        ("idx.gz", cut("train-images*"), "train-images-idx3-ubyte.gz cannot be read"),
        ("cifar10", remove("data_batch_3"), "data_batch_3 is missing"),
        ("cifar10", cut("data_batch_3"), "data_batch_3 cannot be read, it may be truncated"),
        ("cifar10", pickled([1, 2]), "data_batch_2 holds a list, not a dictionary"),
        ("cifar10", pickled({"data": ROWS}), "data_batch_2 cannot be read"),
        ("cifar10", pickled({"data": ROWS[:, 1:], "labels": [0] * 4}), "not CIFAR's uint8"),
        ("cifar10", pickled({"data": ROWS, "labels": [0] * 3}), "4 images but 3 labels"),
        ("cifar10", pickled({"data": ROWS, "labels": [99] * 4}), "label 99 is outside the classes"),
        ("cifar100", remove("test"), "test is missing"),
        ("svhn", remove("test_32x32.mat"), "test_32x32.mat is missing"),
        ("svhn", cut("train_32x32.mat"), "train_32x32.mat cannot be read"),
        ("parquet", cut("train*"), "train-00000-of-00001.parquet cannot be read"),
        ("parquet", remove("test*"), "none of split test"),
        ("parquet shards", remove("train-00000*"), "holds 1 shards like .*, but they are 2"),
        ("tree", remove("test"), "train/ but no test, valid, validation or val folder"),
        ("tree", remove("train/class 4"), "test/class 4 is a class that .*train does not have"),
        ("tree", remove("test/class 4/*"), "class folder .*test/class 4 holds no image"),
        ("tree", cut("test/class 4/*"), "test/class 4/.*PNG cannot be decoded"),
        ("tree", rename_suffix("test/class 4/*"), r"no image \(.bmp, .jpeg, .jpg, .png, .webp\)"),
        ("tree", overwrite("test/class 4/*", b"GIF89a"), "replace it by a PNG, JPEG, WEBP, BMP"),
        ("tiny-imagenet", remove("train/n00000003"), "class folder .*n00000003 holds no image"),
        ("tiny-imagenet", remove("val/images/val_3.JPEG"), "lists 10 images, .* holds 9"),
        ("tiny-imagenet", cut("wnids.txt", 0.4), "is of class n0000000., not in wnids.txt"),
        ("npz", cut("set.npz"), "set.npz cannot be read"),
    ],
)
def test_damaged_layouts(tmp_path, layout, damage, match):
    written = make()
    LAYOUTS[layout](tmp_path, written.grey() if layout.startswith("idx") else written)
    damage(tmp_path)
    refuses(match, tmp_path / "set.npz" if layout == "npz" else tmp_path)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"train_images": None}, "has no array train_images: it needs"),
        ({"train_images": np.zeros((20, 3, 8, 8), np.uint8)}, r"\[20, 3, 8, 8\]: images are \[n"),
        ({"train_images": np.zeros((20, 8, 8, 3), np.int32)}, "is int32: save uint8, or float"),
        ({"train_images": np.full((20, 8, 8, 3), 1.5)}, r"is in \[1.5, 1.5\]: scale it to"),
        ({"train_images": np.full((20, 8, 8, 3), np.nan)}, "train_images has values that are NaN"),
        ({"test_images": np.full((10, 8, 8, 3), np.inf)}, "test_images has values that are NaN"),
        ({"train_images": np.zeros((0, 8, 8, 3), np.uint8)}, "training has 0 images but 20 labels"),
        ({"test_images": np.zeros((9, 8, 8, 3), np.uint8)}, "test has 9 images but 10 labels"),
        ({"test_images": np.zeros((10, 9, 8, 3), np.uint8)}, "are 8 x 8 .* test images are 8 x 9"),
        ({"test_images": np.zeros((10, 8, 8), np.uint8)}, "in 3 channels, but .* in 1 channel:"),
        ({"train_labels": np.arange(20) % 10 - 1}, "label -1 is outside the classes, 0 to 8"),
        ({"test_labels": np.arange(10) + 1}, "label 10 is outside the classes, 0 to 9"),
        ({"train_labels": np.arange(20) % 10 * 2}, "no training image has label 1, .* up to 18"),
        ({"train_labels": np.arange(20) / 2}, "labels are float64"),
        ({"train_labels": np.array([{}] * 20)}, "set.npz cannot be read"),
    ],
)
def test_unusable_arrays(tmp_path, changes, match):
    arrays = {**make(8)._asdict(), **changes}
    np.savez(tmp_path / "set.npz", **{k: v for k, v in arrays.items() if v is not None})
    refuses(match, tmp_path / "set.npz")


@pytest.mark.parametrize(
    ("cell", "label", "match"),
    [
        (encoded(np.zeros((8, 16, 3), np.uint8)), 0, r"row 7 is 16 x 8 .* row 0 is 8 x 8"),
        (encoded(np.zeros((8, 8, 3), np.uint8))[:45], 0, "row 7 cannot be decoded"),
        (encoded(np.zeros((8, 8), np.uint16)[..., None]), 0, "row 7 is of mode I;16"),
        (None, 0, "row 7 has no image bytes"),
        (encoded(np.zeros((8, 8, 3), np.uint8)), None, "label needs an integer in every row"),
        (encoded(np.zeros((8, 8, 3), np.uint8)), 11, "label 11 is outside the classes, 0 to 9"),
    ],
    ids=["size", "truncated", "16 bit", "null image", "null label", "label"],
)
def test_unusable_rows(tmp_path, cell, label, match):
    for split in ("train", "test"):
        cells: list[Any] = [encoded(image) for image in make(8).train_images]
        labels: list[Any] = (np.arange(20) % 10).tolist()
        cells[7], labels[7] = cell, label
        parquet.write_table(table(cells, labels), tmp_path / f"{split}.parquet")
    refuses(match, tmp_path)


def test_columns_of_another_name(tmp_path):
    for split in ("train", "test"):
        parquet.write_table(pyarrow.table({"image": [b""], "tag": [1]}), f"{split}.parquet")
    refuses("has the columns image, tag: it needs one named label or fine_label", tmp_path)


class Run:
    """Pickles as a call of anything."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.call[0], self.call[1:]


@pytest.mark.parametrize(
    ("hostile", "match"),
    [
        (pickle.dumps(Run(os.system, "touch ran"), 2), "asks for posix.system: only numpy arrays"),
        (pickle.dumps(Run(eval, "open('ran', 'w')"), 4), r"asks for \w+.eval: only numpy"),
        (pickle.dumps({"data": np.array([None])}, 2), "array of type 'O8' is not of plain numbers"),
        # An attribute set on what stands for numpy's function.
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x04nameK\x01s\x86b.", "has no state"),
    ],
)
def test_nothing_in_a_pickle_is_run(tmp_path, hostile, match):
    write_cifar10(tmp_path, make())
    (tmp_path / "data_batch_1").write_bytes(hostile)
    refuses(f"data_batch_1 .*{match}", tmp_path)
    assert not (tmp_path / "ran").exists()


# Real sets


def test_real_mnist(shared):
    read = data.load("mnist", shared / "data", cache=False)
    assert read.train_images.shape == (60000, 28, 28, 1)
    assert read.test_images.shape == (10000, 28, 28, 1)
    assert read.classes == 10
    normalised = read.normalise(read.train_images)
    assert normalised.mean() == pytest.approx(0, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes", "mean", "std"),
    [
        (
            "cifar10",
            10,
            (0.49139968, 0.48215841, 0.44653091),
            (0.24703223, 0.24348513, 0.26158784),
        ),
        (
            "cifar100",
            100,
            (0.50707516, 0.48654887, 0.44091784),
            (0.26733429, 0.25643846, 0.27615047),
        ),
    ],
)
def test_real_cifar(shared, name, classes, mean, std):
    read = data.load(str(shared / "data" / name), cache=False)
    assert read.train_images.shape == (50000, 32, 32, 3)
    assert read.test_images.shape == (10000, 32, 32, 3)
    assert torch.bincount(read.train_labels).tolist() == [50000 // classes] * classes
    assert read.mean == pytest.approx(mean, abs=1e-8)
    assert read.std == pytest.approx(std, abs=1e-8)


def test_real_tiny_imagenet(shared):
    read = data.load("tiny-imagenet", shared / "data" / "tiny_imagenet_first20", cache=False)
    assert read.train_images.shape == (10000, 64, 64, 3)
    assert read.test_images.shape == (1000, 64, 64, 3)
    assert read.classes == 20
    grey = (read.train_images == read.train_images[..., :1]).flatten(1).all(1)
    assert 0 < grey.sum() < 1000
