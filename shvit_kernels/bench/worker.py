"""A process that measures what it is told on its standard input, one request a line, and answers on a pipe.

    python -m shvit_kernels.bench.worker DEVICE DESCRIPTOR

Requests: ``{"what": "facts"}``, ``{"what": "entries"}`` (of ``plan``), ``{"what": "ceilings"}``,
``{"what": "case", "id": ..., "contenders": [...]}``.
Answers: ``{"begin": contender}`` before each contender is set up, then ``{"result": ...}`` or ``{"error": ...}``. After
an error that leaves the device unusable the process ends. What libraries print stays out of the answers.
"""

import json
import os
import sys
from functools import cache

import torch

from . import device as measuring
from .cases import Case
from .plan import entries


@cache
def _cases(device: str) -> dict[str, Case]:
    return {entry.case.id: entry.case for entry in entries(device)}


def main(device: str, descriptor: int) -> None:
    with os.fdopen(descriptor, "w", buffering=1) as answers:

        def answer(**what: object) -> None:
            answers.write(json.dumps(what) + "\n")

        for line in sys.stdin:
            request = json.loads(line)
            try:
                if request["what"] == "facts":
                    answer(result=measuring.facts(device))
                elif request["what"] == "entries":
                    plan = [
                        {"id": entry.case.id, "contenders": entry.contenders, "seconds": entry.seconds}
                        for entry in entries(device)
                    ]
                    answer(result=plan)
                elif request["what"] == "ceilings":
                    answer(result=measuring.ceilings())
                else:
                    case = _cases(device)[request["id"]]
                    figures = measuring.measure(
                        case, request["contenders"], device, lambda contender: answer(begin=contender)
                    )
                    answer(result=figures)
            except Exception as error:
                answer(error=measuring.sentence(error))
                if device == "cuda":
                    torch.cuda.synchronize()  # ends the process where the device is lost


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
