"""Builds, tests and measures on a machine with a GPU: ``make gpu``, ``make gpu-full``.

    python -m benchmarks.gpu [--budget SECONDS] [--out DIRECTORY] [--only PART,...] [--cases REGEX] [--contenders ...]

Uses the interpreter and the packages that are there. Every part, and every process that measures, has a time limit, so
that a hang or a crash costs that part or that case alone. ``results.json`` is written after every step, ``table.md``
after every case, and ``log.txt`` keeps what the processes print.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from . import outcomes
from .table import markdown

ROOT = Path(__file__).parent.parent
PARTS = ("build", "quick", "decisive", "tests", "sanitizer", "bench")
"""In order. ``quick`` are the tests marked ``gpu``, ``decisive`` the first cases of the plan, ``bench`` all others."""
LIMITS = {"build": 300.0, "quick": 120.0, "tests": 150.0, "sanitizer": 90.0}
"""Seconds that a part may take, besides the budget of the whole."""
WITHOUT_BUDGET = 20.0
"""Limits are this many times longer where there is no budget."""
CASE_LIMIT = 15.0
"""A case is given up after this many times its expected seconds, plus START seconds where the process is new."""
START = 60.0
DECISIVE = 18
MOST_CRASHES = 3
"""A contender that ended so many processes takes no further part."""
TOOLS = ("memcheck", "racecheck")


class OutOfTime(Exception):
    pass


class Worker:
    """A process of ``shvit_kernels.bench.worker``, and its answers."""

    def __init__(self, device: str, log: Any):
        read, write = os.pipe()
        command = [sys.executable, "-m", "shvit_kernels.bench.worker", device, str(write)]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=(write,), start_new_session=True
        )
        os.close(write)
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, args=(read,), daemon=True).start()
        self.contender: str | None = None
        """The one being set up, None where no contender is to blame."""

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor) as file:
            for line in file:
                self.answers.put(line)
        self.answers.put(None)

    def ask(self, limit: float, **request: Any) -> dict[str, Any]:
        """The answer: ``result`` or ``error``. ``OutOfTime`` after ``limit`` seconds."""
        self.contender = None
        end = time.monotonic() + limit
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"error": "the process had ended"}
        while True:
            try:
                line = self.answers.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise OutOfTime from None
            if line is None:
                return {"error": f"the process ended with status {self.process.wait()}"}
            answer = json.loads(line)
            if "begin" not in answer:
                return answer
            self.contender = answer["begin"]

    def alive(self) -> bool:
        return self.process.poll() is None

    def end(self) -> None:
        end_group(self.process)


def end_group(process: subprocess.Popen) -> None:
    """End a process that leads its own group, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class Run:
    """The state of a run: what was found so far, and how much time is left."""

    def __init__(self, out: Path, budget: float | None, device: str, cases: str, contenders: list[str] | None):
        self.out = out
        self.device = device
        self.cases = re.compile(cases)
        self.contenders = contenders
        self.started = time.monotonic()
        self.budget = budget
        self.crashes: Counter[str] = Counter()
        self.worker: Worker | None = None
        self.results: dict[str, Any] = {
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "budget": budget,
            "facts": {},
            "parts": {},
            "tests": {},
            "sanitizer": {},
            "ceilings": {},
            "cases": {},
            "skipped": {},
        }
        out.mkdir(parents=True, exist_ok=True)
        self.log = open(out / "log.txt", "w")  # noqa: SIM115  open as long as the run lasts

    def left(self) -> float:
        """Seconds."""
        return float("inf") if self.budget is None else self.budget - (time.monotonic() - self.started)

    def limit(self, part: str) -> float:
        return min(LIMITS[part] * (WITHOUT_BUDGET if self.budget is None else 1), self.left())

    def save(self) -> None:
        self.results["seconds"] = time.monotonic() - self.started
        for name, text in (
            ("results.json", json.dumps(self.results, indent=1) + "\n"),
            ("table.md", markdown(self.results)),
        ):
            temporary = self.out / (name + ".new")
            temporary.write_text(text)
            temporary.replace(self.out / name)

    def say(self, text: str) -> None:
        line = f"[{time.monotonic() - self.started:5.0f} s] {text}"
        print(line, flush=True)
        print(line, file=self.log, flush=True)

    def command(self, command: list[str], limit: float, **environment: str) -> tuple[int | None, str]:
        """Exit status, None where the limit was reached, and the output, which also goes to the log."""
        self.say(" ".join(command))
        with tempfile.TemporaryFile("w+", errors="replace") as output:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=os.environ | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(timeout=max(limit, 0))
            except subprocess.TimeoutExpired:
                status = None
            finally:
                end_group(process)
            output.seek(0)
            text = output.read()
        print(text, file=self.log, flush=True)
        return status, text

    # Each part returns a line on how it went.

    def build(self) -> str:
        """The native library, in place; whatever cannot be built is missing afterwards and says why itself."""
        if not any(map(shutil.which, ("c++", "g++", "clang++"))):
            return "skipped: no C++ compiler"
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, text = self.command(command, self.limit("build"))
        left_out = re.findall(r"installing without .*", text)
        return "; ".join([_ended(status, text), *left_out])

    def quick(self) -> str:
        return self._pytest("quick", ["-m", "gpu", "tests/test_gpu.py"])

    def tests(self) -> str:
        """Without a budget all tests, otherwise those that run kernels on the device."""
        files = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "tests").glob("test_*.py"))]
        if self.budget is not None:
            kernels = re.compile(r"test_(triton|cuda)_(?!compiled|host|memory)")
            files = [name for name in files if kernels.search(name)]
        return self._pytest("tests", files) if files else "skipped: no such tests"

    def _pytest(self, part: str, arguments: list[str]) -> str:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "benchmarks.outcomes"]
        if importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count() or 1))]
        before = len(self.results["tests"])
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "outcomes"
            file.touch()
            environment = {outcomes.VARIABLE: str(file), "OMP_NUM_THREADS": "1"}
            status, text = self.command([*command, *arguments], self.limit(part), **environment)
            for line in file.read_text().splitlines():
                outcome = json.loads(line)
                # A test's failing teardown must not be hidden by its call, nor the other way round.
                known = self.results["tests"].setdefault(outcome.pop("test"), outcome)
                if outcome["outcome"] == "failed":
                    known.update(outcome)
        count = Counter(outcome["outcome"] for outcome in list(self.results["tests"].values())[before:])
        counted = ", ".join(f"{n} {what}" for what, n in sorted(count.items())) or "no outcome"
        return f"{counted}; {_ended(status, text)}"

    def sanitizer(self) -> str:
        if shutil.which("compute-sanitizer") is None:
            return "skipped: compute-sanitizer was not found"
        if self.device != "cuda":
            return "skipped: no CUDA device"
        end = time.monotonic() + self.limit("sanitizer")
        for tool in TOOLS:
            command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, "-m"]
            # Cached memory would hide accesses beyond a tensor.
            status, text = self.command(
                [*command, "benchmarks.every_operator", "cuda"],
                end - time.monotonic(),
                PYTORCH_NO_CUDA_MEMORY_CACHING="1",
            )
            summaries = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
            self.results["sanitizer"][tool] = {"status": status, "summary": summaries, "output": text[-4000:]}
        return "; ".join(
            f"{tool}: {' '.join(found['summary']) or 'no summary'} ({_ended(found['status'], found['output'])})"
            for tool, found in self.results["sanitizer"].items()
        )

    def _plan(self) -> list[dict[str, Any]]:
        answer = self._ask(60, what="entries")
        if "error" in answer:
            raise RuntimeError(f"the cases cannot be listed: {answer['error']}")
        return answer["result"]

    def decisive(self) -> str:
        if self.device == "cuda":
            self.results["ceilings"] = self._ask(20, what="ceilings").get("result", {})
        return self._measure(self._plan()[:DECISIVE])

    def bench(self) -> str:
        begin = DECISIVE if "decisive" in self.results["parts"] else 0
        return self._measure(self._plan()[begin:])

    def _ask(self, limit: float, **request: Any) -> dict[str, Any]:
        """Ask the worker, a new one if need be; one that gave an error or no answer is ended."""
        if self.worker is None or not self.worker.alive():
            self.worker = Worker(self.device, self.log)
            limit += START
        try:
            answer = self.worker.ask(min(limit, self.left()), **request)
        except OutOfTime:
            answer = {"error": f"no answer within {min(limit, self.left()):.0f} seconds"}
        if "error" in answer:
            answer["contender"] = self.worker.contender
            self.worker.end()
            self.worker = None
        return answer

    def _measure(self, entries: list[dict[str, Any]]) -> str:
        counts: Counter[str] = Counter()
        for entry in entries:
            if not self.cases.search(entry["id"]):
                continue
            names = [name for name in entry["contenders"] if self.contenders is None or name in self.contenders]
            if self.left() < entry["seconds"] + 5:
                self.results["skipped"].setdefault(entry["id"], "the budget was used up")
                counts["skipped"] += 1
                continue
            record = self._case(entry, names)
            self.results["cases"][entry["id"]] = record
            self.results["skipped"].pop(entry["id"], None)
            counts["failed" if "error" in record else "measured"] += 1
            self.say(_line(record))
            self.save()
        return ", ".join(f"{n} {what}" for what, n in sorted(counts.items())) or "no case"

    def _case(self, entry: dict[str, Any], names: list[str]) -> dict[str, Any]:
        """One case. Whoever ends the process, or hangs, is left out and the others are asked again."""
        lost: dict[str, dict[str, str]] = {}
        for name in [name for name in names if self.crashes[name] >= MOST_CRASHES]:
            lost[name] = {"skipped": f"it ended {MOST_CRASHES} processes before"}
        while True:
            able = [name for name in names if name not in lost]
            answer = self._ask(CASE_LIMIT * entry["seconds"], what="case", id=entry["id"], contenders=able)
            if "result" in answer:
                record = answer["result"]
                record["contenders"] |= lost
                return record
            guilty = answer["contender"]
            if guilty not in able:
                return {"id": entry["id"], "error": answer["error"], "contenders": lost}
            lost[guilty] = {"error": answer["error"]}
            self.crashes[guilty] += 1

    def run(self, parts: list[str]) -> None:
        for part in PARTS:
            if part not in parts:
                continue
            begun = time.monotonic()
            if self.left() < 5:
                summary = "skipped: the budget was used up"
            else:
                try:
                    summary = getattr(self, part)()
                except Exception as error:  # costs this part alone
                    traceback.print_exc(file=self.log)
                    summary = f"failed: {type(error).__name__}: {error}"
            self.results["parts"][part] = {"summary": summary, "seconds": time.monotonic() - begun}
            self.say(f"{part}: {summary}")
            if part == "build" or not self.results["facts"]:
                self.results["facts"] = self._ask(60, what="facts").get("result", {})
            self.save()
        if self.worker is not None:
            self.worker.end()


def _ended(status: int | None, text: str) -> str:
    if status is None:
        return "stopped at its time limit"
    if status == 0:
        return "ended well"
    last = [line for line in text.strip().splitlines() if line.strip()][-1:] or [""]
    return f"ended with status {status}: {last[0][:200]}"


def _line(record: dict[str, Any]) -> str:
    """A case for the terminal."""
    if "error" in record:
        return f"{record['id']}: {record['error']}"
    words = []
    for name, figures in record["contenders"].items():
        if "microseconds" in figures:
            words.append(f"{name} {figures['microseconds']['median']:.2f}")
        else:
            words.append(f"{name} {'failed' if 'error' in figures else 'skipped'}")
    return f"{record['id']}: {', '.join(words)} ({record['seconds']:.1f} s)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget", type=float, help="seconds for everything; by default no limit")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="directory for the results")
    parser.add_argument("--only", default=",".join(PARTS), help=f"parts, of {','.join(PARTS)}")
    parser.add_argument("--cases", default="", help="regular expression: measure the cases whose name it matches")
    parser.add_argument("--contenders", help="measure these only, separated by commas")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of a few cases")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if not set(parts) <= set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}, got {arguments.only}")
    contenders = arguments.contenders.split(",") if arguments.contenders else None
    run = Run(arguments.out, arguments.budget, arguments.device, arguments.cases, contenders)
    run.run(parts)
    print((arguments.out / "table.md").read_text())


if __name__ == "__main__":
    main()
