"""The examples run and learn."""

import runpy
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def test_train_digits(capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("sklearn")
    main = runpy.run_path(str(EXAMPLES / "train_digits.py"))["main"]
    curves = main(["--epochs", "5", "--compare"])
    # Chance is 10%. Rounding makes the curves drift apart, and both learn.
    assert set(curves) == {"shvit_kernels", "stock"}
    for curve in curves.values():
        assert len(curve.accuracy) == 5
        assert curve.accuracy[-1] > 0.93
    assert "accuracy on held-out digits" in capsys.readouterr().out
