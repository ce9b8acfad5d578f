# SPDX-License-Identifier: MIT
"""Where the sets known by name, and those at a path, are found; and what is not taken for them."""

from __future__ import annotations

import shutil

import pytest
from image_sets import LAYOUTS, make, write_idx, write_parquet, write_tree
from test_data import cache_home, refuses

from dmfast import data

__all__ = ["cache_home"]  # a fixture for every test here

#: Means and standard deviations.
PUBLISHED = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2861,), (0.3530,)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)),
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)),
    "cifar100": ((0.5071, 0.4866, 0.4409), (0.2673, 0.2564, 0.2762)),
    "tiny-imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@pytest.mark.parametrize(
    ("name", "inner", "layout", "size", "classes"),
    [
        ("MNIST", "MNIST/raw", "idx", 28, 10),
        ("FashionMNIST", "fashion-mnist", "idx.gz", 28, 10),
        ("SVHN", "", "svhn", 32, 10),
        ("CIFAR10", "cifar-10-batches-py", "cifar10", 32, 10),
        ("cifar-10", "cifar10/plain_text", "parquet", 32, 10),
        ("cifar10", "", "tree", 32, 10),
        ("cifar100", "cifar-100-python", "cifar100", 32, 100),
        ("TinyImageNet", "tiny-imagenet-200", "tiny-imagenet", 64, 10),
    ],
)
def test_a_known_set_is_found_below_its_root_and_is_normalised_as_published(
    tmp_path, monkeypatch, name, inner, layout, size, classes
):
    written = make(size, classes, train=max(20, classes))
    folder = tmp_path / "root" / inner
    folder.mkdir(parents=True)
    LAYOUTS[layout](folder, written.grey() if layout.startswith("idx") else written)
    monkeypatch.setenv("DMFAST_DATA", str(tmp_path / "root"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "stray.parquet").write_bytes(b"of no set")
    for root in (tmp_path / "root", folder, None):
        read = data.load(name, root)
        assert read.name == data.canonical_name(name)
        assert (read.classes, read.size) == (classes, (size, size))
        assert (read.mean, read.std) == PUBLISHED[read.name]


def test_data_of_the_working_folder_goes_before_the_variable(tmp_path, monkeypatch):
    for root, train in (("data", 20), ("elsewhere", 30)):
        (tmp_path / root / "mnist").mkdir(parents=True)
        write_idx(tmp_path / root / "mnist", make(28, train=train).grey())
    monkeypatch.setenv("DMFAST_DATA", str(tmp_path / "elsewhere"))
    assert len(data.load("mnist").train_labels) == 20
    shutil.rmtree(tmp_path / "data")
    assert len(data.load("mnist").train_labels) == 30


def test_names_and_places(tmp_path):
    message = refuses("'cifar11' is neither a known data set", "cifar11")
    assert all(name in message for name in ("digits", "tiny-imagenet", "hf:owner/name"))
    refuses("'hf:cifar10' is neither", "hf:cifar10")
    refuses("'no/such/folder' is neither", "no/such/folder")
    refuses("neither", "")
    refuses(r"cifar10 was not found in ./data or \$DMFAST_DATA \(not set\)", "cifar10")
    refuses("put its folder .*, or fetch it with --download", "cifar10")
    refuses(f"svhn was not found in {tmp_path}", "svhn", tmp_path)
    refuses("data root .*nowhere does not exist", "mnist", tmp_path / "nowhere")
    (tmp_path / "cifar10").mkdir()
    refuses(f"{tmp_path}/cifar10 is empty: it should hold", tmp_path / "cifar10")
    refuses(f"{tmp_path}/cifar10 is empty", "cifar10", tmp_path)
    (tmp_path / "cifar10" / "notes.txt").touch()
    refuses("is of no known layout: it should hold idx", tmp_path / "cifar10")
    refuses("notes.txt is not an .npz file: give the folder", tmp_path / "cifar10" / "notes.txt")


def test_another_set_under_a_known_name(tmp_path):
    write_parquet(tmp_path, make(28))
    refuses("10 classes of images of 28 x 28 .* but cifar10 has 10 of 32 x 32", "cifar10", tmp_path)
    refuses("3 channels, but mnist has 10 of 28 x 28 .* 1 channel:", "mnist", tmp_path)


@pytest.mark.parametrize(
    ("name", "root", "inner", "layout", "other"),
    [
        ("svhn", "cifar10", "", "parquet", "cifar10"),
        ("svhn", "cifar10", "data", "parquet", "cifar10"),
        ("cifar10", "SVHN", "plain_text", "tree", "svhn"),
        ("fashion-mnist", "MNIST", "raw", "idx.gz", "mnist"),
        ("fashion-mnist", "MNIST/raw", "", "idx", "mnist"),
        ("mnist", "mine", "raw", "idx", None),
        ("mnist", "fashion-mnist", "mnist", "idx", None),
        ("mnist", "fashion-mnist/data", "", "idx", None),  # a project of that name
    ],
)
def test_the_folder_of_another_set(tmp_path, name, root, inner, layout, other):
    folder = tmp_path / root / inner
    folder.mkdir(parents=True)
    written = make(28).grey() if layout.startswith("idx") else make()
    LAYOUTS[layout](folder, written)
    if other is None:
        assert data.load(name, tmp_path / root).name == name
    else:
        refuses(f"by its name, {other} and not {name}: give --dataset", name, tmp_path / root)


def test_the_class_names_of_another_set(tmp_path):
    write_tree(tmp_path, make())
    things = ["airplane", "automobile", "bird", "cat", "deer"]
    things += ["dog", "frog", "horse", "ship", "truck"]
    for split in ("train", "test"):
        for label, thing in enumerate(things):
            (tmp_path / split / f"class {label}").rename(tmp_path / split / thing)
    match = r"has the classes of cifar10 \(airplane, automobile, bird, ...\), not of svhn"
    refuses(match, "svhn", tmp_path)
    assert data.load("cifar10", tmp_path).class_names == tuple(things)
    for split in ("train", "test"):  # numbers may be of any set
        for label, thing in enumerate(things):
            (tmp_path / split / thing).rename(tmp_path / split / str(label))
    assert data.load("cifar10", tmp_path).class_names == tuple("0123456789")
    assert data.load("svhn", tmp_path).classes == 10


def test_a_path_is_made_absolute(tmp_path):
    write_tree(tmp_path / "cifar10", make())
    assert data.canonical_name("./cifar10") == str(tmp_path / "cifar10")
    assert data.load("./cifar10").name == str(tmp_path / "cifar10")


def test_class_folders_that_are_not_split(tmp_path):
    write_tree(tmp_path, make())
    refuses(r"class 0, class 1, class 2, ... are its classes.* train/<class>/", tmp_path / "train")
