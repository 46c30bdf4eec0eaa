"""The harness that executes CUDA kernels on a processor (tests/cuda_host): right kernels pass, broken ones do not."""

import ctypes
import itertools
import math
import re
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.support import cuda_hosted
from tests.support.cuda_hosted import ROOT, Harness

pytestmark = cuda_hosted.needs_hosted

SAMPLES = "tests/cuda_host/samples/samples.cu"


def built_samples(kind: str, name: str = "samples", **variables: str) -> Harness:
    runtime = " ".join(f"tests/cuda_host/{part}.cpp" for part in ("runtime", "races", "matrix"))
    return Harness(cuda_hosted.build(kind, name, KERNELS=SAMPLES, OTHERS=runtime, **variables))


@pytest.fixture(scope="module")
def samples() -> Harness:
    return built_samples("checked")


BROKEN = re.search(r"enum Broken \{(.*?)\};", (ROOT / SAMPLES).read_text(), re.S).group(1)
BROKEN = {name: i for i, name in enumerate(re.findall(r"k(\w+),", BROKEN))}


def run(harness: Harness, name: str, *arguments: Tensor | int | float) -> str | None:
    """What a sample's launch returns."""
    function = getattr(harness.library, f"sample_{name}")
    function.restype = ctypes.c_char_p
    error = function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in arguments))
    return error and error.decode()


def checked(harness: Harness, name: str, *arguments: Tensor | int | float) -> None:
    error = run(harness, name, *arguments)
    assert error is None, error


# Instructions


def test_every_instruction_has_its_twin():
    for header, definition in (
        ("ptx.cuh", r"^__device__.*?(\w+)(?:<\w+>)?\("),
        ("launch.cuh", r"^const char\* (\w+)\("),
    ):
        names = set(re.findall(definition, (ROOT / "csrc/cuda/device" / header).read_text(), re.M))
        twins = (ROOT / "tests/cuda_host/device" / header).read_text()
        missing = {name for name in names if not re.search(rf"\b{name}(<\w+>)?\(", twins)}
        assert names and missing <= {"shared_address"}, f"{header}: {sorted(missing)}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_conversions_of_16_bit_types(samples, dtype):
    name = str(dtype).removeprefix("torch.")
    to, back = (getattr(samples.library, f"sample_{way}_{name}") for way in ("to", "from"))
    to.restype, to.argtypes = ctypes.c_ushort, (ctypes.c_float,)
    back.restype, back.argtypes = ctypes.c_float, (ctypes.c_ushort,)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    ours = torch.tensor([back(bits & 0xFFFF) for bits in range(-(2**15), 2**15)])
    assert torch.equal(ours.nan_to_num(7.125), every.nan_to_num(7.125)) and torch.equal(ours.isnan(), every.isnan())
    # Every value, the ties between neighbours, and the float32 on either side of these.
    values = every[every.isfinite()].double().sort().values
    ties = ((values[1:] + values[:-1]) / 2).float()
    beside = [torch.nextafter(ties, torch.full_like(ties, way)) for way in (-math.inf, math.inf)]
    some = torch.randn(1000, generator=torch.Generator().manual_seed(0)).mul(1e-5)
    for x in (every, ties, *beside, some, torch.tensor([3.3e38, -3.4e38, 65519.9, 65520.0, 1e-45, -0.0])):
        expected = x.to(dtype).float()
        ours = torch.tensor([to(value) for value in x.tolist()], dtype=torch.int32).short().view(dtype).float()
        assert torch.equal(ours.isnan(), expected.isnan())
        assert torch.equal(ours.nan_to_num(7.125).view(torch.int32), expected.nan_to_num(7.125).view(torch.int32))


def bits(x: float) -> int:
    return torch.tensor(x).view(torch.int32).item() & 0xFFFFFFFF


def test_rounding_to_tf32(samples):
    to_tf32 = samples.library.sample_to_tf32
    to_tf32.restype, to_tf32.argtypes = ctypes.c_uint32, (ctypes.c_float,)
    unit = 2.0**-10
    for x, expected in (
        (1.0, 1.0),
        (1 + unit / 2, 1 + unit),  # ties go away from zero
        (-1 - unit / 2, -1 - unit),
        (1 + unit * 0.49, 1.0),
        (torch.finfo(torch.float32).max, math.inf),
        (-math.inf, -math.inf),
    ):
        assert to_tf32(x) == bits(expected), x
    assert to_tf32(math.nan) == 0x7FFFFFFF


def test_product_in_tf32_ignores_the_low_bits(samples):
    generator = torch.Generator().manual_seed(0)
    a, b, d = torch.randn(16, 8, generator=generator), torch.randn(8, 8, generator=generator), torch.zeros(16, 8)
    checked(samples, "product_tf32", a, b, d)
    cut_a, cut_b = ((t.view(torch.int32) & ~0x1FFF).view(torch.float32).double() for t in (a, b))
    assert (d - cut_a @ cut_b).abs().max() < 1e-6
    assert (d - a.double() @ b.double()).abs().max() > 1e-4


def test_products_are_summed_in_float32_in_order(samples):
    """2^24 + 1 - 2^24 is 0 in this order; a wider sum would keep the 1."""
    a, b, d = torch.zeros(2, 16, 16).half(), torch.zeros(16, 16).half(), torch.zeros(2, 16, 16)
    a[:, 0, :3] = torch.tensor([4096.0, 1.0, -4096.0])
    b[:3, 0] = torch.tensor([4096.0, 1.0, 4096.0])
    checked(samples, "product_float16", a, b, d, 2, BROKEN["Nothing"])
    assert d[0, 0, 0] == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_two_matrices_are_dealt_out(samples, transposed):
    x, y = torch.arange(128, dtype=torch.int16), torch.zeros(128, dtype=torch.int16)
    checked(samples, "load_two", x, y, transposed)
    matrices = x.view(2, 8, 8)
    assert torch.equal(y.view(2, 8, 8), matrices.mT if transposed else matrices)


def test_copies_are_filled_up_with_zeros(samples):
    x = torch.arange(1, 513, dtype=torch.int16).view(torch.uint8).view(-1)[:512].clone()
    for valid in range(17):
        y = torch.full_like(x, 77)
        checked(samples, "copy_some", x, y, valid)
        assert torch.equal(y.view(32, 16)[:, :valid], x.view(32, 16)[:, :valid])
        assert not y.view(32, 16)[:, valid:].any()
    assert "17 valid bytes of 16" in run(samples, "copy_some", x, y, 17)


def test_shuffles_and_votes(samples):
    lanes = torch.arange(32)
    y = torch.zeros(12, 32, dtype=torch.int32)
    third = sum(1 << l for l in range(0, 32, 3))
    expected = [
        torch.full((32,), 5),
        lanes // 8 * 8 + (lanes + 1) % 8,
        lanes ^ 3,
        torch.where(lanes + 2 < 32, lanes + 2, lanes),
        torch.where(lanes % 4 < 3, lanes + 1, lanes),
        torch.where(lanes < 4, lanes, lanes - 4),
        torch.full((32,), third if third < 2**31 else third - 2**32),
        torch.ones(32),
        torch.zeros(32),
        torch.ones(32),
        torch.zeros(32),
        torch.where(lanes < 8, lanes ^ 1, lanes ^ 2),
    ]
    for _ in samples.thread_orders():
        checked(samples, "exchange", y.zero_())
        for row, e in zip(y, expected, strict=True):
            assert torch.equal(row, e.int())


@pytest.mark.parametrize("name, nan, infinity", [("float16", 0x7E00, 0x7C00), ("bfloat16", 0x7FC0, 0x7F80)])
def test_relu_of_pairs(samples, name, nan, infinity):
    relu2 = getattr(samples.library, f"sample_relu2_{name}")
    relu2.restype, relu2.argtypes = ctypes.c_uint32, (ctypes.c_uint32,)
    results = {0x3C00: 0x3C00, 0xBC00: 0, 0x8000: 0, 0: 0, 1: 1, 0x8001: 0, infinity: infinity, infinity | 0x8000: 0}
    results |= {nan: 0x7FFF, nan | 0x8000: 0x7FFF}
    for (low, r), (high, s) in itertools.product(results.items(), repeat=2):
        assert relu2(low | high << 16) == r | s << 16


def test_arithmetic_of_one_value(samples):
    max_nan, exp2 = samples.library.sample_max_nan, samples.library.sample_exp2_approx
    max_nan.restype, max_nan.argtypes = ctypes.c_float, (ctypes.c_float, ctypes.c_float)
    exp2.restype, exp2.argtypes = ctypes.c_float, (ctypes.c_float,)
    assert max_nan(1.0, 2.0) == max_nan(2.0, 1.0) == 2.0
    assert math.isnan(max_nan(math.nan, 1.0)) and math.isnan(max_nan(1.0, math.nan))
    assert exp2(3.0) == 8.0 and exp2(-126.0) == 2.0**-126 and exp2(-127.0) == 0.0 and exp2(-math.inf) == 0.0


def test_launches_that_a_device_refuses(samples):
    launch = samples.library.sample_launch
    launch.restype, launch.argtypes = ctypes.c_char_p, (ctypes.c_uint, ctypes.c_int, ctypes.c_size_t)
    for blocks, threads, shared_bytes in ((0, 32, 0), (1, 0, 0), (1, 1025, 0), (1, 32, 228 << 10)):
        assert launch(blocks, threads, shared_bytes) == b"invalid argument"
    with samples.shared_memory_limit(100):
        assert launch(1, 32, 101) == b"invalid argument"


# Broken kernels


def sum_rows(harness: Harness, broken: str) -> tuple[Tensor, Tensor]:
    """The sample's result and the true one; more than one block, and columns that do not fill the last round."""
    x = torch.randint(-8, 8, (70, 300), generator=torch.Generator().manual_seed(0)).float()
    y = torch.zeros(71)
    checked(harness, "sum_rows", x, y, 70, 300, BROKEN[broken])
    return y[:70], x.sum(1)


def product(dtype: torch.dtype, harness: Harness, broken: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    # Small integers: every sum is exact.
    a, b = (torch.randint(-8, 8, size, generator=generator).to(dtype) for size in ((4, 16, 16), (16, 16)))
    d = torch.zeros(4, 16, 16)
    checked(harness, f"product_{str(dtype).removeprefix('torch.')}", a, b, d, 4, BROKEN[broken])
    return d, a.float() @ b.float()


KERNELS = {
    "sum_rows": sum_rows,
    "product_float16": partial(product, torch.float16),
    "product_bfloat16": partial(product, torch.bfloat16),
}


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_right_kernels_are_right_in_every_order(samples, kernel):
    for _ in samples.thread_orders():
        result, truth = kernel(samples, "Nothing")
        assert torch.equal(result, truth)
        with samples.finding_races():
            result, truth = kernel(samples, "Nothing")
        assert torch.equal(result, truth)


# What a broken kernel does in every order, races not looked for.
ERRORS = {
    "AbsentLane": (sum_rows, r"deadlock; .*__shfl_xor_sync \(samples.cu:\d+\)"),
    "DivergentBarrier": (sum_rows, r"deadlock; 96 threads at __syncthreads \(samples.cu:\d+\).*; 32 threads ended"),
    "DifferentOperations": (sum_rows, r"__ballot_sync of lanes ffffffff .*__shfl_xor_sync|__shfl.* at __ballot_sync"),
    "Misaligned": (sum_rows, r"misaligned access of 0x\w+4 \(.*samples.cu:\d+\)"),
    "PastArray": (sum_rows, r"index 4 is out of bounds \(.*samples.cu:\d+\)"),
    "MisalignedRows": (KERNELS["product_float16"], r"ldmatrix.* not aligned to 16 bytes \(samples.cu:\d+\)"),
    "MisalignedCopy": (KERNELS["product_float16"], r"cp.async.* global .* not aligned to 16 bytes \(samples.cu:\d+\)"),
    "RowsOutOfSharedMemory": (KERNELS["product_float16"], r"ldmatrix.* of 2048 bytes of shared memory"),
}


@pytest.mark.parametrize("broken", ERRORS)
def test_errors_are_reported_in_every_order(samples, broken):
    kernel, message = ERRORS[broken]
    for _ in samples.thread_orders():
        with pytest.raises(AssertionError, match=message):
            kernel(samples, broken)


# Kernels that are right in some order.
RACES = {
    "NoBarrierBeforeRead": (sum_rows, r"race: .* of shared memory"),
    "NoBarrierBeforeWrite": (sum_rows, r"race: .* of shared memory"),
    "EveryBlockWrites": (sum_rows, r"race: .* writes global memory .* another block wrote"),
    "ReadsWhatBlocksWrite": (
        sum_rows,
        r"race: .* reads global memory .* another block wrote|race: .* another block read",
    ),
    "PastSharedMemory": (sum_rows, r"writes 4 bytes at byte 16 of 16 bytes of shared memory|race"),
    "NoWait": (KERNELS["product_float16"], r"race: .* is copying to asynchronously"),
    "NoWarpBarrier": (KERNELS["product_float16"], r"race: .* of shared memory"),
    "WriteUnderCopy": (KERNELS["product_float16"], r"race: .* is copying to asynchronously"),
}


@pytest.mark.parametrize("broken", RACES)
def test_races_are_found_in_every_order(samples, broken):
    kernel, message = RACES[broken]
    for _ in samples.thread_orders():
        with samples.finding_races(), pytest.raises(AssertionError, match=message):
            kernel(samples, broken)


@pytest.mark.parametrize("broken", ["NoBarrierBeforeRead", "NoBarrierBeforeWrite", "EveryBlockWrites", "NoWait"])
def test_some_order_shows_a_race_in_the_result(samples, broken):
    kernel, _ = RACES[broken]
    results = [kernel(samples, broken) for _ in samples.thread_orders()]
    assert any(not torch.equal(result, truth) for result, truth in results)


@pytest.mark.parametrize("kernel, broken", [(sum_rows, "OneColumnTooMany"), (KERNELS["product_float16"], "WrongRows")])
def test_wrong_kernels_are_wrong_in_every_order(samples, kernel, broken):
    for _ in samples.thread_orders():
        result, truth = kernel(samples, broken)
        assert not torch.equal(result, truth)


@pytest.mark.parametrize("kernel, count", [(sum_rows, 2), (KERNELS["product_float16"], 2)])
def test_barriers_can_be_passed_over(samples, kernel, count):
    with samples.recorded_barriers() as barriers:
        kernel(samples, "Nothing")
    assert len(barriers) == count
    for barrier in barriers:
        with samples.without(barrier), samples.finding_races(), pytest.raises(AssertionError, match="race"):
            kernel(samples, "Nothing")
    with samples.finding_races():
        kernel(samples, "Nothing")


def test_without_the_assembly_of_the_context_switch():
    harness = built_samples("checked", "samples_ucontext", LINK="-DCUDA_HOST_UCONTEXT")
    for kernel in KERNELS.values():
        for _ in harness.thread_orders():
            result, truth = kernel(harness, "Nothing")
            assert torch.equal(result, truth)
    with pytest.raises(AssertionError, match="deadlock"):
        sum_rows(harness, "AbsentLane")
    sum_rows(harness, "Nothing")


# AddressSanitizer


@pytest.mark.parametrize(
    "broken, message",
    [("Nothing", None), ("OneRowTooMany", "heap-buffer-overflow"), ("PastSharedMemory", "use-after-poison")],
)
def test_accesses_out_of_bounds_are_found(broken, message):
    result = cuda_hosted.with_addresses_checked(f"""
from tests import test_cuda_host as t
result, truth = t.sum_rows(t.built_samples("addresses"), {broken!r})
assert (result == truth).all()
""")
    assert (result.returncode == 0) == (message is None), result.stderr
    assert message is None or (message in result.stderr and "samples.cu" in result.stderr)
