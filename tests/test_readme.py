"""The README's Python runs as written."""

import re
from pathlib import Path

import pytest
import torch

import shvit_kernels

README = Path(__file__).parent.parent / "README.md"
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=range(len(SNIPPETS)))
def test_snippet(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if "import timm" in snippet:
        pytest.importorskip("shvit_kernels.bench.timm_import")
    if "shvit_s4.pth" in snippet:
        torch.save({"model": shvit_kernels.shvit_s4().state_dict()}, "shvit_s4.pth")
    exec(compile(snippet, "README.md", "exec"), {})


def test_there_are_snippets() -> None:
    assert len(SNIPPETS) >= 4
