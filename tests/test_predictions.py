"""benchmarks/results/predictions.md says what the Triton backend launches, and automatic choice does what it says."""

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
