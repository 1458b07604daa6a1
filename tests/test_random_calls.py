"""What makes random calls of the Hopper kernels, without a GPU: the draw, the kernels built ahead, the processes."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from types import ModuleType
from typing import Any

import pytest

from flash_sink_attn.hopper import support
from tests import hopper_backward_cases, hopper_cases, hopper_tiny, random_calls
from tests.hopper_worker import ROOT, Worker

PROBLEM = support.gluon_problem()
buildable = pytest.mark.skipif(PROBLEM is not None, reason=f"the Hopper kernels cannot be built: {PROBLEM}")
MODULES = (hopper_cases, hopper_backward_cases)


@pytest.mark.parametrize("module", MODULES)
def test_a_seed_is_a_call(module: ModuleType) -> None:
    drawn = [module.draw(seed) for seed in range(400)]
    assert drawn == [module.draw(seed) for seed in range(400)] and len({repr(c) for c in drawn}) == 400
    assert {c.rejected() for c in drawn} == {None}
    assert max(map(hopper_cases.scores, drawn)) <= hopper_cases.MOST_SCORES
    lengths = [pair for c in drawn for pair in (
        zip(c.seqlens, c.seqlens_k, strict=True) if c.seqlens else ((c.seqlen_q, c.seqlen_k),))]
    assert {(n > m) - (n < m) for n, m in lengths} == {-1, 0, 1}
    assert {c.poison for c in drawn} == {c.seqlens_k != c.seqlens for c in drawn} == {True, False}


def test_backward_calls_are_of_every_form() -> None:
    few = [hopper_backward_cases.draw(seed) for seed in range(7)]
    assert {c.config["FORM"] for c in few} == {0, 1, 2} and {c.head_dim for c in few} == {64, 96, 128, 192, 256}
    drawn = [hopper_backward_cases.draw(seed) for seed in range(2 * len(hopper_backward_cases.KINDS))]
    have = {(c.config["FORM"], c.config["BLOCK_M"], c.config["SPLIT_GROUP"], c.config["DETERMINISTIC"]) for c in drawn}
    assert have >= {(0, 64, 1, False), (0, 64, 2, False), (0, 64, 1, True), (0, 64, 2, True), (1, 64, 1, False),
                    (1, 64, 2, False), (1, 128, 1, False), (1, 128, 2, False), (2, 64, 1, False)}
    assert {(c.head_dim, c.dtype) for c in drawn} >= {(d, t) for d in (64, 96, 128, 192, 256)
                                                      for t in ("float16", "bfloat16")}
    assert {(c.config["FORM"], bool(c.seqlens), c.window is None) for c in drawn} >= {
        *itertools.product((0, 1), (True, False), (True, False)), (2, True, False), (2, False, False)}
    many = [hopper_backward_cases.draw(seed) for seed in range(400)]
    assert {c.group for c in many} >= {1, 2, 3, 4, 5, 7, 8} and {c.sinks for c in many} == set(hopper_cases.SINKS)
    assert sum("q" in c.wanted and "k" in c.wanted for c in many) > 250
    slides = [c for c in many if c.config["FORM"] == 2]
    assert any(c.window == 128 for c in slides) and any(c.seqlen_q != c.seqlen_k for c in slides)
    assert any(c.window is not None and c.window > 129 for c in slides)


@buildable
@pytest.mark.parametrize(("module", "most"), [(hopper_cases, 30), (hopper_backward_cases, 90)])
def test_many_calls_share_few_kernels(module: ModuleType, most: int) -> None:
    """Each once, and those that take long first."""
    tasks = random_calls.kernels(module.__name__, map(module.draw, range(300)))
    names = [task["name"] for task in tasks]
    quick = [name.startswith(random_calls.QUICK) for name in names]
    assert len(set(names)) == len(names) <= most and quick == sorted(quick)
    assert quick.count(False) <= 60


# The hashes by which Triton's cache knows the kernels of calls, which are computed and nothing is compiled: of tasks as
# the processes that compile get them, or of calls by the public functions as on a card, here of tensors on the CPU.
CODE = """
import json, sys
import triton
from types import SimpleNamespace
from triton.compiler.compiler import get_cache_key, make_backend
from triton._C.libtriton import get_cache_invalidating_env_vars
from flash_sink_attn import _checks, compile_only, launcher
from flash_sink_attn.hopper import support
from tests import hopper_backward_cases, hopper_cases, hopper_tiny, random_calls

found = set()

def compile(src, target, options, **_):
    backend = make_backend(target)
    options = backend.parse_options({**options, **src.parse_options()})
    found.add(src.name + " " + get_cache_key(src, backend, options, get_cache_invalidating_env_vars()))
    return SimpleNamespace(src=src, metadata=None)

def launch(kernel, programs, device, runtime, constants, *, num_warps, num_stages=None, maxnreg=None, check=None,
           dependent=False):
    launcher.settle_key(kernel)
    options = launcher._options(num_warps, num_stages, maxnreg, dependent)
    return launcher._launch_new(kernel, programs, runtime, constants, options, None, None, warm_up_only=True)

triton.compiler.compile = compile
triton.runtime.driver.set_active(compile_only._AbsentGpu(90))
compile_only._build_launcher = lambda compiled: None
_checks.COMPILE_ONLY = True
support.device_problem = lambda device: None
for line in sys.stdin:
    what = json.loads(line)
    if "launch" in what:
        assert random_calls.build_kernel(what) == []
    else:
        of = {"hopper_cases": hopper_cases, "hopper_backward_cases": hopper_backward_cases}[what["module"]]
        case = of.Case(**what["case"])
        with hopper_cases.launching(launch):
            of.call(case, case.inputs("cpu"))
print(json.dumps(sorted(found)))
"""


@buildable
@pytest.mark.parametrize("module", MODULES)
def test_calls_find_what_was_built_ahead(module: ModuleType) -> None:
    """The kernels of calls are those that were built, by the hash under which they lie on the disk."""
    cases = [module.draw(seed) for seed in range(30)]
    tasks = random_calls.kernels(module.__name__, cases)
    calls = [{"module": module.__name__.rsplit(".")[-1], "case": case.to_dict()} for case in reversed(cases)]
    as_called = {k: v for k, v in os.environ.items() if k != "FLASH_SINK_ATTN_COMPILE_ONLY"} | {
        "TRITON_INTERPRET": "0"}  # what nobody has to say where there is a GPU
    hashes = []
    for env, lines in ((random_calls.without_gpu(), tasks), (as_called, calls)):
        done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], env=env | {"PYTHONPATH": str(ROOT)},
                              input="\n".join(map(json.dumps, lines)), capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-2000:]
        hashes.append(json.loads(done.stdout.splitlines()[-1]))
    assert hashes[0] == hashes[1] and len(hashes[0]) == len(tasks)


# ---------------------------------------------------------------------------------------------------------- processes

# Makes nothing: seed 1 hangs, 2 crashes, 3 says that nothing can follow, 4 is wrong.
ANSWERS = (sys.executable, "-c", """
import json, os, sys, time
print("up", flush=True)
for line in sys.stdin:
    what = json.loads(line)["seed"]
    what == 1 and time.sleep(60)
    what == 2 and os._exit(7)
    print(json.dumps([["wrong"] if what in (3, 4) else [], what == 3, what == 5]), flush=True)
""")


class FakeCase:
    def __init__(self, seed: int) -> None:
        self.seed = seed

    def to_dict(self) -> dict[str, Any]:
        return {"seed": self.seed}


def test_calls_go_on_after_one_that_hangs(capsys: pytest.CaptureFixture[str]) -> None:
    cases = {seed: FakeCase(seed) for seed in range(30)}
    workers = [Worker(ANSWERS) for _ in range(3)]
    right, line = random_calls.make_calls(cases, workers, 1.5, time.monotonic() + 60)
    said = capsys.readouterr().out
    assert not right and line.startswith("30 of 30 calls in ")
    assert "1 kernels were not in the cache: 4 wrong, 1 of them hangs; seeds 1 2 3 4" in line
    assert "seed 1: no answer after 2 s: it hangs" in said and "seed 2: the process ended with status 7" in said
    assert not any(worker.running for worker in workers)


def test_calls_end_after_many_hangs_and_when_time_is_over() -> None:
    right, line = random_calls.make_calls({seed: FakeCase(1) for seed in range(9)}, [Worker(ANSWERS)], 0.3,
                                          time.monotonic() + 60)
    assert not right and line.startswith("3 of 9 calls") and "3 of them hangs" in line
    right, line = random_calls.make_calls({0: FakeCase(0)}, [Worker(ANSWERS)], 1, time.monotonic() - 1)
    assert not right and line.startswith("0 of 1 calls")


def test_right_calls_are_right() -> None:
    right, line = random_calls.make_calls({0: FakeCase(0), 6: FakeCase(6)}, [Worker(ANSWERS)], 30,
                                          time.monotonic() + 60)
    assert right and "0 wrong, 0 of them hangs" in line and "seeds" not in line


def test_a_process_that_does_not_come_up_is_no_hang() -> None:
    worker = Worker((sys.executable, "-c", "import time; time.sleep(60)"), start_s=0.3)
    assert worker.ask({}, 5) == ["the process did not come up in 0 s"] and not worker.running
    worker = Worker((sys.executable, "-c", "raise SystemExit(4)"))
    assert worker.ask({}, 5) == ["the process ended with status 4"]


@buildable
def test_kernels_are_built_by_processes_without_a_gpu(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Again they are found; one that cannot be built is named."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tasks = random_calls.kernels("tests.hopper_backward_cases", [hopper_backward_cases.draw(3)])
    quick = [task for task in tasks if task["name"].startswith(random_calls.QUICK)]
    assert len(quick) == 2
    broken, line = random_calls.compile_kernels(quick, 2, time.monotonic() + 300)
    assert broken == [] and line.startswith("2 of 2 kernels in the cache") and " 2 of them compiled now" in line
    quick[0]["case"]["config"]["num_stages"] = "none"
    broken, line = random_calls.compile_kernels(quick, 1, time.monotonic() + 300)
    assert len(broken) <= 1 and " 0 of them compiled now" in line


def test_tiny_calls_are_tiny_and_of_every_family(capsys: pytest.CaptureFixture[str]) -> None:
    cases = hopper_tiny.tiny()
    assert set(cases) == {f"forward-{name}" for name in hopper_cases.FAMILIES} | {
        f"backward-{name}" for name in hopper_backward_cases.FAMILIES}
    for name, of in cases.items():
        assert [c.rejected() for c in of] == [None] * 3 and max(map(hopper_cases.scores, of)) <= 210_000, name
    assert hopper_tiny.main(["--list", "--only", "backward-64-sl*", "forward-96"]) == 0
    assert capsys.readouterr().out.split() == ["forward-96", "backward-64-slide", "backward-64-slide-short"]
