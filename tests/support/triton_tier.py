"""The account of the Triton kernels that were built for devices that need not be here."""

from collections import defaultdict
from collections.abc import Iterable

import torch

PROPERTY = "triton_builds"
SHARED_KIB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
"""KiB of shared memory that a block can have on each device that is built for."""
MIXED = ((torch.float32, torch.float16), (torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16))
"""Types of x and of the parameters, where autocast has them differ."""


def lines(results: Iterable[tuple[str, list[dict]]]) -> list[str]:
    """A line for each kernel: the most registers and shared memory among its builds, for each device."""
    most: dict[str, dict[str, str]] = defaultdict(dict)
    for target, builds in results:
        for kernel in dict.fromkeys(build["kernel"] for build in builds):
            own = [build for build in builds if build["kernel"] == kernel]
            registers, shared, spilled = (max(b[key] for b in own) for key in ("registers", "shared", "spilled"))
            text = f"{registers} / {shared / 1024:.1f}" + f" / spills {spilled}" * (spilled > 0)
            most[kernel][target] = "failed" if any(build["error"] for build in own) else text
    width = max(map(len, most), default=0)
    return [
        f"{kernel:{width}} " + ", ".join(f"{target} {text}" for target, text in sorted(of_target.items()))
        for kernel, of_target in most.items()
    ]
