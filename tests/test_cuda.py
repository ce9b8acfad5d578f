# SPDX-License-Identifier: MIT
"""The CUDA operators: that they compile and are registered, and on a GPU what they do."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from block_cases import CASES as BLOCKS
from block_cases import (
    Block,
    assert_within,
    cosine,
    plain_and_exact,
    randn,
    result_and_gradients,
    rms,
)
from cases import CASES, LAYOUTS, TABLES, Case, lay_out
from test_blocks import FLOAT32_MARGIN, WINOGRAD
from test_convnet import PASSES, Pass, exact_and_plain
from test_gpu_blocks import in_bfloat16
from test_norm_pool import SHAPES, Shape, away_from_zero
from test_norm_pool import inputs as norm_inputs
from test_ops import DTYPES, MEAN, SIDES, STD, gather_arguments, sides
from torch import Tensor

from dmfast import _load, ops, reference
from dmfast.compat import DiffAug, DiffAugment
from dmfast.networks import get_network

CSRC = Path(__file__).resolve().parent.parent / "csrc"
ARCHS = ("80", "90a", "100")
KERNELS = sorted(CSRC.glob("*.cu"))
OP = torch.ops.dmfast
#: On a GPU these are made of other operators; the last four take no tensors.
CPU_ONLY = {
    "conv_norm_relu_pool",
    "_conv_norm_relu_pool_backward",
    "conv_batch_norm_relu_pool",
    "_conv_batch_norm_relu_pool_backward",
    "_conv_batch_statistics",
    "convnet_class_mean",
    "_cpu_kernels",
    "_multiply_adds",
    "_cuda_architectures",
    "_fused_block_takes",
}
#: Values of DMFAST_GPU.
WAYS = ("cudnn", "fused", "wgmma", "torch")


# ---- Without a GPU -----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("source", KERNELS, ids=lambda path: path.name)
def test_kernels_compile_without_spills(source: Path, tmp_path: Path) -> None:
    """For every generation that is named; registers and spills are printed (pytest -s)."""
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc here")
    targets = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    flags = ["-O3", "-std=c++17", "--fmad=false", "--threads", "2", "-Xptxas", "-v"]
    command = ["nvcc", *flags, *targets, "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = re.compile(
        r"Compiling entry function '(\S+)' for 'sm_(\S+)'.*?"
        r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    found = report.findall(done.stderr)
    assert len(found) == done.stderr.count("Compiling entry function")
    for kernel, arch, stores, loads, registers in found:
        print(f"sm_{arch} {registers} registers, {stores}+{loads} bytes spilled: {kernel}")
    spilled = [entry for entry in found if entry[2] != "0" or entry[3] != "0"]
    assert spilled == []
    assert bool(found) == ("__global__" in source.read_text())


def test_every_operator_is_registered_where_cuda_was_built() -> None:
    if not _load.has_cuda_operators():
        if os.environ.get("DMFAST_CUDA") == "1":
            pytest.fail("DMFAST_CUDA=1, but the build has no CUDA operators")
        pytest.skip("built without CUDA operators")
    names = {s.name for s in torch._C._jit_get_all_schemas() if s.name.startswith("dmfast::")}
    registered = torch._C._dispatch_has_kernel_for_dispatch_key
    missing = {name.removeprefix("dmfast::") for name in names if not registered(name, "CUDA")}
    assert missing == CPU_ONLY


@pytest.mark.parametrize(("required", "outcome"), [("0", "1 skipped"), ("1", "1 error")])
def test_a_missing_gpu_skips_or_fails(required: str, outcome: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    test = f"{__file__}::test_captured_draws_are_new_at_each_replay"
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", test],
        env=os.environ | {"DMFAST_REQUIRE_CUDA": required},
        capture_output=True,
        text=True,
    )
    assert outcome in done.stdout
    assert "torch finds no GPU" in done.stdout


# ---- On a GPU ----------------------------------------------------------------------------------


def gpu(*values: object) -> list[object]:
    return [v.cuda() if isinstance(v, Tensor) else v for v in values]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.is_cuda
    torch.testing.assert_close(actual.cpu(), expected, equal_nan=True)


@pytest.mark.cuda
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_augment_matches_the_cpu(case: Case, dtype: torch.dtype, backward: bool) -> None:
    operator = OP._siamese_augment_backward if backward else OP.siamese_augment
    x = case.images(dtype)
    arguments = x, case.params, case.offsets_tensor
    of_gpu = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda").copy_(x)
    out = operator(of_gpu, *gpu(*arguments[1:]))
    expected = operator(*arguments)
    assert_close(out, expected)
    assert out.stride() == expected.stride()
    assert torch.equal(out, operator(of_gpu, *gpu(*arguments[1:])))  # to the bit


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_matches_the_cpu(dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (5, 8, 9, 3), dtype=torch.uint8)
    for source in (images, images / 255, images[:, ::2, 1:]):
        arguments = gather_arguments(source, dtype)
        assert_close(ops.gather_augment(*gpu(*arguments)), ops.gather_augment(*arguments))


@pytest.mark.cuda
@pytest.mark.parametrize("networks", [None, 3])
def test_float64_blocks_match_the_cpu(networks: int | None) -> None:
    case = Block(16, 16, (9, 8), images=6, networks=networks, layout="channels_last")
    tensors = [t.double() for t in (case.x(), *case.parameters())]
    gradient = case.gradient(case.exact_y(), 0).double()
    for function, operands, pooled in (
        (ops.conv_norm_relu_pool, tensors, gradient),
        (ops.instance_norm_relu_pool, [tensors[0], *tensors[2:]], gradient),
    ):
        expected = result_and_gradients(function, operands, pooled)
        actual = result_and_gradients(function, gpu(*operands), *gpu(pooled))
        for ours, theirs in zip(actual, expected, strict=True):
            assert ours.stride() == theirs.stride()
            assert_close(ours, theirs)


# ---- Blocks of a network -----------------------------------------------------------------------

LARGE_NORMS = [(3, 128, 32, 32), (2, 128, 64, 64), (1, 8, 160, 158), (500, 128, 8, 8)]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [*SHAPES, *LARGE_NORMS], ids=str)
def test_norm_matches_the_cpu(shape: Shape, layout: str, dtype: torch.dtype) -> None:
    for networks in (None, shape[0]) if 0 < shape[0] < 8 else (None,):
        tensors = norm_inputs(shape, layout, networks)
        x, *parameters = (t.to(dtype) for t in tensors)
        gradient = away_from_zero([x, *parameters]).to(dtype)
        of_gpu = torch.empty_strided(x.shape, x.stride(), dtype=dtype, device="cuda").copy_(x)
        run = ops.instance_norm_relu_pool
        expected = result_and_gradients(run, [x, *parameters], gradient)
        actual = result_and_gradients(run, [of_gpu, *gpu(*parameters)], *gpu(gradient))
        again = result_and_gradients(run, [of_gpu, *gpu(*parameters)], *gpu(gradient))
        for ours, theirs, repeated in zip(actual, expected, again, strict=True):
            assert ours.stride() == theirs.stride()
            assert_close(ours, theirs)
            assert torch.equal(ours, repeated)


@pytest.mark.cuda
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_of_what_is_not_finite_is_as_on_the_cpu(layout: str, value: float) -> None:
    x, weight, bias = norm_inputs((3, 8, 6, 5), layout)
    x[1, 2, 3, 4] = value
    weight[0] = torch.nan
    bias[3] = value
    gradient = torch.ones(3, 8, 3, 2)
    run = ops.instance_norm_relu_pool
    expected = result_and_gradients(run, [x, weight, bias], gradient)
    actual = result_and_gradients(run, gpu(x, weight, bias), *gpu(gradient))
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.cpu().isnan(), theirs.isnan())
        assert torch.equal(ours.cpu().isinf(), theirs.isinf())


@pytest.mark.cuda
def test_norm_of_large_means() -> None:
    for layout in LAYOUTS:
        x, *_ = norm_inputs((3, 128, 16, 16), layout)
        x = lay_out(1000 + 0.01 * x, layout)
        exact = reference.instance_norm_relu_pool(x.double())
        out = ops.instance_norm_relu_pool(x.cuda()).cpu()
        # The mean in float32 is itself 2^-14 or less off.
        assert (out - exact).abs().max() <= 2.0**-14 / 0.01


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """DMFAST_GPU; without TF32, which torch lets convolutions use."""
    monkeypatch.setenv("DMFAST_GPU", request.param)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    return request.param


@pytest.mark.cuda
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_float32_blocks_match_reference(case: Block, way: str) -> None:
    gradient = case.gradient(case.exact_y(), FLOAT32_MARGIN)
    tensors = gpu(case.x(), *case.parameters())
    actual = result_and_gradients(
        ops.conv_norm_relu_pool, tensors, *gpu(gradient), 1e-5, case.padding
    )
    for ours, plain, exact in zip(actual, *plain_and_exact(case, gradient), strict=True):
        assert ours.is_cuda
        assert ours.dtype == torch.float32
        assert_within(ours.cpu(), plain, exact, WINOGRAD)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_bfloat16_blocks_match_reference(case: Block, dtype: torch.dtype, way: str) -> None:
    if way == "torch":
        pytest.skip("torch's layers round more, or for float32 nothing")
    run = functools.partial(ops.conv_norm_relu_pool, precision="bfloat16")
    in_bfloat16(run, case, dtype, "cuda")


@pytest.mark.cuda
def test_the_kernel_takes_the_blocks_of_a_convnet() -> None:
    device = torch.cuda.current_device()
    for channels, side in ((3, 32), (128, 16), (128, 8)):
        for backward in (False, True):
            assert OP._fused_block_takes(channels, 128, side, side, 1, backward, device)
    assert not OP._fused_block_takes(5, 128, 32, 32, 1, False, device)


@pytest.mark.cuda
def test_the_kernel_reads_from_any_address() -> None:
    """A slice of a batch whose images are no multiple of 16 bytes."""
    case = Block(1, 32, (2, 6), images=4, padding=2)
    x = case.x().bfloat16().cuda()[1:]
    tensors = gpu(*case.parameters())
    with torch.no_grad():
        out, _ = OP._fused_block(x, *tensors, None, 1e-5, 2, False)
        copied, _ = OP._fused_block(x.clone(), *tensors, None, 1e-5, 2, False)
    assert torch.equal(out, copied)


@pytest.mark.cuda
def test_blocks_do_not_wait(way: str) -> None:
    case = Block(3, 32, (16, 16), images=4)
    tensors = gpu(case.x(), *case.parameters())
    gradient = torch.ones(4, 32, 8, 8, device="cuda")
    *rest, weights = Pass(filters=32).arguments()
    call = [*gpu(*rest), gpu(*weights)]

    def run() -> None:
        result_and_gradients(ops.conv_norm_relu_pool, tensors, gradient, precision="bfloat16")
        ops.convnet_class_mean(*call, precision="bfloat16")

    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function: Callable[[], list[Tensor]]) -> tuple[torch.cuda.CUDAGraph, list[Tensor]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = function()
    return graph, made


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("networks", [None, 2])
def test_captured_blocks_give_what_eager_ones_do(
    networks: int | None, precision: str, way: str
) -> None:
    """New weights too: they are packed within the graph."""
    case = Block(32, 32, (16, 16), images=4, networks=networks, layout="channels_last")
    tensors = gpu(case.x(), *case.parameters())
    gradient = torch.ones(4, 32, 8, 8, device="cuda")

    def run() -> list[Tensor]:
        return result_and_gradients(ops.conv_norm_relu_pool, tensors, gradient, precision=precision)

    graph, made = captured(run)
    for seed in range(2):
        with torch.no_grad():
            for number, tensor in enumerate(tensors):
                tensor.copy_(randn(*tensor.shape, seed=10 * seed + number))
        graph.replay()
        expected = run()
        assert torch.equal(made[0], expected[0])
        for ours, theirs in zip(made, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * rms(theirs))


@pytest.mark.cuda
@pytest.mark.parametrize("case", PASSES, ids=str)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_convnet_class_mean_matches_reference(case: Pass, precision: str, way: str) -> None:
    *rest, weights = case.arguments()
    arguments = [*gpu(*rest), gpu(*weights)]
    out = ops.convnet_class_mean(*arguments, padding=case.padding, precision=precision)
    assert out.is_cuda
    assert out.dtype == torch.float32
    exact, plain = exact_and_plain(case)
    if precision == "float32" or way == "torch":
        assert_within(out.cpu(), plain, exact, WINOGRAD)
    elif exact.numel():
        rounded = [w.bfloat16().double() if w.dim() == 4 else w.double() for w in weights]
        from_rounded = reference.convnet_class_mean(*rest, rounded, padding=case.padding)
        assert_within(out.cpu(), from_rounded, exact, 10)
    assert not out[torch.tensor(case.offsets).diff() == 0].any()
    repeated = ops.convnet_class_mean(*arguments, padding=case.padding, precision=precision)
    assert torch.equal(out, repeated)


@pytest.mark.cuda
def test_convnet_class_mean_clamps_what_it_does_not_read(way: str) -> None:
    images, index, offsets, *rest = Pass(filters=32).arguments()
    *rest, weights = rest
    wild, beyond = index.clone(), offsets.clone()
    wild[0], wild[3], beyond[-1] = -5, 99, 999
    expected = ops.convnet_class_mean(
        *gpu(images, wild.clamp(0, 8), offsets, *rest), gpu(*weights), precision="bfloat16"
    )
    out = ops.convnet_class_mean(
        *gpu(images, wild, beyond, *rest), gpu(*weights), precision="bfloat16"
    )
    assert torch.equal(out, expected)


@pytest.mark.cuda
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_captured_class_means_give_what_eager_ones_do(precision: str, way: str) -> None:
    *rest, weights = Pass(filters=32).arguments()
    rest, weights = gpu(*rest), gpu(*weights)

    def run() -> list[Tensor]:
        return [ops.convnet_class_mean(*rest, weights, precision=precision)]

    graph, made = captured(run)
    index = rest[1]
    for _ in range(2):
        index.copy_(index.roll(1))
        weights[0].mul_(-1)
        graph.replay()
        assert torch.equal(made[0], run()[0])


@pytest.mark.cuda
@pytest.mark.parametrize("precision", [None, "bfloat16"])
def test_embeddings_of_a_network_match_the_cpu(precision: str | None, way: str) -> None:
    network = get_network("ConvNet", 3, 10, (32, 32), seed=1)
    x = randn(6, 3, 32, 32, seed=0)
    with torch.no_grad():
        expected = network.embed(x)
    on_gpu = get_network("ConvNet", 3, 10, (32, 32), seed=1).cuda()
    assert (on_gpu.fused_blocks(torch.device("cuda")) is None) == (way == "torch")
    images = x.cuda().requires_grad_()
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bfloat16"):
        out = on_gpu.embed(images)
    (of_images,) = torch.autograd.grad(out.sum(), images)
    assert (of_images.shape, of_images.dtype) == (x.shape, torch.float32)
    assert of_images.isfinite().all()
    if precision is None:
        assert rms(out.detach().cpu() - expected) < 1e-4 * rms(expected)
    assert cosine(out.detach().cpu(), expected) > 0.999
    if way != "torch":
        assert out.dtype == torch.float32


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SIDES)
def test_discrepancy_matches_the_cpu(name: str, dtype: torch.dtype) -> None:
    for features in (37, 640):
        real, syn, *rest = sides(name, dtype, features=features)
        results = []
        for move in (lambda *v: list(v), gpu):
            inputs = [t.requires_grad_() for t in move(real.detach(), syn.detach())]
            loss = ops.class_mean_discrepancy(*inputs, *move(*rest))
            results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
        for expected, actual in zip(*results, strict=True):
            assert_close(actual, expected)


@pytest.mark.cuda
def test_draws_are_the_bits_of_the_cpu() -> None:
    strategy = "color_crop_cutout_flip_scale_rotate"
    for step in (0, 2**32 - 1):
        on_gpu = torch.tensor([step], device="cuda")
        drawn = ops.draw_augmentation(strategy, 50, (32, 32), 7, on_gpu, rows=3, stream=2)
        expected = ops.draw_augmentation(strategy, 50, (32, 32), 7, step, rows=3, stream=2)
        assert torch.equal(drawn.cpu(), expected)
        split = torch.arange(1000), torch.tensor([0, 400, 1000]), torch.tensor([0, 64, 200])
        index = ops.draw_batch(*gpu(*split), 200, 7, on_gpu, stream=1)
        assert torch.equal(index.cpu(), ops.draw_batch(*split, 200, 7, step, stream=1))
        for dtype in DTYPES:
            tensors = [torch.empty(3, 5, 7, dtype=dtype), torch.empty(3, 9, dtype=dtype)]
            on_device = gpu(*tensors)
            ops.draw_weights_(on_device, [0.1, 2.0], 7, on_gpu, networks=3, stream=3)
            ops.draw_weights_(tensors, [0.1, 2.0], 7, step, networks=3, stream=3)
            assert all(torch.equal(a.cpu(), b) for a, b in zip(on_device, tensors, strict=True))


@pytest.mark.cuda
def test_captured_draws_are_new_at_each_replay() -> None:
    step = torch.zeros(1, dtype=torch.int64, device="cuda")
    x = torch.randn(6, 3, 16, 16, device="cuda")

    def augment() -> Tensor:
        table = ops.draw_augmentation("color_crop_rotate", 3, (16, 16), 0, step, stream=2)
        return ops.siamese_augment(x, table)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        augment()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = augment()
        step += 1
    step.zero_()
    for number in range(3):
        graph.replay()
        table = ops.draw_augmentation("color_crop_rotate", 3, (16, 16), 0, number, stream=2)
        assert_close(out, ops.siamese_augment(x.cpu(), table))


@pytest.mark.cuda
def test_what_is_not_read_on_the_host_is_clamped() -> None:
    x = torch.randn(5, 3, 6, 6, device="cuda")
    table = TABLES["identity"].repeat(2, 1).cuda()
    out = ops.siamese_augment(x, table, torch.tensor([1, 3, 99], device="cuda"))
    assert torch.equal(out[1:], x[1:])
    assert not out[0].any()
    table[0, 12] = torch.nan
    out = ops.siamese_augment(x, table, torch.tensor([0, 2, 5], device="cuda"))
    assert out[:2].isnan().all()
    images = torch.rand(4, 6, 6, 3, device="cuda")
    index = torch.tensor([-7, 99], device="cuda")
    mean, std = gpu(MEAN, STD)
    row = TABLES["identity"].cuda()
    out = ops.gather_augment(images, index, row, mean, std, torch.float32)
    clamped = index.clamp(0, 3)
    assert torch.equal(out, ops.gather_augment(images, clamped, row, mean, std, torch.float32))


@pytest.mark.cuda
def test_devices_are_not_mixed() -> None:
    x = torch.randn(2, 3, 6, 6, device="cuda")
    with pytest.raises(RuntimeError, match="params must be on the device of the images"):
        ops.siamese_augment(x, TABLES["identity"])


@pytest.mark.cuda
def test_the_drop_ins_draw_what_they_draw_on_the_cpu() -> None:
    strategy = "color_crop_cutout_flip_scale_rotate"
    x = torch.randn(5, 3, 16, 16)
    aug = DiffAug(strategy, batch=True)
    for seed in range(8):
        assert_close(DiffAugment(x.cuda(), strategy, seed), DiffAugment(x, strategy, seed))
        assert_close(aug(x.cuda(), seed=seed), aug(x, seed=seed))


@pytest.mark.cuda
def test_the_drop_ins_refuse_to_be_captured() -> None:
    x = torch.randn(2, 3, 8, 8, device="cuda")
    for augment in (DiffAug("flip"), lambda x: DiffAugment(x, "flip")):
        refusal = None
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x + 1
            try:
                augment(x)
            except RuntimeError as error:
                refusal = str(error)
        assert refusal is not None
        assert "dmfast.ops.draw_augmentation" in refusal


# ---- More than 2^31 elements -------------------------------------------------------------------


def needs_memory(gigabytes: int) -> None:
    if torch.cuda.mem_get_info()[0] < gigabytes << 30:
        pytest.skip(f"less than {gigabytes} GiB free on the GPU")


@pytest.mark.cuda
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_norm_of_more_than_two_to_the_31_elements(layout: str) -> None:
    needs_memory(20)
    last = randn(1, 128, 32, 32, seed=0).bfloat16().cuda()
    x = last.expand(2**31 // last.numel() + 3, -1, -1, -1)
    x = lay_out(x, layout).requires_grad_()
    assert x.numel() > 2**31
    out = ops.instance_norm_relu_pool(x)
    out.backward(torch.ones_like(out))
    alone = lay_out(last, layout).requires_grad_()
    expected = ops.instance_norm_relu_pool(alone)
    expected.sum().backward()
    assert torch.equal(out[-1:], expected)
    assert torch.equal(x.grad[-1:], alone.grad)


@pytest.mark.cuda
@pytest.mark.parametrize("backward", [False, True])
def test_more_than_two_to_the_31_elements(backward: bool) -> None:
    needs_memory(10)
    operator = OP._siamese_augment_backward if backward else OP.siamese_augment
    x = torch.zeros(2**31 // (3 * 64 * 64) + 7, 3, 64, 64, dtype=torch.bfloat16, device="cuda")
    x[-1] = torch.arange(64, device="cuda")
    assert x.numel() > 2**31
    out = operator(x, TABLES["flip"].cuda(), None)
    assert torch.equal(out[-1], x[-1].flip(-1))


@pytest.mark.cuda
def test_gather_from_more_than_two_to_the_31_elements() -> None:
    needs_memory(4)
    images = torch.zeros(2**31 // (64 * 64 * 3) + 7, 64, 64, 3, dtype=torch.uint8, device="cuda")
    images[-1] = torch.arange(64, dtype=torch.uint8, device="cuda")[:, None]
    last = torch.tensor([len(images) - 1], device="cuda")
    rest = *gpu(TABLES["flip"], MEAN, STD), torch.float32
    out = ops.gather_augment(images, last, *rest)
    assert torch.equal(out, ops.gather_augment(images[-1:].clone(), last * 0, *rest))


@pytest.mark.cuda
def test_discrepancy_of_more_than_two_to_the_31_elements() -> None:
    needs_memory(10)
    rows, features = 2**21 + 5, 1024
    real = torch.zeros(rows, features, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    syn = torch.zeros(2, features, dtype=torch.bfloat16, device="cuda")
    with torch.no_grad():
        real[-1] = 0.5
    ends = [0, rows - 1, rows], [0, 1, 2]
    offsets = [torch.tensor(end, device="cuda") for end in ends]
    loss = ops.class_mean_discrepancy(real, syn, 2, *offsets)
    assert loss.item() == 0.25 * features
    loss.backward()
    assert torch.equal(real.grad[-1], torch.ones_like(real.grad[-1]))


@pytest.mark.cuda
def test_draw_of_more_than_two_to_the_31_numbers() -> None:
    needs_memory(20)
    groups = 2**31 // 13 + 9
    table = ops.draw_augmentation("color", groups, (8, 8), 1, 2, stream=2, device="cuda")
    assert table.numel() > 2**31
    last = ops.draw_augmentation("color", 3, (8, 8), 1, 2, first_group=groups - 3, stream=2)
    assert torch.equal(table[-3:].cpu(), last)
    del table
    networks = torch.empty(3, 2**30, dtype=torch.bfloat16, device="cuda")
    alone = torch.empty(2**30, dtype=torch.bfloat16, device="cuda")
    ops.draw_weights_([networks], [1.0], 1, 2, networks=3, stream=3)
    ops.draw_weights_([alone], [1.0], 1, 2, first_network=2, stream=3)
    assert torch.equal(networks[2], alone)


@pytest.mark.cuda
def test_batch_of_more_than_two_to_the_31_images() -> None:
    needs_memory(18)
    start = 2**31 - 5
    order = torch.zeros(start + 25, dtype=torch.int64, device="cuda")
    order[start:] = torch.arange(25, device="cuda") + 2**40
    offsets = torch.tensor([start, start + 9, start + 25], device="cuda")
    batch = torch.tensor([0, 6, 14], device="cuda")
    drawn = ops.draw_batch(order, offsets, batch, 14, 3, 4, stream=1)
    few = order[start:].cpu(), offsets.cpu() - start, batch.cpu()
    assert torch.equal(drawn.cpu(), ops.draw_batch(*few, 14, 3, 4, stream=1))
