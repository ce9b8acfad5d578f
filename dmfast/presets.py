# SPDX-License-Identifier: MIT
"""The settings by name, data set and images a class: the defaults of a run."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from .augment import DEFAULT_STRATEGY, DIGITS_STRATEGY
from .errors import InputError, choose

_DIGIT_SETS = frozenset({"digits", "mnist", "svhn"})
# In the paper's Table 3 what is condensed on these is worse than what is condensed on a ConvNet,
# whichever of the four is tested.
_POOR = re.compile(r"(?:AlexNet|VGG11|(ResNet18))(BN)?(?:_AP)?")
#: Rates of networks other than ConvNets, the best power of ten of those that benchmarks/rates.py
#: measured, on CIFAR-10. Where larger ones do not move the loss steadily (VGG11 and ResNet18), the
#: largest that does.
_RATES = {
    "AlexNet": 10.0,
    "AlexNetBN": 0.1,
    "VGG11": 0.1,
    "VGG11BN": 0.1,
    "ResNet18": 0.1,
    "ResNet18BN": 0.1,
    "ResNet18_AP": 0.1,
    "ResNet18BN_AP": 0.01,
}

#: What can be matched, by the names that ``--method`` takes.
METHODS = {
    "dm": "distribution matching",
    "dc": "gradient matching",
    "dsa": "gradient matching with Siamese augmentation",
}

#: Names of presets, and what each is.
PRESETS = {
    "paper": "the paper's settings where it has them",
    "fast": "a quarter of the real images and 500 iterations, from 10 images a class on with a "
    "larger --lr-img (of ConvNets)",
}

#: Networks that each published evaluation mode trains beside one another.
_EVALUATION_NETWORKS = {
    "M": ("MLP", "ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18"),
    "B": ("ConvNetBN", "ConvNetASwishBN", "AlexNetBN", "VGG11BN", "ResNet18BN"),
    "W": ("ConvNetW32", "ConvNetW64", "ConvNetW128", "ConvNetW256"),
    "D": ("ConvNetD1", "ConvNetD2", "ConvNetD3", "ConvNetD4"),
    "A": ("ConvNetAS", "ConvNetAR", "ConvNetAL", "ConvNetASwish"),
    "P": ("ConvNetNP", "ConvNetMP", "ConvNetAP"),
    "N": ("ConvNetNN", "ConvNetBN", "ConvNetLN", "ConvNetIN", "ConvNetGN"),
}
#: The published evaluation modes, and what each is.
EVALUATION_MODES = {
    "SS": "the network that the set was condensed on",
    "S": "that with instance norm in place of batch norm",
    "C": "that and ConvNet",
    **{
        mode: f"{what}: {', '.join(_EVALUATION_NETWORKS[mode])}"
        for mode, what in (
            ("M", "architectures"),
            ("B", "architectures with batch norm"),
            ("W", "widths"),
            ("D", "depths"),
            ("A", "activations"),
            ("P", "poolings"),
            ("N", "norms"),
        )
    },
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
    init: str = "real"
    report_every: int = 10
    checkpoint_every: int = 200


def preset(
    dataset: str, ipc: int, name: str = "paper", method: str = "dm", model: str | None = None
) -> Preset:
    """The settings for ``ipc`` images a class of ``dataset``.

    Args:
        dataset: a canonical name (:func:`dmfast.data.canonical_name`); any other, such as a path,
            has the general settings.
        name: one of :data:`PRESETS`. ``fast`` was chosen on CIFAR-10 and MNIST (the README has the
            figures) and is the same for sets on which nothing was measured.
        method: one of :data:`METHODS`.
        model: the network in place of the usual one.

    Raises:
        InputError: the name or the method is unknown, or the method has no such preset.
    """
    choose("--preset", name, PRESETS)
    choose("--method", method, METHODS)
    if method != "dm" and name != "paper":
        raise InputError(f"--preset {name} is for --method dm; leave it out for --method {method}")
    # 64x64 images take a fourth block to reach the same 4x4 features as 32x32 ones.
    model = model or ("ConvNetD4" if dataset == "tiny-imagenet" else "ConvNet")
    on_convnet = re.fullmatch(r"ConvNet\w*", model) is not None
    lr_img = _RATES.get(model, 1.0)
    if on_convnet and (dataset == "digits" or (dataset == "cifar10" and ipc >= 100)):
        # From 100 images a class on, the published CIFAR-10 runs use the larger rate. The digits,
        # which the paper does not have, give 128 features in place of 2,048, and gradients as much
        # smaller. (On an MLP they diverge by it.)
        lr_img = 10.0
    paper = Preset(
        model=model,
        lr_img=lr_img,
        dsa_strategy=DIGITS_STRATEGY if dataset in _DIGIT_SETS else DEFAULT_STRATEGY,
    )
    if method != "dm":  # their papers', in which an iteration of ten images a class takes minutes
        return replace(
            paper,
            lr_img=0.1,
            iterations=1000,
            # The published runs of DSA start from real images, those of DC from noise.
            init="real" if method == "dsa" else "noise",
            report_every=1,
            checkpoint_every=10 if ipc < 10 else 1,
            dsa_strategy=paper.dsa_strategy if method == "dsa" else "",
        )
    if name == "paper":
        return paper
    # The noise of a class's mean evens out over the iterations, so that fewer real images do; the
    # larger rate makes up for fewer iterations. Where one image makes the mean it moves as far by
    # the paper's. Rates of 10 are large already, and no other was tried on other networks.
    rate = max(lr_img, 4.0) if ipc >= 10 and on_convnet else lr_img
    return replace(paper, batch_real=64, iterations=500, lr_img=rate)


def caution(dataset: str, model: str, method: str = "dm") -> str | None:
    """What to say where sets condensed on a network are known to be worse than a ConvNet's."""
    parts = _POOR.fullmatch(model)
    if method != "dm" or parts is None:
        return None
    residual, batch_norm = parts.groups()
    usual = preset(dataset, 1).model + (batch_norm or "")
    reports = "; users report 12 % for CIFAR-100" if residual else ""
    return (
        f"sets condensed on {model} are known to be worse than a ConvNet's, when {model} is what "
        f"they train, too (the paper's Table 3, with batch norm{reports}): condense on {usual}, "
        f"and evaluate the set with --model {model}"
    )


def evaluation_networks(mode: str, model: str) -> list[str]:
    """The networks that a published evaluation mode trains on a set.

    Args:
        mode: one of :data:`EVALUATION_MODES`.
        model: the network that the set was condensed on.

    Raises:
        InputError: there is no such mode.
    """
    choose("--eval-mode", mode, EVALUATION_MODES)
    if mode == "S" and re.fullmatch(r"\w+", model):  # another is a file's
        return [model.replace("BN", "", 1)]
    if mode in ("S", "SS"):
        return [model]
    if mode == "C":
        return list(dict.fromkeys((model, "ConvNet")))
    return list(_EVALUATION_NETWORKS[mode])
