# SPDX-License-Identifier: MIT
"""The formats of a condensed set. A reader recognises its own by content; a writer is atomic.

Readers give the arguments of ``SyntheticSet``, or ``pixels`` (in [0, 1]) in place of ``images``.
Writers give the first half of the report of ``SyntheticSet.export``.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import _images, _unpickle
from ._readers import reading
from ._version import __version__
from .errors import InputError
from .files import atomic_path, write_bytes

if TYPE_CHECKING:
    from .synthetic import SyntheticSet

_SIDECAR = "dmfast.json"  # of a folder of pictures, and the key of metadata elsewhere is its stem
_DESCRIPTION_VERSION = 1
_UNCHANGED = "nothing clipped or rounded"


def read(path: Path, experiment: int, unsafe: bool) -> dict[str, Any]:
    """Whatever format ``path`` is of; arguments as of ``SyntheticSet.load``."""
    if path.is_dir():
        path = _file_in(path) or path
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    if path.is_dir():
        if runs := sorted(child.parent.name for child in path.glob("*/synthetic.safetensors")):
            raise InputError(f"{path} holds the runs {', '.join(runs)}: name one of them")
        fields = _read_folder(path)
    else:
        with reading(path), path.open("rb") as file:
            head = file.read(9)
        if head.startswith(b"PAR1"):
            fields = _read_parquet(path)
        elif head.endswith(b"{"):  # the 8 bytes before give the length of a JSON header
            fields = _read_safetensors(path)
        elif not head.startswith((b"PK", b"\x80")) or _is_other_archive(path):
            # torch's are zip archives or, before 1.6, pickles
            raise InputError(f"{path} is of no known format: choose one of {', '.join(FORMATS)}")
        else:
            content = _torch_load(path, unsafe)
            if isinstance(content, dict):
                return _from_res(content, experiment)
            is_tensor = isinstance(content, Tensor)
            fields = _read_mtt(path, unsafe) if is_tensor else _from_idc(content)
    if experiment not in (-1, 0):
        raise InputError(f"holds one set, so there is no experiment {experiment}; leave it out")
    return fields


def write(condensed: SyntheticSet, path: Path, format: str) -> str:
    """Arguments and result as of ``SyntheticSet.export``."""
    if format not in _WRITERS:
        raise InputError(f"unknown format {format!r}; choose from {', '.join(_WRITERS)}")
    is_folder = format in ("mtt", "png")
    if path.exists() and (not path.is_dir() or any(path.iterdir()) if is_folder else path.is_dir()):
        wanted = "a new folder" if is_folder else "a file"
        raise InputError(f"{path} exists; {format} is written to {wanted}: name another place")
    report = _WRITERS[format](condensed, path)
    beside_images = {  # whether the set has it, and the formats that keep it
        "soft labels": (condensed.soft_labels is not None, ("safetensors", "mtt")),
        "learning rate": (
            condensed.learning_rate is not None,
            ("safetensors", "mtt", "png", "parquet"),
        ),
        "factor": (condensed.factor != 1, ("safetensors", "png", "parquet")),
        "that the images are whitened": (condensed.zca, ("safetensors",)),
    }
    lost = [what for what, (has, kept_by) in beside_images.items() if has and format not in kept_by]
    return f"{report}; left out: {', '.join(lost)}" if lost else report


# What a set is beside its tensors: JSON, in the metadata of a file or beside pictures.


def _description(condensed: SyntheticSet) -> str:
    return json.dumps(
        {
            "version": _DESCRIPTION_VERSION,
            "written_by": f"dmfast {__version__}",
            "mean": condensed.mean,
            "std": condensed.std,
            "class_names": condensed.class_names,
            "config": condensed.config,
            "learning_rate": condensed.learning_rate,
            "zca": condensed.zca,
            "factor": condensed.factor,
        }
    )


def _from_description(text: str | bytes) -> dict[str, Any]:
    description = json.loads(text)
    if description["version"] > _DESCRIPTION_VERSION:
        raise InputError(f"is written by {description['written_by']}: install that or a later one")
    rate = description["learning_rate"]
    return {
        "mean": tuple(float(value) for value in description["mean"]),
        "std": tuple(float(value) for value in description["std"]),
        "class_names": tuple(str(name) for name in description["class_names"]),
        "config": dict(description["config"]),
        "learning_rate": None if rate is None else float(rate),
        "zca": bool(description["zca"]),
        "factor": int(description["factor"]),
    }


# safetensors


def safetensors_bytes(condensed: SyntheticSet) -> bytes:
    """The set as a file of the format of this package."""
    from safetensors.torch import save

    tensors = {"images": condensed.images, "labels": condensed.labels}
    if condensed.soft_labels is not None:
        tensors["soft_labels"] = condensed.soft_labels
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    return save(tensors, {"dmfast": _description(condensed)})


def _write_safetensors(condensed: SyntheticSet, path: Path) -> str:
    write_bytes(path, safetensors_bytes(condensed))
    return _UNCHANGED


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with reading(path), safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        names = {"images", "labels", "soft_labels"} & set(file.keys())
        if "dmfast" not in metadata or not names >= {"images", "labels"}:
            raise InputError("is a safetensors file, but not of a condensed set; choose another")
        tensors = {name: file.get_tensor(name) for name in names}
        return {**tensors, **_from_description(metadata["dmfast"])}


# PyTorch files: the published res_*.pt, MTT's, and IDC's and NCFM's


def _torch_bytes(content: object) -> bytes:
    data = io.BytesIO()
    torch.save(content, data)
    return data.getvalue()


def _torch_load(path: Path, unsafe: bool) -> Any:
    # Published files hold accuracies as numpy's numbers, which torch.load does not read by itself.
    numbers: list[Any] = [
        (_unpickle.Dtype, "numpy.dtype"),
        (_unpickle.scalar, "numpy.core.multiarray.scalar"),  # numpy 1
        (_unpickle.scalar, "numpy._core.multiarray.scalar"),
    ]
    with reading(path), warnings.catch_warnings(), torch.serialization.safe_globals(numbers):
        warnings.simplefilter("ignore")  # of pickle protocols: what cannot be read raises
        try:
            return torch.load(path, map_location="cpu", weights_only=not unsafe)
        except pickle.UnpicklingError as error:
            wanted = re.search(r"GLOBAL (\S+)", str(error))
            if wanted is None:
                raise InputError(
                    f"{path} is truncated or holds more than tensors, numbers, lists and "
                    "dictionaries: copy or download it again"
                ) from error
            raise InputError(
                f"{path} asks for {wanted[1]}, which may run code, and was not read: opt in to "
                "unsafe loading (unsafe=True, --unsafe) if you trust where it comes from"
            ) from error


def _is_other_archive(path: Path) -> bool:
    """Whether it is a whole zip archive that torch did not write, such as an .npz file."""
    if not zipfile.is_zipfile(path):
        return False
    with reading(path), zipfile.ZipFile(path) as archive:
        return not any(name.endswith("/data.pkl") for name in archive.namelist())


def _write_res(condensed: SyntheticSet, path: Path) -> str:
    content = {
        "data": [[condensed.images.cpu(), condensed.labels.cpu()]],
        "accs_all_exps": condensed.config.get("accs_all_exps", {}),
    }
    write_bytes(path, _torch_bytes(content))
    return _UNCHANGED


def _from_res(content: dict[Any, Any], experiment: int) -> dict[str, Any]:
    data = content.get("data")
    if not isinstance(data, list) or not data:
        raise InputError("has no 'data': [[images, labels] of each experiment]; choose another")
    if not -len(data) <= experiment < len(data):
        raise InputError(
            f"has no experiment {experiment}: choose from 0 to {len(data) - 1}, or -1 for the last"
        )
    images, labels = _pair(data[experiment])
    config = {}
    accuracies = content.get("accs_all_exps")
    if isinstance(accuracies, dict) and accuracies:
        with reading("accs_all_exps"):
            config["accs_all_exps"] = {
                str(model): [float(value) for value in values]
                for model, values in accuracies.items()
            }
    return {"images": images, **_split_labels(labels), "config": config}


def _write_mtt(condensed: SyntheticSet, path: Path) -> str:
    soft = condensed.soft_labels
    with atomic_path(path) as folder:
        folder.mkdir()
        labels = condensed.labels if soft is None else soft
        (folder / "images_best.pt").write_bytes(_torch_bytes(condensed.images.cpu()))
        (folder / "labels_best.pt").write_bytes(_torch_bytes(labels.cpu()))
        if condensed.learning_rate is not None:
            (folder / "lr_best.pt").write_bytes(_torch_bytes(condensed.learning_rate))
    return _UNCHANGED


def _read_mtt(path: Path, unsafe: bool) -> dict[str, Any]:
    def beside(kind: str) -> Path:
        return path.with_name(re.sub("images|labels|lr", kind, path.name, count=1))

    if beside("images") == beside("labels"):
        raise InputError(f"{path} holds one tensor: name it images*.pt, with labels*.pt beside it")
    for kind in ("images", "labels"):
        if not beside(kind).is_file():
            raise InputError(f"{beside(kind)} is missing beside {path.name}: copy it there")
    images, labels = _pair([_torch_load(beside(kind), unsafe) for kind in ("images", "labels")])
    fields: dict[str, Any] = {"images": images, **_split_labels(labels)}
    if beside("lr").is_file():
        with reading(beside("lr")):
            fields["learning_rate"] = float(_torch_load(beside("lr"), unsafe))
    return fields


def _write_idc(condensed: SyntheticSet, path: Path) -> str:
    unit = condensed.unit_images()
    clipped = unit.clamp(0, 1)
    write_bytes(path, _torch_bytes([clipped.cpu(), condensed.labels.cpu()]))
    return _changes("clipped", unit, clipped, condensed.std)


def _from_idc(content: object) -> dict[str, Any]:
    images, labels = _pair(content)
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise InputError(
            f"holds images from {images.min().item():.3g} to {images.max().item():.3g} as [images, "
            "labels], where they are in [0, 1]; save it again as it was published"
        )
    return {"pixels": images, **_split_labels(labels)}


def _pair(content: object) -> tuple[Tensor, Tensor]:
    match content:
        case [Tensor() as images, Tensor() as labels] if images.layout == labels.layout:
            plain = images.layout == torch.strided and not (images.is_meta or labels.is_meta)
            if plain and not (images.is_complex() or labels.is_complex()):
                return images, labels
    raise InputError("does not hold plain tensors of images and labels; choose another file")


def _split_labels(labels: Tensor) -> dict[str, Tensor]:
    """Hard labels [N] or [N, 1] as [N]; soft ones [N, K] beside the classes that they favour."""
    if labels.dim() == 2 and labels.shape[1] == 1 and not labels.is_floating_point():
        return {"labels": labels[:, 0]}
    if labels.dim() != 2 or labels.shape[1] == 0:
        return {"labels": labels}
    return {"labels": labels.argmax(1), "soft_labels": labels}


# Pictures: a folder of PNG files for each class, and parquet


def _write_png(condensed: SyntheticSet, path: Path) -> str:
    pictures, report = _encode(condensed)
    names = condensed.class_names or ("",) * condensed.classes
    label_digits, digits = len(str(len(names) - 1)), len(str(len(pictures) - 1))
    with atomic_path(path) as folder:
        folder.mkdir()
        class_folders = []
        for label, name in enumerate(names):
            # Numbered, so that the order of the folders is that of the labels.
            words = f"{label:0{label_digits}d}", re.sub(r"[^\w.-]+", "_", name)
            class_folders.append(folder / "_".join(filter(None, words)))
            class_folders[-1].mkdir()
        for index, (label, picture) in enumerate(
            zip(condensed.labels.tolist(), pictures, strict=True)
        ):
            (class_folders[label] / f"{index:0{digits}d}.png").write_bytes(picture)
        (folder / _SIDECAR).write_text(_description(condensed) + "\n")
    return report


def _read_folder(path: Path) -> dict[str, Any]:
    with reading(path):
        folders = _images.class_folders(path)
        pictures = [_images.images_below(folder) for folder in folders]
        if not any(pictures):
            raise InputError(
                f"{path} holds no condensed set (synthetic.safetensors, images*.pt with "
                "labels*.pt, or a folder of pictures for each class): name another"
            )
        fields: dict[str, Any] = {"class_names": tuple(folder.name for folder in folders)}
        if (path / _SIDECAR).is_file():
            fields = _from_description((path / _SIDECAR).read_text())
    labels = [label for label, files in enumerate(pictures) for _ in files]
    encoded = _images.from_files([file for files in pictures for file in files], labels)
    return {**fields, **_decode(encoded)}


def _write_parquet(condensed: SyntheticSet, path: Path) -> str:
    import pyarrow
    from pyarrow import parquet

    pictures, report = _encode(condensed)
    names = condensed.class_names or tuple(map(str, range(condensed.classes)))
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": names}}
    image_type = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    schema = pyarrow.schema(
        [("image", image_type), ("label", pyarrow.int64())],
        {
            "huggingface": json.dumps({"info": {"features": features}}),
            "dmfast": _description(condensed),
        },
    )
    cells = [{"bytes": picture, "path": None} for picture in pictures]
    data = io.BytesIO()
    parquet.write_table(
        pyarrow.table({"image": cells, "label": condensed.labels.tolist()}, schema), data
    )
    write_bytes(path, data.getvalue())
    return report


def _read_parquet(path: Path) -> dict[str, Any]:
    from pyarrow import parquet

    with reading(path):
        table = parquet.ParquetFile(path).read()
        encoded = _images.from_table(table, str(path))
        fields: dict[str, Any] = {"class_names": _images.names_in_metadata(table)}
        if description := (table.schema.metadata or {}).get(b"dmfast"):
            fields = _from_description(description)
    return {**fields, **_decode(encoded)}


def _encode(condensed: SyntheticSet) -> tuple[list[bytes], str]:
    """Each image as a PNG file, and what that changed."""
    from PIL import Image

    unit = condensed.unit_images()
    if unit.shape[1] not in (1, 3):
        raise InputError(f"pictures have 1 or 3 channels, not {unit.shape[1]}: export as idc")
    pixels = unit.clamp(0, 1).mul(255).round()
    report = _changes("clipped and rounded to 8 bits", unit, pixels / 255, condensed.std)
    pictures = []
    for image in pixels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        data = io.BytesIO()
        Image.fromarray(image[..., 0] if image.shape[2] == 1 else image).save(data, "png")
        pictures.append(data.getvalue())
    return pictures, report


def _decode(encoded: _images.Encoded) -> dict[str, Tensor]:
    if len(encoded.labels) == 0:
        raise InputError("holds no images; choose another")
    images, colour = _images.decode(encoded)
    pixels = torch.from_numpy(images if colour else images[..., :1])
    return {
        "pixels": pixels.permute(0, 3, 1, 2).float().contiguous() / 255,
        "labels": torch.from_numpy(encoded.labels.astype("int64")),
    }


def _changes(what: str, before: Tensor, after: Tensor, std: tuple[float, ...]) -> str:
    # Normalising and back takes a value of exactly 0 or 1 across by rounding: that is no clipping.
    outside = ((before < -1e-6) | (before > 1 + 1e-6)).float().mean().item()
    change = (after - before).abs() / before.new_tensor(std).view(-1, 1, 1)
    return (
        f"{what}: {outside:.2%} of the values were outside [0, 1]; largest change "
        f"{change.max().item():.2g} standard deviations, rms {change.square().mean().sqrt():.2g}"
    )


_WRITERS: dict[str, Callable[[SyntheticSet, Path], str]] = {
    "safetensors": _write_safetensors,
    "res": _write_res,
    "mtt": _write_mtt,
    "idc": _write_idc,
    "png": _write_png,
    "parquet": _write_parquet,
}
FORMATS = tuple(_WRITERS)


def is_folder_of_pictures(path: Path) -> bool:
    """Whether :func:`read` takes the folders in it for classes."""
    return path.is_dir() and _file_in(path) is None and bool(_images.class_folders(path))


def _file_in(folder: Path) -> Path | None:
    """The file to read in a folder of a run or of MTT's."""
    names = ("synthetic.safetensors", "images_best.pt", "images.pt")
    files = [*(folder / name for name in names), *sorted(folder.glob("images*.pt"))]
    return next((file for file in files if file.is_file()), None)
