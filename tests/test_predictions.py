"""benchmarks/results/predictions.md says what the Triton backend and PyTorch launch, and automatic choice does what it
says."""

from pathlib import Path

import pytest

from shvit_kernels import backends

pytest.importorskip("triton")

from benchmarks import predict

PAGE = (Path(predict.__file__).parent / "results/predictions.md").read_text()
SHAPE = predict.shapes_of_the_family()[-1]


def rows(heading: str) -> list[dict[str, str]]:
    """The first table under a heading; of columns of one name the first."""
    (section,) = [part for part in PAGE.split("\n## ") if part.startswith(heading)]
    table = section[section.index("\n| ") :].strip().partition("\n\n")[0]
    names, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    return [dict(reversed(list(zip(names, line, strict=True)))) for line in lines]


def test_automatic_choice_follows_the_verdict():
    verdict = rows("Predicted: which backend wins")
    called = [cell for row in verdict for way, cell in row.items() if way.startswith("call by call")]
    assert len(called) == len(predict.OPERATIONS) * len(predict.shapes_of_the_family()) * len(predict.BATCHES)
    first = next(name for name in backends.BACKENDS if name in predict.HOST)
    assert {cell.partition(" ")[0] for cell in called} == {first}


@pytest.mark.parametrize("B", predict.BATCHES)
def test_the_page_has_what_triton_launches(B):
    small = {"registers": 32, "shared": 0}  # nothing is built here: only the times of a single image are the page's
    builds = {operation: [small] * len(calls) for operation, calls in predict.triton_calls(SHAPE, B).items()}
    predicted = predict.triton_predictions(SHAPE, B, builds)
    found = {row["operation"]: row for row in rows(f"Predicted: {SHAPE.name}") if row["batch"] == str(B)}
    assert found.keys() == predicted.keys()
    for name, row in found.items():
        assert [row["launches"], row["KiB moved"], row["M operations"]] == predicted[name].amounts()
        if B == 1:
            assert (row["us"], row["limiter"]) == (f"{predicted[name].microseconds:.1f}", predicted[name].limiter)


@pytest.mark.parametrize("backend", predict.HOST)
def test_the_page_has_the_ratios_to_pytorch(backend):
    found = {(row["operation"], row["against"], row["batch"]): row for row in rows(f"Predicted: `{backend}` against")}
    assert found.keys() == {(*each, str(B)) for each in predict.compared() for B in predict.BATCHES}
    column = "us" if backend == "triton" else "us of cuda"
    shown = {(row["operation"], row["batch"]): float(row[column]) for row in rows(f"Predicted: {SHAPE.name}")}
    for (operation, peer, B), row in found.items():
        theirs, beside = predict.peer(peer, operation, SHAPE, int(B)), predict.beside(operation, SHAPE, int(B))
        ours = shown[operation, B] + predict.microseconds(beside)
        assert row["launches"] == str(len(theirs))
        assert float(row[SHAPE.name]) == pytest.approx(predict.microseconds(theirs) / ours, rel=0.02)


def test_merging_leaves_products_alone():
    B = predict.SHOWN
    eager, merged = (predict.peer(name, "shsa_mixer", SHAPE, B) for name in predict.PEERS)
    products = [launch.operations for launch in eager if launch.operations]
    assert len(eager) == 11  # clone, norm, convolution, product, scale, softmax, product, cat, ReLU, convolution, sum
    assert [launch.operations for launch in merged] == [0, *products[:2], 0, products[2], 0, products[3], 0]
    softmax, concatenation = merged[3], merged[5]
    assert softmax.bytes == 2 * predict.HALF * B * SHAPE.N**2
    assert concatenation.bytes == 2 * predict.HALF * B * SHAPE.C * SHAPE.N
