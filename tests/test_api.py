# SPDX-License-Identifier: MIT
"""The public surface: names that others rely on, what an import costs, what every command has."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys

import pytest

SURFACE = {
    "dmfast": ["InputError", "__version__", "ops"],
    "dmfast.ops": [
        "Stream",
        "class_mean_discrepancy(real, syn, classes, real_offsets=None, syn_offsets=None)",
        "conv_batch_norm_relu_pool(x, conv_weight, weight=None, bias=None, eps=1e-05, padding=1, "
        "precision=None, statistics=None)",
        "conv_batch_statistics(x, conv_weight, padding=1, precision=None)",
        "conv_norm_relu_pool(x, conv_weight, weight=None, bias=None, eps=1e-05, padding=1, "
        "precision=None)",
        "convnet_class_mean(images, index, offsets, params, mean, std, weights, *, padding=1, "
        "eps=1e-05, precision=None)",
        "draw_augmentation(strategy, groups, size, seed, step, *, rows=1, first_group=0, stream, "
        "strength=None, mode='single', device=None)",
        "draw_batch(order, class_offsets, offsets, rows, seed, step, *, first_class=0, stream)",
        "draw_weights_(tensors, bounds, seed, step, *, networks=None, first_network=0, stream)",
        "gather_augment(images, index, params, mean, std, dtype, offsets=None)",
        "instance_norm_relu_pool(x, weight=None, bias=None, eps=1e-05)",
        "siamese_augment(x, params, offsets=None)",
    ],
    "dmfast.compat": [
        "DiffAug(strategy='color_crop_cutout_flip_scale_rotate', batch=False, ratio_cutout=0.5, "
        "single=False)",
        "DiffAugment(x, strategy='', seed=-1, param=None)",
        "ParamDiffAug()",
    ],
    "dmfast.networks": ["get_network(name, channels, classes, size, seed=None)"],
    "dmfast.data": ["ImageData", "load(name, root=None, *, cache=True, download=False)"],
    "dmfast.synthetic": ["FORMATS", "SyntheticSet", "save_grid"],
    "dmfast.coreset": ["Coreset", "CoresetConfig", "run"],
    "dmfast.condense": ["CondenseConfig", "run(config)"],
    "dmfast.evaluate": ["EvaluateConfig", "run"],
    "dmfast.profile": ["ProfileConfig", "run(config)"],
    "dmfast.reproduce": ["FigureConfig", "TableConfig", "run", "run_figure"],
}
COMMANDS = (
    *("condense", "coreset", "evaluate", "export", "networks", "pretrain", "profile", "demo"),
    "reproduce",
)


def signature(thing: object) -> str:
    parameters = [
        parameter.replace(annotation=parameter.empty)
        for parameter in inspect.signature(thing).parameters.values()
    ]
    return str(inspect.Signature(parameters))


@pytest.mark.parametrize(
    ("module", "entry"), [(module, entry) for module in SURFACE for entry in SURFACE[module]]
)
def test_names_that_others_rely_on(module: str, entry: str) -> None:
    name, bracket, _ = entry.partition("(")
    thing = getattr(importlib.import_module(module), name)
    if bracket:
        assert name + signature(thing) == entry


@pytest.mark.parametrize("module", ["dmfast.ops", "dmfast.compat", "dmfast.synthetic"])
def test_what_is_exported_is_listed(module: str) -> None:
    exported = importlib.import_module(module).__all__
    assert sorted(exported) == sorted(entry.partition("(")[0] for entry in SURFACE[module])


def test_reference_has_the_signatures_of_the_operators() -> None:
    ops, reference = (importlib.import_module(f"dmfast.{name}") for name in ("ops", "reference"))
    for name in ops.__all__:
        if name != "Stream":
            assert signature(getattr(ops, name)) == signature(getattr(reference, name))


def test_importing_the_operators_needs_torch_and_numpy_only() -> None:
    heavy = {"PIL", "pyarrow", "matplotlib", "sklearn", "scipy", "tqdm", "safetensors"}
    code = (
        "import torch, sys; before = set(sys.modules); import dmfast.compat; "
        f"print({heavy} & (set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_fails_in_one_line(command: str) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", f"dmfast.{command}", *arguments], capture_output=True, text=True
        )

    assert call("--help").returncode == 0
    required = {
        "export": ["x", "--format", "png", "--out", "y"],
        "coreset": ["random"],
        "reproduce": ["table1"],
    }
    wrong = call(*required.get(command, []), "--no-such-option")
    assert wrong.returncode == 2
    assert wrong.stderr.count("\n") == 1
    assert "--no-such-option" in wrong.stderr
