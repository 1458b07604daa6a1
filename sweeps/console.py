"""What the terminal shows: the plan before a run, its progress, and the answer after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from sweeps.cases import PASSES, Case
from sweeps.plan import Plan, Trial
from sweeps.registry import is_peer
from sweeps.runner import RunSummary
from sweeps.select import config_label
from sweeps.workers import GPU_STAGES

# Outcomes that say that something went wrong, and not that it was never going to run.
FAILED = ("compile_error", "out_of_resources", "oom", "runtime_error", "crashed", "timeout", "incorrect")
_SHOWN_FAILURES = 3  # of a kind; the rest is in the report


def lengths(case: Case) -> str:
    """The lengths of a case in a few characters: 8192, 1/4096 (queries/keys), 2x1024 (batch), a varlen batch's name."""
    if case.varlen:
        return case.varlen
    one = str(case.seqlen_q) if case.seqlen_q == case.seqlen_k else f"{case.seqlen_q}/{case.seqlen_k}"
    return one if case.batch == 1 else f"{case.batch}x{one}"


def shape(case: Case) -> tuple[str, str, str, str]:
    """Model, or heads x head dim; window; dtype; lengths."""
    dims = str(case.head_dim) if case.head_dim == case.head_dim_v else f"{case.head_dim}/{case.head_dim_v}"
    return (
        case.model or f"{case.heads_q}/{case.heads_kv} x {dims}",
        "-" if case.window is None else str(case.window),
        {"bfloat16": "bf16", "float16": "fp16"}[case.dtype] + ("" if case.sinks else ", no sinks"),
        lengths(case),
    )


def _table(title: str, text: Iterable[str], numbers: Iterable[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in text:
        table.add_column(name, overflow="fold", no_wrap=name not in ("best", "here", " "))
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def make_console() -> Console:
    """The terminal; 120 columns where there is none, so that tables in a log file are legible."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def plan_table(plan: Plan) -> Table:
    """One line per shape: our candidates per pass ("+ n" in the second round), rejected ones, trials of peers."""
    trials = [*plan.first, *(trial for whole in plan.wholes for trial in whole)]
    passes = [pass_ for pass_ in PASSES if any(trial.case.pass_ == pass_ for trial in trials)]
    table = _table(
        "What will run", ("shape", "window", "dtype", "tokens"), (*passes, "rejected", "peers", "unsupported")
    )
    shapes: dict[str, tuple[Case, Counter[str]]] = {}
    for trial in trials:
        shapes.setdefault(trial.case.shape_id, (trial.case, Counter()))[1][_kind(trial)] += 1
    for case, n in shapes.values():
        later = {
            pass_: sum(
                1 if pass_ == "fwd_bwd" else combine**2
                for (case_id, _), combine in plan.combine.items()
                if case_id == case.with_pass(pass_).id
            )
            for pass_ in passes
        }
        cells = [f"{n[pass_] or ''}{f' + {later[pass_]}' if later[pass_] else ''}" for pass_ in passes]
        table.add_row(*shape(case), *cells, *(str(n[kind] or "") for kind in ("rejected", "peers", "unsupported")))
    return table


def _kind(trial: Trial) -> str:
    if trial.unsupported:
        return "unsupported"
    if is_peer(trial.impl):
        return "peers"
    return "rejected" if trial.rejected else trial.case.pass_


def implementation_table(unavailable: Mapping[str, str | None]) -> Table:
    """One line per implementation: whether it can run here."""
    table = _table("Implementations", ("name", "here"))
    for name, reason in unavailable.items():
        table.add_row(escape(name), "[green]yes[/]" if reason is None else f"no: {escape(_one_line(reason))}")
    return table


def facts_table(title: str, facts: Mapping[str, str]) -> Table:
    """Names and values."""
    table = _table(title, ("", " "))
    table.show_header = False
    for name, value in facts.items():
        table.add_row(escape(name), escape(value))
    return table


def build_table(rows: Iterable[Mapping[str, Any]]) -> Table:
    """Of a run that only built: per case, how many configurations came out how, and what they need."""
    table = _table(
        "Built",
        ("shape", "window", "dtype", "tokens", "pass"),
        ("built", "spilling", "failed", "rejected", "registers", "shared KiB"),
    )
    cases: dict[Case, list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault(Case.from_dict(row["case_fields"]), []).append(row)
    for case, own in cases.items():
        built = [row for row in own if row["registers"] is not None and row["status"] in ("ok", "duplicate")]
        table.add_row(
            *shape(case),
            case.pass_,
            str(len(built)),
            str(sum(row["spills"] > 0 for row in built)),
            str(sum(row["status"] in FAILED for row in own)),
            str(sum(row["status"] == "rejected" for row in own)),
            _span(row["registers"] for row in built),
            _span(row["shared_bytes"] // 1024 for row in built),
        )
    return table


def _span(values: Iterable[int]) -> str:
    found = sorted(values)
    return f"{found[0]} to {found[-1]}" if found else ""


def counts_line(counts: Mapping[str, int]) -> str:
    """``612 ok, 30 rejected, 2 incorrect``: statuses by frequency."""
    return ", ".join(f"{n} {status}" for status, n in sorted(counts.items(), key=lambda item: -item[1])) or "nothing"


def time_lines(summary: RunSummary) -> list[str]:
    """Where the time of a run went: the device's, by stage, and each worker's; [] where no worker was started."""
    if not summary.workers:
        return []
    gpu = {stage: summary.seconds.get(stage, 0.0) for stage in GPU_STAGES}
    free = max(0.0, summary.elapsed_s - sum(gpu.values()))
    lines = [f"time of the device: {_seconds(gpu | {'nobody on it': free})}"]
    for name, seconds in summary.workers.items():
        rest = {stage: s for stage, s in seconds.items() if stage not in GPU_STAGES}
        used = sum(seconds.values()) - sum(rest.values())
        lines.append(f"  worker {name}: {_seconds(rest | {'on the device': used})}")
    return lines


def _seconds(by_stage: Mapping[str, float]) -> str:
    """``measure 22 s, gate 18 s``: the largest first, without what rounds to nothing."""
    shown = sorted((item for item in by_stage.items() if item[1] >= 0.5), key=lambda item: -item[1])
    return ", ".join(f"{stage} {s:.0f} s" for stage, s in shown) or "less than a second"


class RunProgress:
    """A progress display fed with the runner's events: done, failed, best so far, time left.

    Without a terminal it prints a line per phase and every tenth of it, so that a log file stays short.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None
        self._phase = ""
        self._statuses: Counter[str] = Counter()
        self._best: dict[str, float] = {}
        self._printed = 0

    def __enter__(self) -> RunProgress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()

    def __call__(self, event: Mapping[str, Any]) -> None:
        """Takes one event of ``sweeps.runner.run``."""
        if event["event"] == "phase":
            self._new_phase(event)
        elif event["event"] == "row":
            self._row(event)
        elif event["event"] == "final":
            self._final(event)
        elif event["event"] == "note":
            self._console.print(f"[dim]{escape(event['message'])}[/]", highlight=False)

    def _new_phase(self, event: Mapping[str, Any]) -> None:
        if not event["total"]:
            return
        self._phase = "finals" if event.get("finals") else f"round {event['phase']}"
        done, todo = event["done"], event["total"] - event["done"]
        if self._task is not None:
            self._bar.remove_task(self._task)
        # The time left is estimated from this round alone: what an earlier run has done took no time here.
        self._task = self._bar.add_task(self._phase, total=todo, state=self._state())
        self._printed = 0
        if done or not self._console.is_terminal:
            already = f", {done} of {event['total']} done before" if done else ""
            what = "" if event.get("finals") else " trials"
            self._console.print(f"{self._phase}: {todo}{what}{already}", highlight=False)

    def _row(self, event: Mapping[str, Any]) -> None:
        row = event["row"]
        self._statuses[row["status"]] += 1
        if row["status"] in FAILED and self._statuses[row["status"]] <= _SHOWN_FAILURES:
            self._console.print(
                f"[red]{row['status']}[/] {escape(row['impl'])} {escape(row['case'])} "
                f"{escape(config_label(row['config']))}: {escape(_one_line(row['message']))}",
                highlight=False,
            )
        latency = row["latency_ms"]
        if row["status"] == "ok" and latency and not is_peer(row["impl"]):
            self._best[row["case"]] = min(latency, self._best.get(row["case"], latency))
        self._advance(event, self._state(row["case"]))

    def _final(self, event: Mapping[str, Any]) -> None:
        record = event["record"]
        if record["status"] != "ok":
            self._console.print(
                f"[red]{record['status']}[/] final of {escape(record['case'])}: {escape(_one_line(record['message']))}",
                highlight=False,
            )
        times = [entrant["latency_ms"] for entrant in record["entrants"] if entrant.get("latency_ms")]
        best = f"{min(times):.4g} ms" if times else "none"
        self._advance(event, f"best of {len(record['entrants'])}: {best}")

    def _advance(self, event: Mapping[str, Any], state: str) -> None:
        if self._task is not None:
            self._bar.update(self._task, advance=1, state=state)
        tenth = 10 * event["done"] // max(1, event["total"])
        if not self._console.is_terminal and tenth > self._printed:
            self._printed = tenth
            self._console.print(f"{self._phase}: {event['done']}/{event['total']} {state}", highlight=False)

    def _state(self, case: str = "") -> str:
        failed = sum(self._statuses[status] for status in FAILED)
        best = f", best {self._best[case]:.4g} ms" if case in self._best else ""
        return f"ok {self._statuses['ok']}, failed {failed}{best}"


def _one_line(text: str, limit: int = 160) -> str:
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def print_all(console: Console, tables: Iterable[Table]) -> None:
    """Prints tables one below the other."""
    for table in tables:
        console.print(table)
