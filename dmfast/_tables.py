# SPDX-License-Identifier: MIT
"""The tables that are reproduced, as data: what makes a cell's sets, and how they are evaluated.

A further table is an entry of :data:`TABLES`.
"""

from __future__ import annotations

from typing import Any

from . import paper
from ._cells import Method, Source, Table
from .presets import METHODS, preset


def _siamese(dataset: str, ipc: int) -> dict[str, Any]:
    return {"dsa_strategy": preset(dataset, ipc).dsa_strategy}


def _plain(dataset: str, ipc: int) -> dict[str, Any]:
    return {"dsa_strategy": "none"}


def _as_dc(dataset: str, ipc: int) -> dict[str, Any]:
    """As its published script evaluates DC: three transforms for MNIST, else none and less long."""
    if dataset == "mnist":
        return {"dsa_strategy": "crop_scale_rotate"}
    return {"dsa_strategy": "none", "epochs": 300}


def _whole(dataset: str, ipc: int) -> dict[str, Any]:
    # An epoch of all is hundreds of updates, of a condensed set 1 to 20.
    return _siamese(dataset, ipc) | {"epochs": 50}


#: What selects real images by a network, and the paper's column of it.
SELECTED = {"herding": "herding", "k-center": None, "forgetting": "forgetting"}


def _real_images() -> dict[str, Method]:
    """Each with and without augmentation; the paper's rows seem to be without."""
    named: dict[str, tuple[str, str | None]] = {
        "random": ("random real images, others for each network", "random"),
        **{name: (f"real images, selected by {name}", SELECTED[name]) for name in SELECTED},
    }
    methods = {}
    for name, (words, column) in named.items():
        methods[name] = Method(words, name, column, _siamese, heading=name)
        methods[f"{name}-no-augmentation"] = Method(
            f"{words}; networks trained without augmentation",
            *(name, column, _plain),
            heading=f"{name}, no augmentation",
        )
    return methods


def _table1() -> Table:
    methods = {
        **_real_images(),
        "dc": Method(
            "gradient matching, evaluated as its own script does: MNIST with crop, scale and "
            "rotate, other sets without augmentation for 300 epochs",
            *("dc", "dc", _as_dc),
            heading="DC",
        ),
        # The paper's figure of DC is of the other evaluation.
        "dc-dsa-augmentation": Method(
            "the same sets, evaluated as those of DSA are",
            *("dc", None, _siamese),
            heading="DC, DSA's augmentation",
        ),
        "dsa": Method(METHODS["dsa"], "dsa", "dsa", _siamese, heading="DSA"),
        "dm": Method(METHODS["dm"], "dm", "dm", _siamese, heading="DM"),
        "whole": Method(
            "all real images, 50 epochs of them", "whole", "whole", _whole, heading="whole set"
        ),
    }
    return Table(
        title="Table 1: test accuracy, %",
        datasets=("mnist", "cifar10", "cifar100", "tiny-imagenet"),
        ipcs=(1, 10, 50),
        sources={
            **{name: Source("condense", {"method": name}) for name in METHODS},
            "random": Source("random"),
            **{name: Source("coreset", {"method": name}) for name in SELECTED},
            "whole": Source("whole"),
        },
        methods=methods,
        figures=paper.TABLE1,
    )


def _table2() -> Table:
    sources, methods = {}, {}
    for norm, network in (("instance-norm", "{}"), ("batch-norm", "{}BN")):
        for method in ("dsa", "dm"):
            name, words = f"{method}-{norm}", norm.replace("-", " ")
            sources[name] = Source("condense", {"method": method}, network)
            methods[name] = Method(
                f"{METHODS[method]}, {words} in condensing and in evaluation",
                *(name, name, _siamese),
                heading=f"{method.upper()}, {words}",
            )
    return Table(
        title="Table 2: instance and batch norm, test accuracy, %",
        datasets=("cifar10", "cifar100", "tiny-imagenet"),
        ipcs=(50,),
        sources=sources,
        methods=methods,
        figures=paper.TABLE2,
    )


def _table3() -> Table:
    named = {
        "{}BN": "ConvNet",
        "AlexNetBN": "AlexNet",
        "VGG11BN": "VGG-11",
        "ResNet18BN": "ResNet-18",
    }
    sources, methods = {}, {}
    for method, network in (("dsa", "{}BN"), *(("dm", network) for network in named)):
        condensed_on = network.format("ConvNet")
        source = f"{method}-{condensed_on}"
        sources[source] = Source("condense", {"method": method}, network)
        for tested, heading in named.items():
            tested_on = tested.format("ConvNet")
            methods[f"{source}-{tested_on}"] = Method(
                f"{METHODS[method]} on {condensed_on}, evaluated on {tested_on}",
                *(source, f"{source}-{tested_on}", _siamese),
                network=tested,
                heading=heading,
                row=f"{method.upper()} on {named[network]}",
            )
    return Table(
        title="Table 3: across architectures, all with batch norm, test accuracy, %",
        datasets=("cifar10",),
        ipcs=(50,),
        sources=sources,
        methods=methods,
        figures=paper.TABLE3,
        corner="condensed by",
    )


def band_words(band: str) -> str:
    """A band of accuracies, for people."""
    return f"{band[:-1]} % and more" if band.endswith("-") else f"{band} %"


def _table4() -> Table:
    methods = {
        "random": Method(
            f"{METHODS['dm']} by random networks", "random", "random", _siamese, heading="random"
        )
    }
    sources = {"random": Source("condense")}
    for band in paper.TABLE4_BANDS:
        words = "all networks of a pool" if band == "all" else f"networks of {band_words(band)}"
        heading = f"≥{band[:-1]}" if band.endswith("-") else band
        sources[band] = Source("condense", band=band)
        methods[band] = Method(f"{METHODS['dm']} by {words}", band, band, _siamese, heading=heading)
    return Table(
        title="Table 4: distributions of networks, test accuracy, %",
        datasets=("cifar10",),
        ipcs=(1, 10, 50),
        sources=sources,
        methods=methods,
        figures=paper.TABLE4,
    )


TABLES = {"table1": _table1(), "table2": _table2(), "table3": _table3(), "table4": _table4()}
