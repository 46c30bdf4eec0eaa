"""The CUDA kernels built for sm_80, sm_90a, sm_100 and sm_120: they do not spill, and they fit."""

import pytest
import torch

from shvit_kernels.backends.operators import Functions
from tests.support import cuda_builds, cuda_hosted
from tests.support.cuda_builds import DEVICES, SOURCES

pytestmark = pytest.mark.skipif(cuda_builds.why_unavailable() is not None, reason=cuda_builds.why_unavailable() or "")

each_architecture = pytest.mark.parametrize("architecture", DEVICES, ids="sm_{}".format)

B, QK_DIM, EPS = 256, 16, 1e-5
STAGES = [
    (C, P, side) for C, P, side in ((224, 48, 7), (320, 68, 4), (308, 66, 7), (448, 96, 4), (352, 75, 7), (336, 72, 8))
]
DETECTION = (336, 72, 32)


@each_architecture
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.stem)
def test_builds_without_spilling(source, architecture, record_property):
    builds = cuda_builds.built(source, architecture)
    record_property(cuda_builds.BUILDS, [architecture, source.stem, [vars(build) for build in builds]])
    spilling = [f"{b.kernel} spills {b.spilled} bytes, {b.stack} of stack" for b in builds if b.spilled or b.stack]
    assert not spilling, f"sm_{architecture}: " + "; ".join(spilling)


def call_everything(functions: Functions, C: int, P: int, side: int, dtype: torch.dtype) -> None:
    """Every operator on an image batch of a stage, forward and backward; the values do not matter."""
    O = 2 * QK_DIM + P

    def parameter(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=dtype, requires_grad=True)

    x = torch.empty(B, C, side, side, dtype=dtype, requires_grad=True)
    norm, weight, bias = (parameter(P), parameter(P)), parameter(O, P), parameter(O)
    batch_norm = [parameter(O), parameter(O), *torch.empty(2, O, dtype=dtype)]
    settings = (0.25, True, False, False)
    functions.shsa(x, *norm, weight, bias, QK_DIM, EPS, *settings).sum().backward()
    y, *statistics = functions.shsa_train(x, *norm, weight, *batch_norm[:2], QK_DIM, EPS, EPS, *settings)
    y.sum().backward()
    functions.update_running_statistics(*batch_norm[2:], torch.tensor(0), *statistics, B * side * side, 0.1)
    sum(t.sum() for t in functions.partial_moments(x, *norm, P, EPS)).backward()
    with torch.no_grad():
        functions.shsa_eval(x, *norm, weight, bias, *batch_norm, QK_DIM, EPS, EPS, *settings)
        functions.shsa_mixer(x, *norm, weight, bias, parameter(C, C), parameter(C), QK_DIM, EPS, 0.25, False, False)


@cuda_hosted.needs_hosted
@each_architecture
def test_what_is_launched_at_the_published_shapes_fits(architecture, record_property):
    device = DEVICES[architecture]
    every = [b for source in SOURCES for b in cuda_builds.built(source, architecture)]
    builds = {b.kernel: b for b in every}
    assert len(builds) == len(every), "two kernels of one name"
    functions, harness, launched, wrong = cuda_hosted.load(), cuda_hosted.harness(), [], []
    for C, P, side in (*STAGES, DETECTION):
        for dtype in (torch.float16, torch.float32):
            with harness.shared_memory_limit(device.shared_of_a_block), harness.noted_launches() as launches:
                call_everything(functions, C, P, side, dtype)
            for launch in launches:
                kernel = builds[cuda_builds.plain(launch.kernel)]
                shared = launch.shared + kernel.static_shared
                blocks = device.resident_blocks(kernel.registers, launch.threads, shared)
                if blocks == 0:
                    wrong.append(
                        f"{kernel.kernel} with {launch.threads} threads and {shared} bytes at {C}, {P}, {side}"
                    )
                occupancy = device.occupancy(kernel.registers, launch.threads, shared)
                launched.append([kernel.kernel, launch.threads, shared, blocks, occupancy])
    record_property(cuda_builds.LAUNCHES, [architecture, launched])
    assert not wrong, f"no multiprocessor of sm_{architecture} has room for " + "; ".join(wrong)


SPILLING = """
__global__ void spilling(float* p) {
  float values[64];
#pragma unroll
  for (int i = 0; i < 64; ++i) values[i] = p[i * 32 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 64; ++i) p[i * 32 + threadIdx.x] = values[63 - i] * values[i];
}
__global__ void frugal(float* p) {
  extern __shared__ float dynamic[];
  __shared__ float fixed[32];
  fixed[threadIdx.x] = dynamic[threadIdx.x];
  p[threadIdx.x] = fixed[0];
}
"""


def test_spills_are_seen(tmp_path):
    source = tmp_path / "spilling.cu"
    source.write_text(SPILLING)
    builds = {b.kernel: b for b in cuda_builds.parsed(cuda_builds.report(source, "90a", "-maxrregcount=32"))}
    assert builds["spilling"].spilled > 0 and builds["spilling"].stack > 0 and builds["spilling"].registers == 32
    assert builds["frugal"].spilled == 0 == builds["frugal"].stack and builds["frugal"].static_shared == 128


def test_names_are_the_same_from_every_compiler():
    names = {
        "void shvit::cuda::_GLOBAL__N__75b0_8_a_cu::kernel<shvit::cuda::Half<__half>, (shvit::Phase)1>(shvit::P, int)",
        "shvit::cuda::(anonymous namespace)::kernel<shvit::cuda::Half<__half>, (shvit::Phase)1>(shvit::P, int)",
    }
    assert {cuda_builds.plain(name) for name in names} == {"kernel<Half<__half>, (Phase)1>"}


def test_occupancy_is_what_cuda_documents():
    hopper, ada = DEVICES["90a"], DEVICES["120"]
    assert hopper.resident_blocks(registers=32, threads=1024, shared=0) == 2
    assert hopper.resident_blocks(registers=33, threads=1024, shared=0) == 1  # 40 are given out
    assert hopper.resident_blocks(registers=255, threads=128, shared=0) == 2
    assert hopper.resident_blocks(registers=32, threads=128, shared=(227 << 10) // 2) == 1
    assert hopper.resident_blocks(registers=32, threads=32, shared=0) == 32
    assert hopper.occupancy(registers=128, threads=128, shared=0) == 0.25
    assert ada.resident_blocks(registers=16, threads=1536, shared=99 << 10) == 1
    assert ada.resident_blocks(registers=16, threads=32, shared=100 << 10) == 0
