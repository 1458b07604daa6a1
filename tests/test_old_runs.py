"""Run directories of earlier versions stay readable: a cut of the first H100 run, as it was written then."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

from sweeps.compare import compare
from sweeps.report import write_report
from sweeps.select import select_run
from sweeps.store import SCHEMA_VERSION, StoreError, read_environment, read_finals, read_rows, read_sittings

V1 = Path(__file__).parent / "data" / "run-v1"


@pytest.fixture
def run(tmp_path):
    return Path(shutil.copytree(V1, tmp_path / "20261122T190710Z-h100"))


def test_the_first_schema_is_read():
    env = read_environment(V1)
    assert env["schema_version"] == 1 and env["gpu"] == "NVIDIA H100 80GB HBM3"
    assert len(read_rows(V1)) == 28 and read_finals(V1) == [] and read_sittings(V1) == []


def test_an_environment_without_a_version_is_of_the_first_schema(run):
    env = read_environment(run)
    del env["schema_version"]
    (run / "env.json").write_text(json.dumps(env))
    assert read_environment(run) == env
    (run / "env.json").write_text(json.dumps({"name": "not an environment"}))
    with pytest.raises(StoreError, match="not the environment of a run"):
        read_environment(run)
    (run / "env.json").write_text(json.dumps(env | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(StoreError, match=f"reads up to {SCHEMA_VERSION}"):
        read_environment(run)


def test_the_winners_of_the_first_schema_are_what_they_were():
    selection = select_run(V1)
    bwd = selection.get("bwd-bfloat16-b1-q8192-k8192-h64x8-d64x64-w128")
    assert bwd is not None and bwd.best is not None
    assert bwd.best.label == "dq 64x32 w4 s3 oneloop tma | dkdv 64x64 w4 s3 oneloop"
    assert bwd.best.latency_ms == pytest.approx(0.3122, rel=1e-3)
    assert bwd.flash is not None and bwd.flash.impl == "fa4"
    fwd = selection.get("fwd-bfloat16-b1-q1024-k1024-h64x8-d64x64-w128")
    assert fwd is not None and fwd.best is not None and fwd.best.latency_ms == pytest.approx(0.02032, rel=1e-3)


def test_an_old_run_is_reported_and_compared(run, tmp_path):
    write_report(run)
    text = (run / "report.md").read_text()
    assert "6 cases, 28 trials: 24 ok, 3 rejected, 1 unsupported." in text
    with (run / "best.csv").open() as f:
        best = {row["case"]: row for row in csv.DictReader(f)}
    assert json.loads(best["bwd-bfloat16-b1-q8192-k8192-h64x8-d64x64-w128"]["config"])["bwd_dq"]["BLOCK_N"] == 32
    assert best["fwd-float16-b1-q4224-k4224-h28x4-d128x128-w256"]["status"] == "rejected"
    assert {c.verdict for c in compare(V1, run, ["all"]).changes} <= {"SAME", "UNSURE"}
