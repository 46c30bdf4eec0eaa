"""What setup.py decides to build."""

import importlib.util
import os
from pathlib import Path
from types import ModuleType

import pytest
import setuptools
import torch

PATH = Path(__file__).resolve().parents[1] / "setup.py"


@pytest.fixture
def setup(monkeypatch) -> ModuleType:
    """The script, which has built nothing."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.chdir(PATH.parent)
    spec = importlib.util.spec_from_file_location("setup_script", PATH)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.mark.parametrize(
    "given, architectures, passed_on",
    [
        ("7.5 8.0 8.6 9.0 10.0 12.0+PTX", ["80", "86", "90", "100", "120"], "8.0;8.6;9.0;10.0;12.0+PTX"),
        ("9.0a;8.0", ["80", "90a"], "8.0;9.0a"),
        ("7.5+PTX;9.0", ["90"], "9.0"),
        ("Turing;Ampere", ["80", "86"], "8.0;8.6+PTX"),
        ("7.0;7.5+PTX", [], "7.0;7.5+PTX"),
    ],
)
def test_architectures_that_the_kernels_cannot_use_are_left_out(setup, monkeypatch, given, architectures, passed_on):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    assert setup.cuda_architectures() == architectures
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == passed_on
    assert setup.cuda_architectures() == architectures  # torch reads the list again


def test_without_a_usable_architecture_the_list_is_the_reason(setup, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5")
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(setup, "nvcc", lambda: "nvcc")
    assert setup.cuda_extension() == "they need sm_80 or newer and TORCH_CUDA_ARCH_LIST is 7.5"


@pytest.mark.parametrize(
    "listed, architectures",
    [
        ("sm_75 sm_80 sm_86 sm_90", ["80", "90a"]),
        ("sm_80 sm_90 sm_100 sm_103 sm_120", ["80", "90a", "100", "120"]),
        ("", ["80", "90a", "100", "120"]),
    ],
)
def test_without_a_gpu_it_builds_for_what_the_toolkit_knows(setup, monkeypatch, tmp_path, listed, architectures):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text(f"#!/bin/sh\nprintf '%s\\n' {listed}\n")
    nvcc.chmod(0o755)
    monkeypatch.setattr(setup, "nvcc", lambda: str(nvcc))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    assert setup.cuda_architectures() == architectures
