# SPDX-License-Identifier: MIT
"""The condensed set: what it holds, and the formats it is kept, read and passed on in.

Reading recognises a format by content. Nothing read is ever run, unless the user opts in by name
(``unsafe=True``). What is written is complete or not there.

=========== ===================================================================== ==============
format      what is written                                                       images
=========== ===================================================================== ==============
safetensors one file, nothing lost: the format of this package                    normalised
res         one ``.pt`` file, the published code's ``res_*.pt`` of one experiment normalised
mtt         a folder of ``images_best.pt``, ``labels_best.pt`` and, where there   normalised
            is a learning rate, ``lr_best.pt``
idc         one ``.pt`` file of ``[images, labels]`` (IDC, NCFM)                  in [0, 1]
png         a folder of PNG files for each class, and ``dmfast.json``             8 bits
parquet     one file for Hugging Face ``datasets``: columns ``image`` and         8 bits
            ``label``
=========== ===================================================================== ==============
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _formats
from ._formats import FORMATS
from .errors import InputError
from .files import atomic_path, write_bytes

__all__ = ["FORMATS", "SyntheticSet", "save_grid"]


@dataclass(eq=False)
class SyntheticSet:
    """A few synthetic images for each class.

    Attributes:
        images: float32 [N, C, H, W], normalised: (image in [0, 1] - mean) / std. Not clamped:
            optimised images leave [0, 1].
        labels: int64 [N], class-major in the sets of this package.
        mean, std: for each channel, of images in [0, 1]; empty where a format does not say.
        class_names: one for each class, empty where a format does not say.
        config: how the set was made, as JSON has it.
        soft_labels: float32 [N, K]: scores of the classes, whose softmax is trained with in place
            of the labels.
        learning_rate: of training on the set, where it was learned with it.
        zca: the images are whitened across pixels as well, so they are no pictures.
        factor: each image holds factor x factor smaller ones, to be scaled up before use.

    Raises:
        InputError: where these do not fit together, or a number is not finite.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    class_names: tuple[str, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    soft_labels: Tensor | None = None
    learning_rate: float | None = None
    zca: bool = False
    factor: int = 1

    def __post_init__(self) -> None:
        images, labels, soft_labels = self.images, self.labels, self.soft_labels
        shape = list(images.shape)
        if images.dim() != 4 or images.numel() == 0 or not images.is_floating_point():
            raise InputError(f"images must be floats [N, C, H, W], not {images.dtype} {shape}")
        count, channels = shape[:2]
        if not images.isfinite().all():
            raise InputError("images hold NaN or infinite values; make the set again")
        is_integer = not (labels.is_floating_point() or labels.is_complex())
        if list(labels.shape) != [count] or not is_integer:
            raise InputError(
                f"labels must be integers, one for each of {count} images, not {labels.dtype} "
                f"{list(labels.shape)}"
            )
        known = len(self.class_names)
        if labels.min() < 0 or (known and labels.max() >= known):
            raise InputError(
                f"labels run from {labels.min()} to {labels.max()}; they must be from 0 to "
                + (f"{known - 1}, as there are {known} class names" if known else "K - 1")
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if values and len(values) != channels:
                raise InputError(
                    f"{name} has {len(values)} values, but the images {channels} channels"
                )
            if not all(math.isfinite(value) and (name == "mean" or value > 0) for value in values):
                raise InputError(f"{name} is {values}: it must be finite, and std above 0")
        if soft_labels is not None:
            if soft_labels.dim() != 2 or len(soft_labels) != count:
                raise InputError(
                    f"soft labels must be [{count}, classes], not {list(soft_labels.shape)}"
                )
            if not soft_labels.isfinite().all():
                raise InputError("soft labels hold NaN or infinite values; make the set again")
            self.soft_labels = soft_labels.detach().float()
        self.images = images.detach().float()
        self.labels = labels.detach().long()

    @property
    def classes(self) -> int:
        """How many classes the set tells apart."""
        if self.soft_labels is not None:
            return self.soft_labels.shape[1]
        return len(self.class_names) or int(self.labels.max()) + 1

    def unit_images(self) -> Tensor:
        """The images float32 [N, C, H, W] on the scale of [0, 1], not clamped.

        Raises:
            InputError: where mean and std are not known, or the images are whitened.
        """
        if self.zca:
            raise InputError("ZCA-whitened images are no pictures: choose safetensors, res or mtt")
        mean, std = self._channel_statistics()
        return self.images * std + mean

    def save(self, path: str | Path) -> None:
        """Writes the set as safetensors, whole: :meth:`load` gives the same bits back."""
        write_bytes(path, _formats.safetensors_bytes(self))

    @classmethod
    def load(
        cls,
        path: str | Path,
        experiment: int = -1,
        unsafe: bool = False,
        *,
        mean: Sequence[float] = (),
        std: Sequence[float] = (),
        class_names: Sequence[str] = (),
    ) -> SyntheticSet:
        """Reads a set in any of the formats of this module.

        Args:
            path: a file; or a folder: a run's, of MTT's ``.pt`` files, or of class folders.
            experiment: which set of a ``res_*.pt`` file; negative counts from the last.
            unsafe: let a ``.pt`` file run the code it asks for. For files you trust only.
            mean, std, class_names: stand in where the format does not say. Sets kept in [0, 1]
                (idc, and pictures of elsewhere) need mean and std to be normalised.

        What no format says can be set on the result: ``zca`` and ``factor``.

        Raises:
            InputError: on anything that is not a set, in one line that begins with the path.
        """
        path = Path(path)
        try:
            fields = _formats.read(path, experiment, unsafe)
            for name, values in (("mean", mean), ("std", std), ("class_names", class_names)):
                fields[name] = fields.get(name) or tuple(values)
            pixels = fields.pop("pixels", None)
            if pixels is None:
                return cls(**fields)
            result = cls(pixels, **fields)
            channel_mean, channel_std = result._channel_statistics()
            result.images = (result.images - channel_mean) / channel_std
            return result
        except InputError as error:
            if str(path) in str(error):
                raise
            raise InputError(f"{path}: {error}") from error

    def export(self, path: str | Path, format: str) -> str:
        """Writes the set in one of :data:`FORMATS` (see the module).

        Returns:
            One line on what clipping and rounding changed, and on what the format leaves out.

        Raises:
            InputError: on an unknown format, on images that the format cannot take, or where a
                format of many files would meet a folder that holds some already.
        """
        return _formats.write(self, Path(path), format)

    def _channel_statistics(self) -> tuple[Tensor, Tensor]:
        if not (self.mean and self.std):
            raise InputError("the format does not say mean and std of the channels: give both")
        like = self.images
        mean, std = like.new_tensor(self.mean), like.new_tensor(self.std)
        return mean.view(-1, 1, 1), std.view(-1, 1, 1)


def save_grid(path: str | Path, condensed: SyntheticSet) -> None:
    """Draws the set as one picture (PNG), clipped to [0, 1].

    A class is a strip: up to 10 of its images side by side, up to 4 where there are more than 20
    classes. Strips stand in rows and columns so that the picture is about square; 10 classes of
    10 images are one class a row. Small images are scaled up by a whole number. Where there are
    not 1 or 3 channels the first is drawn in grey.

    Raises:
        InputError: as :meth:`SyntheticSet.unit_images`.
    """
    from PIL import Image

    pixels = condensed.unit_images().clamp(0, 1).mul(255).round().to(torch.uint8).cpu()
    pixels = (pixels if pixels.shape[1] == 3 else pixels[:, :1].expand(-1, 3, -1, -1)).movedim(1, 3)
    labels, classes = condensed.labels.cpu(), condensed.classes
    per_class = min(10 if classes <= 20 else 4, int(torch.bincount(labels).max()))
    square = math.sqrt(classes / per_class)
    # Nearest to square, the wider of two; a last row that is full is worth a good deal of that.
    strips = min(
        (n for n in range(1, classes + 1) if classes % n == 0 or n == round(square)),
        key=lambda n: (round(abs(math.log(n / square)) + (classes % n > 0), 6), -n),
    )

    scale = max(1, 64 // max(pixels.shape[1:3]))
    margin, gap = 2, 2 * scale
    height, width = (scale * side + margin for side in pixels.shape[1:3])
    strip_width = per_class * width + gap
    canvas = torch.full(
        (math.ceil(classes / strips) * height + margin, strips * strip_width - gap + margin, 3),
        255,
        dtype=torch.uint8,
    )
    for label in range(classes):
        row, strip = divmod(label, strips)
        of_class = (labels == label).nonzero().flatten()[:per_class]
        for column, image in enumerate(pixels[of_class]):
            y = margin + row * height
            x = margin + strip * strip_width + column * width
            cell = canvas[y : y + height - margin, x : x + width - margin]
            cell.copy_(image.repeat_interleave(scale, 0).repeat_interleave(scale, 1))
    with atomic_path(path) as temporary:
        Image.fromarray(canvas.numpy()).save(temporary, format="png")
