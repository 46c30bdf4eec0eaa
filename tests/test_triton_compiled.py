"""Every Triton kernel and every entry of the table built for devices that need not be here, with what it uses."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from shvit_kernels.backends import triton
from tests.support import triton_tier

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package triton is not installed"
)

LIMIT = 900
"""Seconds for one device."""
LAUNCH = re.compile(r"\b(\w+)\[[^\]]*\]\(\n")


def launched() -> set[str]:
    """The names of all kernels that the backend's source launches."""
    source = Path(triton.__file__).parent
    return {name for file in source.glob("*.py") for name in LAUNCH.findall(file.read_text())}


def reported(what: str, file: Path) -> list:
    """What ``triton_builds`` says of a target, or of "anew"."""
    command = [sys.executable, "-m", "tests.support.triton_builds", what, str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    subprocess.run(command, env=environment, check=True, timeout=LIMIT, cwd=Path(__file__).parent.parent)
    return json.loads(file.read_text())


def test_sizes_of_one_kind_share_their_builds(tmp_path):
    """Training at several sizes of images and batches would otherwise wait for the compiler again and again."""
    assert reported("anew", tmp_path / "anew.json") == []


@pytest.mark.parametrize("target", triton_tier.SHARED_KIB)
def test_builds(target, tmp_path, record_property):
    builds = reported(target, tmp_path / "builds.json")
    record_property(triton_tier.PROPERTY, [target, builds])
    wrong = []
    for build in builds:
        name = f"{build['kernel']} of {build['operator']} at {build['case']}"
        if build["error"]:
            wrong.append(f"{name} does not compile: {build['error'][-400:]}")
            continue
        if build["spilled"]:
            wrong.append(f"{name} spills: {build['spilled']} bytes of local memory")
        if build["shared"] > triton_tier.SHARED_KIB[target] * 1024:
            wrong.append(f"{name} takes {build['shared'] / 1024:.0f} KiB of shared memory")
        if build["dropping"]:
            wrong.append(f"{name} has {build['dropping']} maxima that drop NaN")
    rectifying = {"shsa_forward", "shsa_eval", "shsa_mixer", "shsa_train_forward"}
    attending = [b for b in builds if b["operator"] in rectifying and b["keeping"]]
    assert attending, "row maxima and ReLU were looked for in vain"
    missing = launched() - {build["kernel"] for build in builds}
    assert launched() and not missing, f"never built: {missing}"
    assert not wrong, f"{len(wrong)} of {len(builds)} builds are wrong:\n" + "\n".join(wrong)
