"""Whole models, ours and stock."""

SUITES = ["models"]


def test_model(benchmark, case, contender):
    benchmark.group = case.id
    benchmark(case.call(contender))
