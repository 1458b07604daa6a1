"""Faults, simulated everywhere and in earnest on CUDA: each costs its own trial, and nothing else."""

from __future__ import annotations

import select
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sweeps import runner
from sweeps.compile_pool import CompilePool, CompileTask
from sweeps.finals import Final
from sweeps.jobs import launch_problem
from sweeps.plan import Trial
from sweeps.spec import SweepSpec
from sweeps.store import read_finals, read_rows
from tests.test_runner import CASE, PATIENCE_S, make_spec, trials

on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def cuda_spec(**timing: float) -> SweepSpec:
    """``faulty`` is ours, ``fa3_faulty`` a peer by its name."""
    return SweepSpec.model_validate({
        "name": "test", "shapes": {"heads": [[2, 1]], "head_dim": [16], "seqlen": [12]},
        "timing": {"wall_ms": 1.0, **timing},
        "implementations": {name: {"use": "tests.cuda_faults:make", "options": {"of": name}}
                            for name in ("faulty", "fa3_faulty")}})


def faulty(spec: SweepSpec, impl: str, *ways: str) -> list[Trial]:
    """Every fault stands between two trials that have to work."""
    configs = [{"do": "ok", "n": 0}]
    for way in ways:
        configs += [{"do": way, "n": len(configs)}, {"do": "ok", "n": len(configs) + 1}]
    return [Trial(CASE, impl, config, spec.implementations[impl].all_options()) for config in configs]


def statuses(run_dir: Path, impl: str) -> list[str]:
    rows = {row["config"]["n"]: row["status"] for row in read_rows(run_dir) if row["impl"] == impl}
    return [rows[n] for n in sorted(rows)]


@on_cuda
@pytest.mark.parametrize(("way", "status", "says"), [
    ("illegal", "runtime_error", "illegal memory access"), ("assert", "runtime_error", "assert"),
    ("endless", "timeout", "run: longer than its limit"), ("memory", "oom", "out of memory")])
def test_a_real_fault_costs_its_own_trial(tmp_path: Path, way: str, status: str, says: str) -> None:
    spec = cuda_spec(compile_timeout_s=45.0)
    ours, peers = faulty(spec, "faulty", way), faulty(spec, "fa3_faulty")
    runner.run(spec, tmp_path, phases=[lambda rows: [*ours[:2], *peers, *ours[2:]]])
    assert statuses(tmp_path, "faulty") == ["ok", status, "ok"] and statuses(tmp_path, "fa3_faulty") == ["ok"]
    (bad,) = [row for row in read_rows(tmp_path) if row["status"] == status]
    assert says in bad["message"].lower(), bad["message"]


@on_cuda
def test_real_faults_of_peers_leave_ours_alone(tmp_path: Path) -> None:
    spec = cuda_spec(compile_timeout_s=45.0)
    peers = faulty(spec, "fa3_faulty", "illegal", "memory", "assert")
    ours = faulty(spec, "faulty")[:1] + [
        Trial(CASE, "faulty", {"do": "ok", "n": n}, spec.implementations["faulty"].all_options()) for n in range(1, 8)]
    runner.run(spec, tmp_path, phases=[lambda rows: [trial for pair in zip(peers, ours, strict=False)
                                                     for trial in pair] + ours[7:]], peer_workers=1)
    assert statuses(tmp_path, "faulty") == ["ok"] * 8
    assert statuses(tmp_path, "fa3_faulty") == ["ok", "runtime_error", "ok", "oom", "ok", "runtime_error", "ok"]


@on_cuda
def test_a_real_fault_in_a_final_costs_that_final(tmp_path: Path) -> None:
    spec = cuda_spec()
    ok, bad, other = faulty(spec, "faulty", "illegal")
    finals = [Final(CASE, (ok,)), Final(CASE, (ok, bad, other)), Final(CASE, (other,))]
    runner.run(spec, tmp_path, phases=[lambda rows: finals])
    records = read_finals(tmp_path)
    assert [record["status"] for record in records] == ["ok", "runtime_error", "ok"]
    assert "illegal memory access" in records[1]["message"]
    assert {entrant["status"] for entrant in records[1]["entrants"]} == {"runtime_error"}


@pytest.mark.parametrize(("way", "status"), [("sigkill", "crashed"), ("hang", "timeout")])
def test_what_killed_its_worker_is_tried_again_only_when_asked(tmp_path: Path, way: str, status: str) -> None:
    log = tmp_path / "log"
    spec = make_spec({"log": str(log)}, compile_timeout_s=10.0)
    planned = trials(spec, {"n": 0, "do": way}, {"n": 1})

    def again(**options: Any) -> tuple[int, dict[int, str]]:
        summary = runner.run(spec, tmp_path / "run", phases=[lambda rows: planned], **options)
        return summary.new_rows, {row["config"]["n"]: row["status"] for row in read_rows(tmp_path / "run")}

    expected = {0: status, 1: "ok"}
    assert again() == (2, expected) and again() == (0, expected)
    assert again(retry=("incorrect",)) == (0, expected) and again(retry=(status,)) == (1, expected)
    assert sorted(log.read_text().split()) == ["0", "0", "1"]


def test_a_compiler_that_dies_costs_its_own_build() -> None:
    """LLVM and ptxas end their process when they fail in a way that they did not expect."""
    pool = CompilePool(1, PATIENCE_S)
    says = {"compile_abort": "SIGABRT", "compile_kill": "SIGKILL", "compile_exit": "exit status 7"}
    configs: list[Mapping[str, Any]] = [{"binary": "0"}]
    for n, way in enumerate(says, 1):
        configs += [{"do": way}, {"binary": str(n)}]
    pool.submit([CompileTask(str(n), "tests.fakes:make", {}, CASE, config, 90) for n, config in enumerate(configs)])
    results = {}
    try:
        deadline = time.monotonic() + len(configs) * PATIENCE_S
        while len(results) < len(configs):
            assert time.monotonic() < deadline, f"a build never ended; of {len(configs)} these did: {results}"
            select.select(pool.readable(), [], [], 0.1)
            results |= {result.id: result for result in pool.poll()}
    finally:
        pool.close()
    assert [results[str(n)].status for n in range(len(configs))] == ["ok", *["compile_error", "ok"] * len(says)]
    for n, words in enumerate(says.values()):
        assert words in results[str(2 * n + 1)].message


@pytest.mark.parametrize(("resources", "config", "limit", "says"), [
    ({"registers": 255, "shared_bytes": 1024}, {"num_warps": 8}, 232448, ""),
    ({"registers": 128}, {"num_warps": 16}, None, ""),
    ({"registers": 129}, {"num_warps": 16}, None, "registers: 512 threads of 129 need 69632, an SM has 65536"),
    ({"registers": 200, "threads": 384}, {"num_warps": 4}, None, "registers: 384 threads of 200 need 76800"),
    ({"registers": 255}, {"bwd_dq": {"num_warps": 16}}, None, ""),  # a whole: its parts were built on their own
    ({"registers": None, "shared_bytes": None}, {"num_warps": 8}, 1024, ""),
    ({"shared_bytes": 1025}, {}, 1024, "shared memory: needs 1025 bytes, a block has 1024"),
    ({"shared_bytes": 1025}, {}, None, "")])
def test_what_can_never_be_launched_is_known_from_its_build(
        resources: dict[str, Any], config: dict[str, Any], limit: int | None, says: str) -> None:
    found = launch_problem(resources, config, limit)
    assert found.startswith(says) and bool(found) == bool(says)
