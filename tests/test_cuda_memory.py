"""What the CUDA kernels do to memory, in the hosted tier: bounds, races, barriers, and what nobody wrote."""

import itertools
import time
from functools import cache

import pytest
import torch

from tests.support import cuda_hosted
from tests.support.cases import Case, eval_call, mixer_call, moments_call, shsa_call, train_call
from tests.support.numerics import Call, Results, filled_with_nan

pytestmark = cuda_hosted.needs_hosted

HALF, BFLOAT16 = torch.float16, torch.bfloat16
CASES = [
    Case(P=66, dtype=HALF),
    Case(P=72, N=64, dtype=BFLOAT16, layout="channels_last"),
    Case(P=75, dtype=torch.float32, relu=False),
    Case(P=96, N=16, B=5, dtype=HALF),
    Case(P=48, N=16, B=6, layout="channels_last"),
    Case(P=7, D=1, N=1, B=3, dtype=BFLOAT16, bias=False),
    Case(P=68, D=24, N=100, B=1, dtype=HALF, norm="none", beyond=0),
    Case(P=130, D=64, N=17, B=1),
    Case(P=48, N=257, B=1, beyond=3, dtype=BFLOAT16),
    Case(P=20, D=8, N=260, B=1, layout="channels_last", norm="weight"),
]
OPERATORS = {
    "shsa": (shsa_call, None),
    "moments": (moments_call, None),
    "train": (train_call, None),
    "eval": (eval_call, ()),  # with gradients these two are others
    "mixer": (mixer_call, ()),
}
CALLS = list(itertools.product(OPERATORS, CASES))
CALLS.append(("moments", Case(P=5, N=1, B=2060, beyond=1)))  # more tiles than parts
each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_call = pytest.mark.parametrize("operator, case", CALLS, ids=str)


@cache
def call(operator: str, case: Case) -> Call:
    return OPERATORS[operator][0](case)


def run(operator: str, case: Case) -> Results:
    return call(operator, case).run("hosted", OPERATORS[operator][1])


@pytest.fixture(autouse=True)
def harness():
    with cuda_hosted.backend() as harness, filled_with_nan():
        yield harness


@each_call
def test_the_order_of_threads_and_blocks_changes_no_bit(harness, operator, case):
    results = [run(operator, case) for _ in harness.thread_orders()]
    assert all(t.isfinite().all() for t in results[0].values()), "memory that nobody wrote was used"
    for other in results[1:]:
        for name, t in other.items():
            assert torch.equal(t, results[0][name]), name


@each_call
def test_no_races(harness, operator, case):
    with harness.finding_races():
        run(operator, case)


def is_noticed(operator: str, case: Case) -> bool:
    try:
        run(operator, case)
    except RuntimeError as error:
        assert "race" in str(error)
        return True
    return False


def test_each_barrier_is_missed(harness):
    """Without any one of them there is a race in some call."""
    met, seconds = {}, {}
    for of_call in CALLS:
        start = time.process_time()
        with harness.recorded_barriers() as barriers:
            run(*of_call)
        seconds[of_call] = time.process_time() - start
        for barrier in barriers:
            met.setdefault(barrier, []).append(of_call)
    unnoticed = []
    for barrier, calls in met.items():
        with harness.without(barrier), harness.finding_races():
            if not any(is_noticed(*of_call) for of_call in sorted(calls, key=seconds.get)):
                unnoticed.append(barrier)
    assert met
    assert not unnoticed


@each_operator
def test_accesses_stay_in_bounds(operator):
    cuda_hosted.build("addresses")
    result = cuda_hosted.with_addresses_checked(f"""
from tests import test_cuda_memory as t
from tests.support import cuda_hosted
with cuda_hosted.backend():
    for operator, case in t.CALLS:
        if operator == {operator!r}:
            print(case, flush=True)
            t.run(operator, case)
""")
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr}"
