"""The operator and the layer, ours and stock."""

SUITES = ["op", "layer"]


def test_shsa(benchmark, case, contender):
    benchmark.group = case.id
    benchmark(case.call(contender))
