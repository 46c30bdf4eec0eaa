"""Set-up shared by all tests, and the account of what they proved."""

import os
from pathlib import Path

import pytest
import torch

from shvit_kernels.backends import native, triton
from tests.support import cuda, cuda_builds, numerics, triton_tier
from tests.support import native as native_tier


def pytest_configure(config: pytest.Config) -> None:
    if native_tier.missing() is not None and native_tier.compiler() is not None:
        raise pytest.UsageError(
            f"{native_tier.missing()}; but {native_tier.compiler()} is here: "
            "build it with `pip install --no-build-isolation --no-deps -e .`"
        )
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)  # the workers share the processors


@pytest.fixture(scope="session", autouse=True)
def _exact_float32() -> None:
    """TF32 is where a test asks for it only: the reference runs on the CPU, which has none."""
    numerics.set_tf32(False, False)


def _native_tier() -> list[str]:
    if native_tier.missing() is not None:
        return [f"native: not run, {native_tier.missing()}"]
    runnable = native.instruction_sets()
    lines = [f"native: ran on {', '.join(runnable)}; chosen here is {native.instruction_set()}"]
    unproven = [name for name in native_tier.ALL_VARIANTS if name not in runnable]
    if unproven:
        lines.append(f"native: {', '.join(unproven)} wrappers unproven here, this processor cannot run them")
    return lines


# The tiers besides native and the starts of the names of their test files; kernels that run on a GPU leave no work to
# their stand-ins.
_TIERS = {
    "triton-compiled": ("test_triton_compiled",),
    "cuda-compiled": ("test_cuda_compiled",),
    "triton-interpreted": ("test_triton_",) if triton.INTERPRETED else (),
    "cuda-hosted": () if cuda.ON_GPU else ("test_cuda_",),
    "gpu": ("test_gpu.", *(("test_cuda_",) if cuda.ON_GPU else ()), *(() if triton.INTERPRETED else ("test_triton_",))),
}

_RAN = ("passed", "failed", "error", "xfailed", "xpassed")
"""Outcomes of tests that ran."""


def _tier_of(report: pytest.TestReport) -> str | None:
    file = Path(report.nodeid.partition("::")[0]).name
    return next((tier for tier, starts in _TIERS.items() if file.startswith(starts)), None)


def _tier_lines(terminalreporter: pytest.TerminalReporter) -> list[str]:
    """Per tier what its tests came to, or why none ran."""
    outcomes = {tier: dict.fromkeys((*_RAN, "skipped"), 0) for tier in _TIERS}
    reasons: dict[str, str] = {}
    for outcome in (*_RAN, "skipped"):
        for report in terminalreporter.getreports(outcome):
            tier = _tier_of(report)
            if tier is not None:
                outcomes[tier][outcome] += 1
                if outcome == "skipped":
                    reasons.setdefault(tier, report.longrepr[2].removeprefix("Skipped: "))
    lines = []
    for tier, counts in outcomes.items():
        if any(counts[outcome] for outcome in _RAN):
            lines.append(f"{tier}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n))
        else:
            why = reasons.get(tier) or ("its tests were not asked for" if _TIERS[tier] else "a GPU runs the kernels")
            lines.append(f"{tier}: not run, {why}")
    return lines


def _properties(terminalreporter: pytest.TerminalReporter, name: str) -> list:
    """What tests recorded under this name."""
    reports = [report for outcome in _RAN for report in terminalreporter.getreports(outcome)]
    properties = [p for report in reports if report.when == "call" for p in report.user_properties]
    return [value for own, value in properties if own == name]


def _resources(terminalreporter: pytest.TerminalReporter) -> list[str]:
    """What the kernels of the compiled tiers use."""
    lines = []
    triton_builds = _properties(terminalreporter, triton_tier.PROPERTY)
    if triton_builds:
        lines.append("triton-compiled: most registers / KiB of shared memory of each kernel")
        lines += triton_tier.lines(triton_builds)
    cuda_results = [_properties(terminalreporter, name) for name in (cuda_builds.BUILDS, cuda_builds.LAUNCHES)]
    if any(builds for *_, builds in cuda_results[0]):
        launched = "and, launched at the published shapes, KiB of shared memory / occupancy"
        lines.append(f"cuda-compiled: most registers of each kernel {launched}")
        lines += cuda_builds.lines(*cuda_results)
    return lines


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.section("tiers")
    for line in [*_native_tier(), *_tier_lines(terminalreporter), *_resources(terminalreporter)]:
        terminalreporter.write_line(line)
