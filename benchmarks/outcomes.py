"""A pytest plugin that writes every test's outcome to the file that SHVIT_KERNELS_OUTCOMES names, a JSON line each.

Lines are written at once, so that a run that hangs or crashes leaves what it found.
"""

import json
import os

import pytest
import torch

VARIABLE = "SHVIT_KERNELS_OUTCOMES"


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        if report.failed:
            _end_where_the_device_is_lost()
        return
    if report.when == "call" or report.outcome != "passed":
        message = ""
        if report.outcome != "passed":
            message = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        line = {
            "test": report.nodeid,
            "outcome": report.outcome,
            "seconds": report.duration,
            "message": message[-2000:],
        }
        with open(os.environ[VARIABLE], "a") as file:
            file.write(json.dumps(line) + "\n")


def _end_where_the_device_is_lost() -> None:
    """After an illegal access every later test of the process would fail too; pytest-xdist starts another process."""
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)
