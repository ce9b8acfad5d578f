# SPDX-License-Identifier: MIT
"""The counts of dmfast.roofline against torch's own counter, and against sums by hand."""

from __future__ import annotations

import re

import pytest
import roofline
import torch
from torch.utils.flop_counter import FlopCounterMode

from dmfast import _ranges, ceilings
from dmfast import roofline as counts
from dmfast.networks import Network, get_network
from dmfast.roofline import Setting, stages

SETTINGS = {
    "cifar10": Setting(),
    "padded": Setting(channels=1, size=(28, 28)),
    "deep": Setting(size=(64, 64), classes=2, depth=4),
    "odd, narrow": Setting(channels=2, size=(31, 22), classes=3, depth=2, width=16),
}


def network_for(setting: Setting) -> Network:
    """In torch's own layers: torch counts nothing of the fused blocks."""
    name = f"ConvNetD{setting.depth}W{setting.width}"
    network = get_network(name, setting.channels, setting.classes, setting.size, seed=0)
    network.fused = False
    return network


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_products_are_torchs(setting: Setting) -> None:
    network = network_for(setting).requires_grad_(False)
    x = torch.randn(2, setting.channels, *setting.size, requires_grad=True)
    with FlopCounterMode(display=False) as forward:
        embedded = network.embed(x)
    assert forward.get_total_flops() == 2 * setting.forward_flop
    assert embedded.shape[1] == setting.features
    with FlopCounterMode(display=False) as backward:
        embedded.sum().backward()
    assert backward.get_total_flops() == 2 * setting.forward_flop


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_products_of_training_are_torchs(setting: Setting) -> None:
    network = network_for(setting)
    with FlopCounterMode(display=False) as counter:
        network(torch.randn(2, setting.channels, *setting.size)).sum().backward()
    assert counter.get_total_flops() == setting.training_flop(2)


def test_the_counts_of_cifar10() -> None:
    """In MFLOP an image, as in any account of this network."""
    blocks = Setting().blocks
    assert [round(block.flop / 1e6, 1) for block in blocks] == [7.1, 75.5, 18.9]
    assert round(Setting().forward_flop / 1e6, 1) == 101.4
    assert round(sum(block.winograd_flop for block in blocks) / 1e6, 1) == 25.4
    assert round(Setting(ipc=50).iteration_flop / 1e9) == 361


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_stages_add_up(setting: Setting) -> None:
    parts = list(stages(setting, 4))
    assert sum(part.products for part in parts) == setting.iteration_flop
    by_winograd = list(stages(setting, 4, winograd=True))
    of_images = setting.real + 2 * setting.synthetic
    assert sum(part.products for part in by_winograd) == of_images * sum(
        block.winograd_flop for block in setting.blocks
    )
    assert [part.name for part in parts] == [part.name for part in by_winograd]
    assert [part.bytes for part in parts] == [part.bytes for part in by_winograd]
    for direct, transformed in zip(parts, by_winograd, strict=True):
        assert (transformed.other > direct.other) == ("block" in direct.name)


@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS)
def test_the_stages_belong_to_ranges(setting: Setting) -> None:
    parts = list(stages(setting, 2))
    ranges = counts.by_range(parts)
    assert set(ranges) == set(_ranges.STAGES)
    together = counts.total("all", ranges.values())
    for count in ("products", "other", "bytes", "flop"):
        assert getattr(together, count) == sum(getattr(part, count) for part in parts)
    assert ranges["backward"].products == setting.synthetic * setting.forward_flop


def test_fewer_real_images_than_asked_for() -> None:
    assert Setting(real_rows=1437).real == 1437
    assert Setting(real_rows=1437).iteration_flop == (1437 + 200) * Setting().forward_flop


def test_bytes_of_a_block() -> None:
    """The second block, by hand: 128x16x16 in, 128x8x8 out, 128x128x3x3 weights."""
    part = {part.name: part for part in stages(Setting(classes=1, batch_real=3), 2)}["block 2 real"]
    assert part.bytes == 2 * (3 * (128 * 16 * 16 + 128 * 8 * 8) + 128 * 128 * 9)


def test_winograds_transforms_by_their_matrices() -> None:
    """The counted operations are those of these transforms: they give the convolution."""
    d = torch.randn(6, dtype=torch.float64).tolist()
    g = torch.randn(3, dtype=torch.float64).tolist()
    count = 0

    def fma(*terms: tuple[float, float]) -> float:
        """A sum of products, counted: factors of one or minus one are free."""
        nonlocal count
        count += sum(abs(factor) != 1 for factor, _ in terms) + len(terms) - 1
        return sum(factor * value for factor, value in terms)

    a, b = fma((1, d[4]), (-4, d[2])), fma((1, d[3]), (-4, d[1]))
    c, e = fma((1, d[4]), (-1, d[2])), fma((2, fma((1, d[3]), (-1, d[1]))))
    v = [
        fma((4, d[0]), (-5, d[2]), (1, d[4])),
        *(fma((1, a), (1, b)), fma((1, a), (-1, b))),
        *(fma((1, c), (1, e)), fma((1, c), (-1, e))),
        fma((4, d[1]), (-5, d[3]), (1, d[5])),
    ]
    assert count * 12 == counts._OF_INPUT

    count = 0
    f, h = fma((1 / 6, fma((1, g[0]), (1, g[2])))), fma((1 / 6, g[1]))
    i, j = fma((1 / 24, g[0]), (1 / 6, g[2])), fma((1 / 12, g[1]))
    u = [
        fma((1 / 4, g[0])),
        *(-fma((1, f), (1, h)), fma((1, h), (-1, f))),
        *(fma((1, i), (1, j)), fma((1, i), (-1, j))),
        g[2],
    ]
    assert count * 9 == counts._OF_WEIGHTS

    m = [x * y for x, y in zip(u, v, strict=True)]
    count = 0
    p, q = fma((1, m[1]), (1, m[2])), fma((1, m[1]), (-1, m[2]))
    r, s = fma((1, m[3]), (1, m[4])), fma((1, m[3]), (-1, m[4]))
    y = [
        fma((1, m[0]), (1, p), (1, r)),
        fma((1, q), (2, s)),
        fma((1, p), (4, r)),
        fma((1, q), (8, s), (1, m[5])),
    ]
    assert count * 10 == counts._OF_OUTPUT
    expected = [sum(g[k] * d[n + k] for k in range(3)) for n in range(4)]
    assert y == pytest.approx(expected)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    roofline.main(["--ipc", "50", "--iterations", "20000"])
    out = capsys.readouterr().out
    assert "798.000 TFLOP/s (bfloat16), 3.000 TB/s" in out
    assert "of products alone 9.1 s" in out
    with pytest.raises(SystemExit):
        roofline.main(["--precision", "float32"])
    assert "give --tflops" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        roofline.main(["--images", "32x32"])
    assert "an image's shape is CxHxW" in capsys.readouterr().err


def test_the_command_measures_a_cpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the rate of the compiled loop, which every CPU has in float32."""
    monkeypatch.setattr(ceilings, "_SECONDS", 0.001)
    roofline.main(["--preset", "cpu", "--precision", "float32", "--bandwidth", "0.5"])
    rate, bandwidth = re.match(
        r"(.*) TFLOP/s \(float32\), (.*) TB/s", capsys.readouterr().out
    ).groups()
    assert float(rate) > 0
    assert bandwidth == "0.500"
