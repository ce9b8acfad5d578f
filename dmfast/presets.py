# SPDX-License-Identifier: MIT
"""The settings by name, data set and images a class: the defaults of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .augment import DEFAULT_STRATEGY, DIGITS_STRATEGY
from .errors import choose

_DIGIT_SETS = frozenset({"digits", "mnist", "svhn"})

#: Names of presets, and what each is.
PRESETS = {
    "paper": "the paper's settings where it has them",
    "fast": "a quarter of the real images, a larger --lr-img and 500 iterations, for sets as good "
    "within the spread",
}


@dataclass(frozen=True)
class Preset:
    """Settings of a run, named as the options of :class:`dmfast.condense.CondenseConfig`.

    ``lr_img`` belongs to the loss as it is summed here, over classes and features.
    """

    model: str = "ConvNet"
    lr_img: float = 1.0
    dsa_strategy: str = DEFAULT_STRATEGY
    iterations: int = 20_000
    batch_real: int = 256


def preset(dataset: str, ipc: int, name: str = "paper") -> Preset:
    """The settings for ``ipc`` images a class of ``dataset``.

    Args:
        dataset: a canonical name (:func:`dmfast.data.canonical_name`); any other, such as a path,
            has the general settings.
        name: one of :data:`PRESETS`. ``fast`` was chosen on CIFAR-10 and MNIST (the README has the
            figures) and is the same for sets on which nothing was measured.

    Raises:
        InputError: the name is unknown.
    """
    choose("--preset", name, PRESETS)
    paper = Preset(
        # 64x64 images take a fourth block to reach the same 4x4 features as 32x32 ones.
        model="ConvNetD4" if dataset == "tiny-imagenet" else "ConvNet",
        # From 100 images a class on, the published CIFAR-10 runs use the larger rate. The digits,
        # which the paper does not have, give 128 features in place of 2,048, and gradients as much
        # smaller.
        lr_img=10.0 if dataset == "digits" or (dataset == "cifar10" and ipc >= 100) else 1.0,
        dsa_strategy=DIGITS_STRATEGY if dataset in _DIGIT_SETS else DEFAULT_STRATEGY,
    )
    if name == "paper":
        return paper
    # The noise of a class's mean evens out over the iterations, so that fewer real images do; the
    # larger rate makes up for fewer iterations. Rates of 10 are large already.
    rate = max(paper.lr_img, 4.0)
    return replace(paper, batch_real=64, iterations=500, lr_img=rate)
