# SPDX-License-Identifier: MIT
"""The settings by data set and images a class, the paper's where it has them: the defaults."""

from __future__ import annotations

from dataclasses import dataclass

from .augment import DEFAULT_STRATEGY, DIGITS_STRATEGY

_DIGIT_SETS = frozenset({"digits", "mnist", "svhn"})


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


def preset(dataset: str, ipc: int) -> Preset:
    """The settings for ``ipc`` images a class of ``dataset``.

    Args:
        dataset: a canonical name (:func:`dmfast.data.canonical_name`); any other, such as a path,
            has the general settings.
    """
    return Preset(
        # 64x64 images take a fourth block to reach the same 4x4 features as 32x32 ones.
        model="ConvNetD4" if dataset == "tiny-imagenet" else "ConvNet",
        # From 100 images a class on, the published CIFAR-10 runs use the larger rate. The digits,
        # which the paper does not have, give 128 features in place of 2,048, and gradients as much
        # smaller.
        lr_img=10.0 if dataset == "digits" or (dataset == "cifar10" and ipc >= 100) else 1.0,
        dsa_strategy=DIGITS_STRATEGY if dataset in _DIGIT_SETS else DEFAULT_STRATEGY,
    )
