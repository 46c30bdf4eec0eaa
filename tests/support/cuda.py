"""Where the tests of the CUDA kernels run: on a GPU if the library was built for it, hosted otherwise."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from shvit_kernels.backends import cuda

from . import cuda_hosted

ON_GPU = cuda.why_unavailable() is None
BACKEND = "cuda" if ON_GPU else cuda_hosted.FAMILY
FAMILY = "native" if ON_GPU else cuda_hosted.FAMILY
"""Of the operators."""

needs_kernels = [] if ON_GPU else [cuda_hosted.needs_hosted]
only_hosted = pytest.mark.skipif(ON_GPU, reason="the order of threads is the device's own")


@contextmanager
def kernels() -> Iterator[cuda_hosted.Harness | None]:
    """Inside, ``BACKEND`` names the kernels; what they run on, None on a GPU."""
    if ON_GPU:
        yield None
    else:
        with cuda_hosted.backend() as harness:
            yield harness
