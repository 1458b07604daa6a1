"""The run directory: nothing written is lost, nothing half written is read."""

from __future__ import annotations

import csv
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sweeps.columns import COLUMNS
from sweeps.environment import fingerprint, kernel_source_hash, row_key
from sweeps.store import (
    Store,
    StoreError,
    StoreFull,
    new_run_dir,
    read_environment,
    read_finals,
    read_rows,
    read_sittings,
    write_results_csv,
)

ENV = {"gpu": "NVIDIA H100 80GB HBM3", "sm_count": 132, "driver": "570.1", "torch": "2.11", "git_commit": "abc"}


def row(key: str, **fields: object) -> dict[str, object]:
    return {"key": key, "trial": f"trial-{key}", "status": "ok", "latency_ms": 1.5, **fields}


def test_rows_come_back_as_written_and_one_per_key(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.append(row("a", config={"BLOCK_M": 64}, samples_ms=[1.5, 1.6]))
        store.append(row("b", status="crashed", message="killed\nby SIGKILL"))
        store.append(row("a", latency_ms=2.0))
        assert [r["key"] for r in store.rows()] == ["b", "a"]
        assert store.done_keys() == {"a", "b"}
    assert read_rows(tmp_path) == [row("b", status="crashed", message="killed\nby SIGKILL"), row("a", latency_ms=2.0)]
    assert len((tmp_path / "trials.jsonl").read_text().splitlines()) == 3


def test_every_row_is_one_write_and_then_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda fd, data: (calls.append("write"), write(fd, data))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd))[1])
    with Store(tmp_path) as store:
        store.append(row("a", samples_ms=[0.1] * 5000))
    assert calls == ["write", "fsync"]


def test_rows_that_never_reach_the_disk_are_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store(tmp_path) as store:
        store.append(row("a"))
        store.append(row("b"), sync=False)
        store.append(row("c"), sync=False)
        assert [r["key"] for r in read_rows(tmp_path)] == ["a", "b", "c"]  # whoever kills this process leaves them
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StoreFull, match="cannot write"):
            store.sync()
    assert [r["key"] for r in read_rows(tmp_path)] == ["a"]


def test_numbers_that_are_not_finite_are_absent(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        written = store.append(row("a", rel_err_o=float("nan"), samples_ms=[1.0, float("inf")]))
    assert written["rel_err_o"] is None and written["samples_ms"] == [1.0, None]
    assert "NaN" not in (tmp_path / "trials.jsonl").read_text()


@pytest.mark.parametrize("bad", [{"key": "a", "status": "fine"}, {"status": "ok"}, {"key": "a"}])
def test_a_row_without_key_or_known_status_is_refused(tmp_path: Path, bad: dict[str, str]) -> None:
    with Store(tmp_path) as store:
        with pytest.raises(ValueError, match="row: "):
            store.append(bad)
        assert store.rows() == []


@pytest.mark.parametrize("torn", [b'{"key":"c","status":"o', b"x" * 9000, b'{"key":"c"}'])
def test_a_torn_last_line_is_passed_over_and_cut_off_on_resume(tmp_path: Path, torn: bytes) -> None:
    with Store(tmp_path) as store:
        store.append(row("a"))
        store.append(row("b"))
    whole = (tmp_path / "trials.jsonl").read_bytes()
    (tmp_path / "trials.jsonl").write_bytes(whole + torn)
    assert [r["key"] for r in read_rows(tmp_path)] == ["a", "b"]
    with Store(tmp_path) as store:
        assert store.done_keys() == {"a", "b"}
        assert (tmp_path / "trials.jsonl").read_bytes() == whole
        store.append(row("c"))
    assert [r["key"] for r in read_rows(tmp_path)] == ["a", "b", "c"]


def test_a_log_that_is_only_a_torn_line_becomes_empty(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_bytes(b'{"key"')
    with Store(tmp_path) as store:
        assert store.rows() == []
    assert (tmp_path / "trials.jsonl").read_bytes() == b""


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    (tmp_path / "trials.jsonl").write_text('{"key":"a","status":"ok"}\nnonsense\n{"key":"b","status":"ok"}\n')
    with pytest.raises(StoreError, match=r"trials\.jsonl, line 2"):
        Store(tmp_path)


@pytest.mark.parametrize("kept", [0, 7])
def test_disk_full_leaves_the_log_at_the_last_whole_row(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    write = os.write

    def full(fd: int, data: bytes) -> int:
        if kept:
            return write(fd, data[:kept])  # a disk that fills up takes what still fits
        raise OSError(errno.ENOSPC, "No space left on device")

    with Store(tmp_path) as store:
        store.append(row("a"))
        before = (tmp_path / "trials.jsonl").read_bytes()
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(StoreFull, match="resumed"):
            store.append(row("b"))
        monkeypatch.undo()
        assert (tmp_path / "trials.jsonl").read_bytes() == before
        assert store.done_keys() == {"a"}
        store.append(row("b"))
    assert [r["key"] for r in read_rows(tmp_path)] == ["a", "b"]


FILL = """
import resource, signal, sys
from pathlib import Path
from sweeps.store import Store, StoreFull
run_dir, limit = Path(sys.argv[1]), int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
written = 0
with Store(run_dir) as store:
    try:
        while written < 10000:
            store.append({"key": str(written), "status": "ok", "samples_ms": [0.125] * 50})
            written += 1
    except StoreFull as error:
        print(written, "resumed" in str(error))
"""


@pytest.mark.parametrize("limit", [4096, 5000])
def test_a_file_that_can_really_grow_no_further_ends_with_its_last_whole_row(tmp_path: Path, limit: int) -> None:
    """The system cuts the row that reaches the limit, as it does on a full disk."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", FILL, str(tmp_path), str(limit)], capture_output=True, text=True,
                          env=env, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    written, says = done.stdout.split()
    log = (tmp_path / "trials.jsonl").read_bytes()
    assert 5 < int(written) < 10000 and says == "True"
    assert len(log) <= limit and log.endswith(b"}\n") and len(log) + len(log) // int(written) >= limit - 10
    assert [r["key"] for r in read_rows(tmp_path)] == [str(n) for n in range(int(written))]
    with Store(tmp_path) as store:  # there is room again
        store.append(row("more"))
    assert len(read_rows(tmp_path)) == int(written) + 1


def test_finals_have_a_log_of_their_own_with_the_same_rules(tmp_path: Path) -> None:
    assert read_finals(tmp_path) == []  # a run of before there were any
    with Store(tmp_path) as store:
        store.start("f", "final")
        assert store.starts_without_row("f") == 1
        store.append_final({"key": "f", "status": "crashed", "entrants": [{"latency_ms": float("inf")}]})
        assert store.starts_without_row("f") == 0 and store.rows() == []
        store.append_final({"key": "g", "status": "ok"})
        store.append_final({"key": "f", "status": "ok"})
        with pytest.raises(ValueError, match="status must be one of"):
            store.append_final({"key": "f", "status": "lost"})
    with (tmp_path / "finals.jsonl").open("ab") as file:
        file.write(b'{"key":"h","sta')
    assert [(r["key"], r["status"]) for r in read_finals(tmp_path)] == [("g", "ok"), ("f", "ok")]
    with Store(tmp_path) as store:
        assert [r["key"] for r in store.finals()] == ["g", "f"]
    first = json.loads((tmp_path / "finals.jsonl").read_text().splitlines()[0])
    assert first["entrants"] == [{"latency_ms": None}] and (tmp_path / "finals.jsonl").read_text().count("\n") == 3


def test_sittings_add_up_and_a_full_disk_takes_none_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_sittings(tmp_path) == []
    with Store(tmp_path) as store:
        store.add_sitting({"start": "a", "gpu_busy": 0.5})
    with Store(tmp_path) as store:
        store.add_sitting({"start": "b", "gpu_busy": float("nan")})

        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "replace", full)
        with pytest.raises(StoreFull, match=r"summary\.json"):
            store.add_sitting({"start": "c"})
    assert read_sittings(tmp_path) == [{"start": "a", "gpu_busy": 0.5}, {"start": "b", "gpu_busy": None}]
    monkeypatch.undo()
    (tmp_path / "summary.json").write_text('["no"]')
    with pytest.raises(StoreError, match=r"summary\.json: not the summary of a run"):
        Store(tmp_path)  # before anything is measured, not after


def test_two_runs_cannot_write_one_directory(tmp_path: Path) -> None:
    script = f"from pathlib import Path\nfrom sweeps.store import Store\nStore(Path({str(tmp_path)!r}))"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with Store(tmp_path):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=env, check=False)
        assert done.returncode == 1 and "another run is writing here" in done.stderr
    with Store(tmp_path) as again:
        assert again.rows() == []


def test_starts_without_a_row_are_counted_until_there_is_one(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.start("a", "trial-a")
        store.start("b", "trial-b")
        store.append(row("b"))
    with Store(tmp_path) as store:
        assert [store.starts_without_row(key) for key in "abc"] == [1, 0, 0]
        store.start("a", "trial-a")
        assert store.starts_without_row("a") == 2


def test_results_csv_has_the_columns_in_order_and_empty_cells_for_none(tmp_path: Path) -> None:
    rows = [row("a", window=None, config={"b": 2, "a": [1]}, message="two\nlines", batch=1, deterministic=True),
            row("b", window=128, config={}, latency_ms=float("nan"), extra="left out")]
    path = write_results_csv(tmp_path, rows)
    with path.open() as file:
        table = list(csv.reader(file))
    assert table[0] == list(COLUMNS)
    first, second = (dict(zip(table[0], cells, strict=True)) for cells in table[1:])
    assert first["window"] == "" and first["latency_ms"] == "1.5" and first["message"] == "two lines"
    assert json.loads(first["config"]) == {"a": [1], "b": 2} and first["deterministic"] == "True"
    assert second["window"] == "128" and second["config"] == "{}" and second["latency_ms"] == ""
    assert len(path.read_text().splitlines()) == 3


def test_environment_is_kept_with_the_ones_before_it(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        store.write_environment(ENV)
        store.write_environment(ENV | {"git_commit": "def"})
        store.write_environment(ENV | {"driver": "580.2"})
    env = read_environment(tmp_path)
    assert env["driver"] == "580.2" and env["schema_version"] == 1
    assert [e["driver"] for e in env["earlier"]] == ["570.1"]
    (tmp_path / "env.json").write_text('{"schema_version": 99}')
    with pytest.raises(StoreError, match="schema version 99"):
        read_environment(tmp_path)


def test_the_key_holds_what_can_change_a_number_and_nothing_else() -> None:
    key = row_key("trial", {"fa3": "1"}, ENV)
    assert row_key("trial", {"fa3": "1"}, ENV | {"git_commit": "x", "hostname": "y"}) == key
    changed = [row_key("other", {"fa3": "1"}, ENV), row_key("trial", {"fa3": "2"}, ENV)]
    changed += [row_key("trial", {"fa3": "1"}, ENV | {name: "other"}) for name in (
        "gpu", "sm_count", "memory_bytes", "driver", "cuda", "torch", "triton", "kernel_source", "timing_mode",
        "triton_env")]
    assert len({key, *changed}) == len(changed) + 1
    assert fingerprint(dict(reversed(ENV.items()))) == fingerprint(ENV)


def test_the_source_hash_follows_the_kernels_only(tmp_path: Path) -> None:
    kernels = tmp_path / "flash_sink_attn" / "kernels"
    kernels.mkdir(parents=True)
    (kernels / "forward.py").write_text("a = 1\n")
    first = kernel_source_hash(tmp_path)
    (tmp_path / "flash_sink_attn" / "gpt_oss.py").write_text("unrelated\n")
    assert kernel_source_hash(tmp_path) == first
    (kernels / "forward.py").write_text("a = 2\n")
    second = kernel_source_hash(tmp_path)
    (kernels / "forward.py").rename(kernels / "fwd.py")
    assert len({first, second, kernel_source_hash(tmp_path)}) == 3


def test_run_directories_never_share_a_name(tmp_path: Path) -> None:
    paths = []
    for _ in range(3):
        paths.append(new_run_dir(tmp_path, "h100", "quick"))
        paths[-1].mkdir(parents=True)
    assert len(set(paths)) == 3 and all(p.parent == tmp_path / "h100" and "-quick" in p.name for p in paths)
