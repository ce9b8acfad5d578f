# SPDX-License-Identifier: MIT
"""The paper's figures as data, for :mod:`dmfast.reproduce` to put beside ours.

Bo Zhao and Hakan Bilen, Dataset Condensation with Distribution Matching, WACV 2023.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

#: How many condensed sets a figure is the mean of, and networks trained on each.
SETS, NETWORKS = 5, 20


@dataclass(frozen=True)
class Reported:
    """A test accuracy in %: mean and standard deviation over all networks of all sets.

    ``std`` is None where it is not known. ``rebuilt``: not read off the paper but put together from
    other publications, right to within rounding.
    """

    mean: float
    std: float | None
    rebuilt: bool = False

    def __str__(self) -> str:
        spread = "" if self.std is None else f" ± {self.std:.1f}"
        return f"{self.mean:.1f}{spread}{'*' if self.rebuilt else ''}"


def _reported(text: str) -> Reported | None:
    """From ``89.7±0.6`` or ``89.7``, with a ``*`` where it is rebuilt; None from ``-``."""
    if text == "-":
        return None
    match = re.fullmatch(r"(\d+\.\d)(?:±(\d+\.\d))?(\*?)", text)
    assert match, text
    return Reported(float(match[1]), float(match[2]) if match[2] else None, bool(match[3]))


_COLUMNS = ("random", "herding", "forgetting", "dc", "dsa", "dm")
_TABLE1 = {
    ("mnist", 1): "64.9±3.5* 89.2±1.6* 35.5±5.6 91.7±0.5 88.7±0.6 89.7±0.6*",
    ("mnist", 10): "95.1±0.9 93.7±0.3 68.1±3.3 97.4±0.2 97.8±0.1 97.5±0.1*",
    ("mnist", 50): "97.9±0.2* 94.8±0.2* 88.2±1.2 98.8±0.2 99.2±0.1 98.6±0.1",
    ("cifar10", 1): "14.4±2.0 21.5±1.2 13.5±1.2 28.3±0.5 28.8±0.7 26.0±0.8",
    ("cifar10", 10): "26.0±1.2 31.6±0.7 23.3±1.0 44.9±0.5 52.1±0.5 48.9±0.6",
    ("cifar10", 50): "43.4±1.0 40.4±0.6 23.3±1.1 53.9±0.5 60.6±0.5 63.0±0.4",
    ("cifar100", 1): "4.2±0.3 8.4±0.3 4.5±0.2 12.8±0.3 13.9±0.3 11.4±0.3",
    ("cifar100", 10): "14.6±0.5 17.3±0.3 15.1±0.3 25.2±0.3 32.3±0.3 29.7±0.3",
    ("cifar100", 50): "30.0±0.4 33.7±0.5 30.5±0.3 - 42.8±0.4 43.6±0.4",
    ("tiny-imagenet", 1): "1.4±0.1 2.8±0.2 1.6±0.1 - - 3.9±0.2",
    ("tiny-imagenet", 10): "5.0±0.2 6.3±0.2 5.1±0.2 - - 12.9±0.4",
    ("tiny-imagenet", 50): "15.0±0.4 16.7±0.3 15.0±0.3 - - 24.1±0.3",
}
_WHOLE = {
    "mnist": "99.6±0.0",
    "cifar10": "84.8±0.1",
    "cifar100": "56.2±0.3",
    "tiny-imagenet": "37.6±0.4",
}

#: Table 1, ConvNet-3 (of TinyImageNet ConvNet-4), by data set, images a class (None: all) and
#: column. Its DD and LD, which train other networks, are left out.
TABLE1: dict[tuple[str, int | None, str], Reported] = {
    key: reported
    for key, text in [
        *(
            ((dataset, ipc, column), text)
            for (dataset, ipc), row in _TABLE1.items()
            for column, text in zip(_COLUMNS, row.split(), strict=True)
        ),
        *(((dataset, None, "whole"), text) for dataset, text in _WHOLE.items()),
    ]
    if (reported := _reported(text)) is not None
}

_TABLE2_COLUMNS = ("dsa-instance-norm", "dm-instance-norm", "dsa-batch-norm", "dm-batch-norm")
_TABLE2 = {
    "cifar10": "60.6±0.5 63.0±0.4 59.9±0.8 65.2±0.4",
    "cifar100": "42.8±0.4 43.6±0.4 44.6±0.5 48.0±0.4*",
    "tiny-imagenet": "- 24.1±0.3 - 28.2±0.5",
}

#: Table 2, 50 images a class, condensed and evaluated with the same network: as TABLE1.
TABLE2: dict[tuple[str, int | None, str], Reported] = {
    (dataset, 50, column): reported
    for dataset, row in _TABLE2.items()
    for column, text in zip(_TABLE2_COLUMNS, row.split(), strict=True)
    if (reported := _reported(text)) is not None
}

_TABLE3 = {
    "dsa-ConvNetBN": "59.9±0.8 53.3±0.7 51.0±1.1 47.3±1.0",
    "dm-ConvNetBN": "65.2±0.4 61.3* 59.9* 57.0*",
    "dm-AlexNetBN": "60.5±0.4 59.8±0.6 58.9±0.4 54.6±0.7",
    "dm-VGG11BN": "54.2±0.6 52.6±1.0 52.8±1.1 49.1±1.0",
    "dm-ResNet18BN": "52.2±1.0 50.9* 49.6* 52.2*",
}

#: Table 3, CIFAR-10, by what was condensed on which network and which was trained: as TABLE1.
TABLE3: dict[tuple[str, int | None, str], Reported] = {
    ("cifar10", 50, f"{source}-{tested}"): reported
    for source, row in _TABLE3.items()
    for tested, text in zip(
        ("ConvNetBN", "AlexNetBN", "VGG11BN", "ResNet18BN"), row.split(), strict=True
    )
    if (reported := _reported(text)) is not None
}

#: Table 4's bands of accuracy, in %, without, as it has them, the networks below 10 %.
TABLE4_BANDS = ("10-20", "20-30", "30-40", "40-50", "50-60", "60-70", "70-", "all")
_TABLE4 = {
    1: "26.0±0.8 26.2±0.7 25.9±0.7 26.1±0.8 26.7±0.5 26.8±0.6 27.3±0.7 26.5±0.9 26.4±0.7",
    10: "48.9±0.6 48.7±0.6 48.1±0.7 50.7±0.5 51.1±0.6 49.9±0.5 48.6±0.7 48.2±0.8 50.7±0.6",
    50: "63.0±0.4 62.7±0.4 62.1±0.5 62.8±0.4 63.0±0.4 61.9±0.5 60.6±0.5 60.0±0.5 62.5±0.4",
}

#: Table 4, CIFAR-10, by the band of the networks that condensing draws from: as TABLE1.
TABLE4: dict[tuple[str, int | None, str], Reported] = {
    ("cifar10", ipc, band): reported
    for ipc, row in _TABLE4.items()
    for band, text in zip(("random", *TABLE4_BANDS), row.split(), strict=True)
    if (reported := _reported(text)) is not None
}

#: What the paper says of Figure 4.
FIGURE4 = (
    "CIFAR-10, 50 images a class, one GTX 1080: distribution matching reaches DSA's accuracy in "
    "under 20 minutes, DSA trains for 15 hours (45 times as long)"
)
