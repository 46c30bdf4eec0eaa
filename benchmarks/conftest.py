"""The cases of ``shvit_kernels.bench`` under pytest-benchmark: ``pytest benchmarks/``, one thread."""

import pytest
import torch

from shvit_kernels.bench.cases import cases, contenders
from shvit_kernels.models.shvit import VARIANTS


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give a module's tests the cases of its ``SUITES``, once per contender."""
    if "contender" in metafunc.fixturenames:
        # Compiling takes longer than all the rest; `python -m shvit_kernels bench` measures it.
        found = [
            (case, name) for case in cases(metafunc.module.SUITES, VARIANTS) for name in contenders(case, compile=False)
        ]
        ids = [f"{case.id}, {name}" for case, name in found]
        metafunc.parametrize(("case", "contender"), found, ids=ids)
