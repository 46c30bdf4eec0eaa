"""Set-up shared by all tests, and the account of what they proved."""

import os

import pytest
import torch

from shvit_kernels.backends import native
from tests.support import native as native_tier
from tests.support import triton_tier


def pytest_configure(config: pytest.Config) -> None:
    if native_tier.missing() is not None and native_tier.compiler() is not None:
        raise pytest.UsageError(
            f"{native_tier.missing()}; but {native_tier.compiler()} is here: "
            "build it with `pip install --no-build-isolation --no-deps -e .`"
        )
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the processors


def _native_tier() -> list[str]:
    if native_tier.missing() is not None:
        return [f"native: not run, {native_tier.missing()}"]
    runnable = native.instruction_sets()
    lines = [f"native: ran on {', '.join(runnable)}; chosen here is {native.instruction_set()}"]
    unproven = [name for name in native_tier.VARIANTS if name not in runnable]
    if unproven:
        lines.append(f"native: {', '.join(unproven)} wrappers unproven here, this processor cannot run them")
    return lines


def _triton_compiled_tier(terminalreporter: pytest.TerminalReporter) -> list[str]:
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    properties = [p for report in reports if report.when == "call" for p in report.user_properties]
    results = [value for name, value in properties if name == triton_tier.PROPERTY]
    if not results:
        return ["triton-compiled: not run"]
    heading = "triton-compiled: most registers / KiB of shared memory of each kernel"
    return [heading, *triton_tier.lines(results)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("tiers")
    for line in [*_native_tier(), *_triton_compiled_tier(terminalreporter)]:
        terminalreporter.write_line(line)
