"""The runner behind ``make gpu``, as far as it runs without a GPU: plan, budget, crashes, results and tables."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu
from benchmarks.table import markdown
from shvit_kernels.bench import device as measuring
from shvit_kernels.bench.cases import AUTOTUNE, COMPILE, COPY, EAGER, EVALUATION, TRAINING, cases
from shvit_kernels.bench.plan import Entry, entries


def figures(microseconds: float, eager: float = 100.0, copy: float = 5.0) -> dict:
    def spread(value):
        return {"low": value, "median": value, "high": value}

    return {
        "microseconds": spread(microseconds),
        "wall_microseconds": spread(2 * microseconds),
        "times_eager": spread(eager / microseconds),
        "times_copy": spread(copy / microseconds),
    }


def record(id: str, contenders: dict) -> dict:
    facts = {"suite": "op", "name": "stage", "mode": "evaluation", "dtype": "float16", "shape": [256, 336, 8, 8]}
    return {"id": id, **facts, "seconds": 1.0, "contenders": contenders}


class Device:
    """Stands in for the clock and for the processes that measure: what each contender does to its process."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.started = 0
        self.asked = []
        self.entries = []
        self.behaviour = {}
        self.cost = 10.0
        monkeypatch.setattr(gpu, "Worker", self.worker)
        monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=lambda: self.now))

    def worker(self, device, log):
        self.started += 1
        alive = [True]
        worker = SimpleNamespace(contender=None, alive=lambda: bool(alive), end=alive.clear)

        def ask(limit, what, id=None, contenders=()):
            assert alive
            if what == "entries":
                return {"result": self.entries}
            if what != "case":
                return {"result": {}}
            self.asked.append((id, list(contenders)))
            for name in contenders:
                worker.contender = name
                if self.behaviour.get(name) == "hang":
                    self.now += limit
                    raise gpu.OutOfTime
                if self.behaviour.get(name) == "crash":
                    return {"error": "the process ended with status -11"}
            worker.contender = "all"
            self.now += self.cost
            if self.behaviour.get("all") == "crash":
                return {"error": "the process ended with status -6"}
            return {"result": record(id, {name: figures(10.0) for name in contenders})}

        worker.ask = ask
        return worker


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def start(tmp_path, budget=None, cases="", contenders=None) -> gpu.Run:
    return gpu.Run(tmp_path, budget, "cpu", cases, contenders)


def plan(count: int, *contenders: str) -> list[dict]:
    return [{"id": f"case {i}", "contenders": contenders or ("eager",), "seconds": 4.0} for i in range(count)]


def saved(tmp_path) -> dict:
    return json.loads((tmp_path / "results.json").read_text())


@pytest.fixture(scope="module")
def planned() -> list[Entry]:
    return list(entries("cuda"))


def test_plan_begins_with_what_decides_and_holds_everything(planned):
    first = [(e.case.suite, e.case.mode, e.case.shape[0], e.case.dtype) for e in planned[: gpu.DECISIVE]]
    expected = [("op", EVALUATION), ("op", TRAINING), ("mixer", EVALUATION)]
    assert first == [(*kind, 256, torch.float16) for kind in expected for _ in range(6)]
    assert len({e.case.id for e in planned[: gpu.DECISIVE]}) == gpu.DECISIVE
    layers = [e for e in planned if e.case.suite != "models"]
    assert sum(COMPILE in e.contenders and AUTOTUNE not in e.contenders for e in layers) == 12
    assert sum(AUTOTUNE in e.contenders for e in layers) == 3
    assert all({EAGER, "triton", "cuda"} <= set(e.contenders) for e in planned)
    assert all(COPY in e.contenders for e in layers)
    seen = {
        (e.case.suite, e.case.mode, e.case.shape[0], e.case.dtype, e.case.shape[2] * e.case.shape[3]) for e in layers
    }
    for suite, modes in {"op": 2, "layer": 2, "shsa": 1, "mixer": 1}.items():
        for tokens, batches in ((49, 3), (16, 3), (64, 3), (1050, 2), (4096, 2)):
            assert len({s for s in seen if s[0] == suite and s[4] == tokens}) == modes * batches * 2
    models = {(e.case.name, e.case.shape[0], e.case.dtype) for e in planned if e.case.suite == "models"}
    assert len(models) == 4 * 2 * 2


def test_cases_of_one_name_are_one_case(planned):
    """A worker finds a case by its name."""
    by_id = {}
    for entry in planned:
        key = entry.case.shape, entry.case.dtype, entry.case.mode, entry.case.suite
        assert by_id.setdefault(entry.case.id, key) == key


def test_rotation_passes_the_cache(planned):
    for entry in planned:
        buffers, cold = measuring.rotation(entry.case)
        x = torch.empty(entry.case.shape, dtype=entry.case.dtype, device="meta").nbytes
        assert cold or buffers * x * (4 if entry.case.mode == TRAINING else 2) >= 200e6
        assert 2 <= buffers <= 256


def test_graph_holds_a_call_per_buffer_and_more(monkeypatch):
    """With PyTorch's graphs replaced: what is captured, and that time is divided by the number of calls."""
    log = []
    event = SimpleNamespace(
        record=lambda: log.append("event"), synchronize=lambda: None, elapsed_time=lambda end: 1000.0
    )

    class Capture:
        def __init__(self, graph):
            pass

        def __enter__(self):
            log.append("begin")

        def __exit__(self, *_):
            log.append("end")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: log.append("replay")))
    monkeypatch.setattr(torch.cuda, "graph", Capture)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: log.append("sleep"))
    inputs = [(torch.tensor(float(i)), torch.tensor(0.0)) for i in range(50)]

    def step(x, dy):
        log.append(x.item())
        return x

    sampler = measuring._graph_sampler(step, inputs, 1e-6, lambda: log.append("empty"))
    captured = log[log.index("begin") + 1 : log.index("end")]
    assert captured == [float(i) for i in range(50)] * 3  # 128 calls, in whole rounds of the buffers
    log.clear()
    assert sampler() == pytest.approx(1.0 / 150)
    assert log == ["empty", "sleep", "event", "replay", "event"]
    slow = measuring._graph_sampler(step, inputs, 1.0, None)
    log.clear()
    assert slow() == pytest.approx(1.0 / 50)


def test_a_case_keeps_errors_and_reasons(monkeypatch):
    (case,) = [c for c in cases(["op"], ["shvit_s1"], [1]) if c.mode == EVALUATION and "stage 3" in c.name]
    monkeypatch.setitem(measuring.CONTENDERS, "broken", measuring.CONTENDERS[EAGER].__class__(lambda m, mode: 1 / 0))
    begun = []
    result = measuring.measure(case, [COPY, EAGER, "broken", "cuda"], "cpu", begun.append)
    assert begun == [COPY, EAGER, "broken", "cuda", "all"]
    contenders = result["contenders"]
    assert contenders["broken"] == {"error": "ZeroDivisionError: division by zero"}
    assert "skipped" in contenders["cuda"]
    assert contenders[EAGER]["times_copy"]["median"] < 1 < contenders[COPY]["times_eager"]["median"]
    assert contenders[EAGER]["difference_from_eager"] == 0
    json.dumps(result)


def test_dry_run(tmp_path):
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--budget", "100", "--out", str(tmp_path)]
    options = ["--only", "decisive,sanitizer,bench", "--cases", "stage 3.*evaluation", "--contenders", "eager,copy"]
    run = subprocess.run([*command, *options], cwd=gpu.ROOT, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    results = saved(tmp_path)
    assert results["facts"]["versions"]["torch"] == torch.__version__
    assert results["facts"]["backends"]["cuda"]
    (case,) = results["cases"].values()
    assert list(case["contenders"]) == ["copy", "eager"]
    assert all(f["microseconds"]["median"] > 0 for f in case["contenders"].values())
    assert results["parts"]["sanitizer"]["summary"].startswith("skipped: ")
    assert "op, evaluation, float32" in (tmp_path / "table.md").read_text()
    assert "op, evaluation, float32" in run.stdout


def test_budget_is_kept_and_what_it_cuts_is_named(device, tmp_path):
    device.entries = plan(30)
    device.cost = 11.0
    start(tmp_path, budget=100).run(["bench"])
    results = saved(tmp_path)
    assert device.now <= 100
    assert len(results["cases"]) == 9
    assert list(results["skipped"]) == [f"case {i}" for i in range(9, 30)]
    assert "case 9 and 20 more: the budget was used up" in (tmp_path / "table.md").read_text()


def test_parts_after_the_budget_are_skipped(device, tmp_path):
    run = start(tmp_path, budget=100)
    device.now = 98.0
    run.run(["tests", "sanitizer"])
    assert {part["summary"] for part in saved(tmp_path)["parts"].values()} == {"skipped: the budget was used up"}


def test_results_are_written_after_every_case(device, tmp_path, monkeypatch):
    device.entries = plan(3)
    counts = []
    monkeypatch.setattr(gpu.Run, "say", lambda self, text: None)
    save = gpu.Run.save
    monkeypatch.setattr(gpu.Run, "save", lambda self: (save(self), counts.append(len(saved(tmp_path)["cases"]))))
    start(tmp_path).run(["bench"])
    assert counts[:3] == [1, 2, 3]


@pytest.mark.parametrize("behaviour", ["crash", "hang"])
def test_a_crash_or_a_hang_costs_one_contender_of_one_case(device, tmp_path, behaviour):
    device.entries = plan(5, "eager", "triton", "cuda")
    device.behaviour["triton"] = behaviour
    start(tmp_path).run(["bench"])
    measured = saved(tmp_path)["cases"]
    assert all("microseconds" in case["contenders"][name] for case in measured.values() for name in ("eager", "cuda"))
    outcomes = [case["contenders"]["triton"] for case in measured.values()]
    assert ["error" in outcome for outcome in outcomes] == [True] * 3 + [False] * 2
    assert outcomes[-1] == {"skipped": "it ended 3 processes before"}
    assert device.started == 4


def test_a_crash_that_nobody_caused_costs_one_case(device, tmp_path):
    device.entries = plan(2)
    device.behaviour["all"] = "crash"
    start(tmp_path).run(["bench"])
    assert [case["error"] for case in saved(tmp_path)["cases"].values()] == ["the process ended with status -6"] * 2
    assert "the process ended with status -6" in (tmp_path / "table.md").read_text()


def test_cases_and_contenders_are_selected(device, tmp_path):
    device.entries = plan(30, "eager", "triton", "cuda")
    start(tmp_path, cases="2.$", contenders=["cuda", "copy"]).run(["bench"])
    assert device.asked == [(f"case {i}", ["cuda"]) for i in range(20, 30)]


def test_the_decisive_cases_are_measured_once(device, tmp_path):
    device.entries = plan(gpu.DECISIVE + 2)
    start(tmp_path).run(["decisive", "bench"])
    assert [id for id, _ in device.asked] == [f"case {i}" for i in range(gpu.DECISIVE + 2)]
    device.asked.clear()
    start(tmp_path).run(["bench"])
    assert len(device.asked) == gpu.DECISIVE + 2


def test_a_part_that_fails_costs_itself(device, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu.Run, "tests", lambda self: 1 / 0)
    device.entries = plan(1)
    start(tmp_path).run(["tests", "bench"])
    parts = saved(tmp_path)["parts"]
    assert parts["tests"]["summary"] == "failed: ZeroDivisionError: division by zero"
    assert parts["bench"]["summary"] == "1 measured"


def test_a_process_is_ended_at_its_limit(tmp_path):
    run = start(tmp_path)
    status, text = run.command([sys.executable, "-uc", "print('begun'); import time; time.sleep(60)"], 3)
    assert status is None and text == "begun\n"
    assert run.command([sys.executable, "-c", "exit(3)"], 30) == (3, "")


def test_a_worker_that_ends_is_an_error(tmp_path):
    with (tmp_path / "log").open("w") as log:
        worker = gpu.Worker("cpu", log)
        try:
            assert worker.ask(100, what="facts")["result"]["device"] == "none"
            assert worker.ask(100, what="case", id="no such case", contenders=[])["error"].startswith("KeyError")
            worker.process.kill()
            assert "ended" in worker.ask(100, what="facts")["error"]
        finally:
            worker.end()


def test_every_outcome_of_a_test_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # of the process that this test runs in
    file = tmp_path / "test_some.py"
    file.write_text(
        "import pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "@pytest.mark.skip(reason='no wish')\n"
        "def test_skipped(): pass\n"
        "@pytest.fixture\n"
        "def broken():\n"
        "    yield\n"
        "    raise ValueError('broken')\n"
        "def test_teardown(broken): pass\n"
    )
    run = start(tmp_path / "out")
    summary = run._pytest("tests", [str(file), "--rootdir", str(tmp_path), "-c", "/dev/null"])
    assert summary.startswith("2 failed, 1 passed, 1 skipped; ended with status 1")
    outcomes = {name.partition("::")[2]: outcome for name, outcome in run.results["tests"].items()}
    assert "assert 1 == 2" in outcomes["test_bad"]["message"]
    assert "no wish" in outcomes["test_skipped"]["message"]
    assert "broken" in outcomes["test_teardown"]["message"]
    assert "test_some.py::test_bad: " in markdown(run.results)


def test_table_gives_time_and_ratios(device, tmp_path):
    run = start(tmp_path)
    contenders = {
        "copy": figures(5),
        "eager": figures(100),
        "cuda": figures(8),
        "triton": {"error": "ValueError: no"},
        "torch.compile": {"skipped": "no wish"},
    }
    run.results["cases"] = {"a": record("a", contenders), "b": record("b", {"eager": figures(7)})}
    text = markdown(run.results)
    row = next(line for line in text.splitlines() if line.startswith("| stage"))
    assert re.split(r" *\| *", row)[1:8] == [
        "stage",
        "256",
        "5",
        "100",
        "8 (12.50x eager, 1.60 copies)",
        "error",
        "-",
    ]
    assert "- triton at a: ValueError: no" in text
    assert "- torch.compile at a: no wish" in text
