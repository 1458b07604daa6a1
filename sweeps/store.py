"""A run directory: an append-only log that survives whatever ends the run, and the tables derived from it.

::

    spec.yaml      the configuration of the run, put there by whoever starts it
    env.json       schema version and environment; earlier ones of a resumed run under "earlier"
    trials.jsonl   one row per line, whole or absent
    finals.jsonl   one final per line, whole or absent
    started.jsonl  what was begun, so that a resumed run knows which trial was running when the last one ended
    summary.json   one entry per sitting: how long it took, how busy the device was, where the time went
    results.csv    derived from trials.jsonl: sweeps.columns.COLUMNS, in that order
"""

from __future__ import annotations

import contextlib
import csv
import datetime
import fcntl
import io
import json
import math
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sweeps.columns import COLUMNS, STATUSES
from sweeps.environment import fingerprint

SCHEMA_VERSION = 1
LOG = "trials.jsonl"
FINALS = "finals.jsonl"
STARTED = "started.jsonl"
SUMMARY = "summary.json"
Row = dict[str, Any]


class StoreError(RuntimeError):
    """The run directory cannot be used as asked; the message says which file and why."""


class StoreFull(StoreError):
    """A row could not be written whole (disk full, quota, read-only). The log ends with the last whole row."""


def new_run_dir(root: Path, gpu: str, name: str) -> Path:
    """``root/<gpu>/<utc>-<name>``, not created yet; a number is added where that name is taken."""
    stamp = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    path = root / gpu / f"{stamp}-{name}"
    count = 2
    while path.exists():
        path = root / gpu / f"{stamp}-{name}-{count}"
        count += 1
    return path


class Store:
    """The one writer of a run directory.

    Args:
        run_dir: created where it does not exist. A log already in it is continued; a torn last line is cut off.

    Raises:
        StoreError: another process is writing there, or the log is not one of ours.
    """

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, int] = {}
        self._unsynced: dict[str, int] = {}  # file -> its size when all of it was on the disk
        try:
            for name in (LOG, FINALS, STARTED):
                self._files[name] = os.open(run_dir / name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
                if name == LOG:
                    _lock(self._files[name], run_dir)
                _cut_torn_line(self._files[name])
            self._rows = {row["key"]: row for row in read_rows(run_dir)}
            self._finals = {record["key"]: record for record in read_finals(run_dir)}
            self._sittings = read_sittings(run_dir)
            self._starts = Counter(record["key"] for record in _read_lines(run_dir / STARTED))
        except BaseException:
            self.close()
            raise

    def write_environment(self, env: Mapping[str, Any]) -> None:
        """Records the environment of the rows that follow; one that differs from the last is kept beside it."""
        path = self.run_dir / "env.json"
        earlier: list[Any] = []
        if path.exists():
            last = read_environment(self.run_dir)
            earlier = last.pop("earlier", [])
            if last["fingerprint"] != fingerprint(env):
                earlier.append(last)
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record = {"schema_version": SCHEMA_VERSION, "fingerprint": fingerprint(env), "started": now, **env}
        _replace(path, json.dumps(record | {"earlier": earlier}, indent=1) + "\n")

    def append(self, row: Mapping[str, Any], *, sync: bool = True) -> Row:
        """Writes one row to the disk, or nothing of it. Returns it as written: numbers that are not finite are None.

        Args:
            sync: wait for the disk. Without, the row outlives this process, and the machine after :meth:`sync`.

        Raises:
            ValueError: no ``key``, or an unknown ``status``.
            StoreFull: it could not be written whole.
        """
        return self._append(LOG, self._rows, row, sync)

    def append_final(self, record: Mapping[str, Any], *, sync: bool = True) -> Row:
        """Writes the record of one final, by the rules of :meth:`append`."""
        return self._append(FINALS, self._finals, record, sync)

    def sync(self) -> None:
        """Waits until all that was appended is on the disk.

        Raises:
            StoreFull: it does not get there; the log is as it was when it last did.
        """
        for name in list(self._unsynced):
            self._sync(name)

    def add_sitting(self, sitting: Mapping[str, Any]) -> None:
        """Adds an entry to summary.json.

        Raises:
            StoreFull: it could not be written; the earlier entries are still there.
        """
        sittings = [*self._sittings, _finite(dict(sitting))]
        _replace(self.run_dir / SUMMARY, json.dumps(sittings, indent=1, allow_nan=False) + "\n")
        self._sittings = sittings

    def start(self, key: str, trial_id: str) -> None:
        """Records that the trial is about to run; the GPU waits for this, so it only has to outlive the process."""
        self._write(STARTED, {"key": key, "trial": trial_id})
        self._starts[key] += 1

    def rows(self) -> list[Row]:
        """All rows, one per key: of a trial that was tried again, the last."""
        return list(self._rows.values())

    def finals(self) -> list[Row]:
        """All records of finals, one per key."""
        return list(self._finals.values())

    def done_keys(self) -> set[str]:
        return set(self._rows)

    def starts_without_row(self, key: str) -> int:
        """How often the trial or final was begun and the run ended before its row; 0 once it has one."""
        return 0 if key in self._rows or key in self._finals else self._starts[key]

    def write_results_csv(self, rows: Iterable[Mapping[str, Any]] | None = None) -> Path:
        return write_results_csv(self.run_dir, self.rows() if rows is None else rows)

    def close(self) -> None:
        for fd in self._files.values():
            with contextlib.suppress(OSError):
                os.close(fd)
        self._files = {}

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, name: str, records: dict[str, Row], row: Mapping[str, Any], sync: bool) -> Row:
        if row.get("status") not in STATUSES:
            raise ValueError(f"row: status must be one of {', '.join(STATUSES)}, got {row.get('status')!r}")
        if not row.get("key"):
            raise ValueError("row: key is missing")
        clean: Row = _finite(dict(row))
        self._write(name, clean)
        if sync:
            self._sync(name)
        records.pop(clean["key"], None)
        records[clean["key"]] = clean
        return clean

    def _write(self, name: str, record: Mapping[str, Any]) -> None:
        data = json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"
        fd = self._files[name]
        before = os.fstat(fd).st_size
        try:
            written = os.write(fd, data)  # one write: another reader sees the whole line or none of it
            if written != len(data):
                raise OSError(f"{written} of {len(data)} bytes written")
        except OSError as error:
            raise self._cut(name, before, error) from error
        self._unsynced.setdefault(name, before)

    def _sync(self, name: str) -> None:
        before = self._unsynced.pop(name)
        try:
            os.fsync(self._files[name])
        except OSError as error:
            raise self._cut(name, before, error) from error

    def _cut(self, name: str, size: int, error: OSError) -> StoreFull:
        with contextlib.suppress(OSError):
            os.ftruncate(self._files[name], size)
        return StoreFull(f"{self.run_dir / name}: cannot write ({error}); everything before is safe, "
                         "and the run can be resumed")


def read_rows(run_dir: Path) -> list[Row]:
    """The rows of a run, one per key (the last), in the order written. Safe while the run is going on.

    Raises:
        StoreError: no log there, or a line of it is not a row.
    """
    return _last_of_each_key(run_dir / LOG)


def read_finals(run_dir: Path) -> list[Row]:
    """The finals of a run, one per key (the last), in the order written; [] for a run without any.

    Raises:
        StoreError: a line of the log is not a record.
    """
    path = run_dir / FINALS
    return _last_of_each_key(path) if path.exists() else []


def read_sittings(run_dir: Path) -> list[dict[str, Any]]:
    """summary.json of a run: one entry per sitting, the latest last; [] where there is none.

    Each has start (UTC), environment (fingerprint), elapsed_s, new_rows, new_finals, remaining, counts, gpu_busy,
    seconds (by stage), workers (the same by worker), stopped ("" = complete), cache_hits, cache_misses and
    cached_share (1 = every kernel of ours was built before, None = nothing was to be built).

    Raises:
        StoreError: the file is not one of ours.
    """
    path = run_dir / SUMMARY
    if not path.exists():
        return []
    try:
        sittings: list[dict[str, Any]] = json.loads(path.read_text())
        if not all(isinstance(sitting, dict) for sitting in sittings):
            raise TypeError("expected a list of objects")
    except (OSError, ValueError, TypeError) as error:
        raise StoreError(f"{path}: not the summary of a run ({error})") from error
    return sittings


def read_environment(run_dir: Path) -> dict[str, Any]:
    """env.json of a run.

    Raises:
        StoreError: absent, or written by a newer version of the suite.
    """
    path = run_dir / "env.json"
    try:
        env: dict[str, Any] = json.loads(path.read_text())
        version = env["schema_version"] if "gpu" not in env else env.get("schema_version", 1)  # absent: the first
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path}: not the environment of a run ({error})") from error
    if version > SCHEMA_VERSION:
        raise StoreError(f"{path}: schema version {version}, this version of the suite reads up to {SCHEMA_VERSION}")
    return env


def write_results_csv(run_dir: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    """Writes results.csv: COLUMNS and no others; None is an empty cell, config is JSON."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(row.get(name)) for name in COLUMNS})
    path = run_dir / "results.csv"
    _replace(path, text.getvalue())
    return path


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    if isinstance(value, (dict, list, tuple)):
        return json.dumps(value, sort_keys=True)
    return " ".join(value.split()) if isinstance(value, str) else value  # one row, one line


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(v) for v in value]
    return value


def _replace(path: Path, text: str) -> None:
    """A reader sees the old file or the new one, never half of one."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise StoreFull(f"{path}: cannot write ({error})") from error


def _last_of_each_key(path: Path) -> list[Row]:
    by_key: dict[str, Row] = {}
    for row in _read_lines(path):
        by_key.pop(row["key"], None)
        by_key[row["key"]] = row
    return list(by_key.values())


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path}: not the log of a run ({error})") from error
    *lines, _torn = data.split(b"\n")  # what follows the last newline was never finished
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            record["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}, line {number}: not a row ({error})") from error
        records.append(record)
    return records


def _lock(fd: int, run_dir: Path) -> None:
    """Held until the descriptor closes, however the process ends."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise StoreError(f"{run_dir}: another run is writing here") from None


def _cut_torn_line(fd: int) -> None:
    size = os.fstat(fd).st_size
    end = size
    while end > 0:
        start = max(0, end - 4096)
        newline = os.pread(fd, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(fd, end)
