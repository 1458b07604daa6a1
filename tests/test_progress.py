"""What the terminal says while a run goes on, and where its time went."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from sweeps.console import RunProgress, time_lines
from sweeps.summary import RunSummary


def record(status: str, *times: float | None) -> dict[str, object]:
    return {"status": status, "message": "it broke", "case": "fwd-x", "entrants": [{"latency_ms": ms} for ms in times]}


@pytest.mark.parametrize("terminal", [True, False])
def test_finals_are_counted_and_a_failed_one_is_named(terminal: bool) -> None:
    text = io.StringIO()
    with RunProgress(Console(file=text, force_terminal=terminal, width=160)) as progress:
        progress({"event": "phase", "phase": 2, "done": 0, "total": 0, "finals": False})
        progress({"event": "phase", "phase": 3, "done": 1, "total": 3, "finals": True})
        progress({"event": "final", "record": record("ok", 2.5, 2.25), "done": 2, "total": 3})
        progress({"event": "final", "record": record("crashed", None), "done": 3, "total": 3})
    shown = text.getvalue()
    assert "finals: 2, 1 of 3 done before" in shown and "round 2" not in shown
    assert "crashed final of fwd-x: it broke" in shown.replace("\x1b[31m", "").replace("\x1b[0m", "")
    assert "2/2" in shown if terminal else "finals: 2/3 best of 2: 2.25 ms" in shown


def test_the_time_lines_add_up() -> None:
    workers = {"ours": {"starting": 5.0, "measure": 20.4, "gate": 9.6, "waiting": 3.0, "prepare": 0.2},
               "peers": {"prepare": 60.0, "measure": 10.0, "waiting": 7.0}}
    summary = RunSummary(Path("run"), {}, 1, 0, "", 100.0, 0.4, {"measure": 30.4, "gate": 9.6, "prepare": 60.2},
                         workers)
    assert time_lines(summary) == [
        "time of the device: nobody on it 60 s, measure 30 s, gate 10 s",
        "  worker ours: on the device 30 s, starting 5 s, waiting 3 s",
        "  worker peers: prepare 60 s, on the device 10 s, waiting 7 s"]
    assert time_lines(RunSummary(Path("run"), {}, 1, 0, "", 100.0, 0.4, {})) == []


@pytest.mark.parametrize(("hits", "misses", "share"), [(0, 0, None), (0, 4, 0.0), (3, 1, 0.75)])
def test_a_sitting_says_how_warm_it_was(hits: int, misses: int, share: float | None) -> None:
    summary = RunSummary(Path("run"), {"ok": 1}, 1, 0, "", 10.0, 0.5, {}, cache_hits=hits, cache_misses=misses)
    assert summary.cached_share == share and summary.sitting()["cached_share"] == share
    assert "run_dir" not in summary.sitting() and summary.sitting()["counts"] == {"ok": 1}
