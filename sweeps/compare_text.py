"""A comparison for people: Markdown for a pull request, a table for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.markup import escape
from rich.table import Table

from sweeps.cases import Case
from sweeps.compare import OURS, VERDICTS, Change, Comparison
from sweeps.select import Measured
from sweeps.tables import DTYPE_SHORT, geometric_mean, heads_label, length_label, markdown, mask_label, number

_COLOURS = {"SLOWER": "bold red", "FASTER": "bold green", "UNSURE": "yellow", "SAME": "dim"}


def headline(comparison: Comparison) -> str:
    """``3 SLOWER, 12 FASTER, 20 UNSURE, 93 SAME of 128 comparisons``."""
    said = [f"{n} {v}" for v in VERDICTS if (n := comparison.count(v))]
    lost = f", {len(comparison.lost)} without a time any more" if comparison.lost else ""
    return f"{', '.join(said) or 'nothing'} of {len(comparison.changes)} comparisons{lost}"


def control_line(comparison: Comparison) -> str:
    """How peers that did not change moved between the runs; "" without any."""
    ratios = sorted(c.ratio for c in comparison.control)
    mean = geometric_mean(ratios)
    if mean is None:
        return ""
    return (f"Control: peers whose versions are the same in both runs changed by {_percent(mean - 1)} in the mean over "
            f"{len(ratios)} timings ({_percent(ratios[0] - 1)} to {_percent(ratios[-1] - 1)}).")


def comparison_markdown(comparison: Comparison) -> str:
    """The whole comparison; what did not change is folded."""
    shown = [c for v in VERDICTS if v != "SAME" for c in comparison.changes if c.verdict == v]
    same = [c for c in comparison.changes if c.verdict == "SAME"]
    within = f"{100 * comparison.same_within:g}%"
    parts = [f"### {comparison.old} → {comparison.new}", f"{comparison.gpu}. **{headline(comparison)}.**"]
    if comparison.warnings:
        parts.append("\n".join(f"- **Warning**: {w}" for w in comparison.warnings))
    if line := control_line(comparison):
        parts.append(line)
    if shown:
        parts.append(_changes_table(shown))
    if comparison.lost:
        parts.append("**Without a time any more**\n\n" + markdown(
            ["case", "implementation", "status"], [[x.case.id, x.impl, x.status] for x in comparison.lost],
            text_columns=3))
    if same:
        parts.append(f"<details><summary>{len(same)} SAME (within {within})</summary>\n\n{_changes_table(same)}\n\n"
                     "</details>")
    for ids, which in ((comparison.only_old, "old"), (comparison.only_new, "new")):
        if ids:
            parts.append(f"{len(ids)} cases of ours in the {which} run only.")
    if comparison.differs:
        parts.append("**What differs**\n\n" + markdown(["", "old", "new"], comparison.differs, text_columns=3))
    parts.append(f"Change: new median device time over old, with its 95% interval. SAME: the interval lies within "
                 f"±{within}; SLOWER, FASTER: wholly beyond it; UNSURE: neither, or SM clocks, throttling or "
                 "unchanged peers may explain it (see the notes).")
    return "\n\n".join(parts) + "\n"


def _changes_table(changes: Sequence[Change]) -> str:
    rows = [[c.verdict, c.impl, c.model or heads_label(c.case), *_case_cells(c.case), number(c.old.latency_ms, 4),
             number(c.new.latency_ms, 4), _percent(c.change), f"{_percent(c.low)} to {_percent(c.high)}",
             _config(c), "; ".join(c.notes)] for c in changes]
    return markdown(["verdict", "impl", "model", "pass", "mask", "dtype", "length", "old ms", "new ms", "change",
                     "95% interval", "config", "notes"], rows, text_columns=7)


def comparison_table(comparison: Comparison) -> Table:
    """For the terminal: what is not SAME, in less than 80 columns."""
    table = Table(title="Changes", title_justify="left", header_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("", "case", "old ms", "new ms", "change", "95% interval"):
        right = name not in ("", "case")
        table.add_column(name, justify="right" if right else "left", no_wrap=name != "case", overflow="fold")
    several = len({c.impl for c in comparison.changes}) > 1
    for verdict in VERDICTS[:3]:
        for c in (c for c in comparison.changes if c.verdict == verdict):
            pass_, mask, dtype, length = _case_cells(c.case)
            name = f"{c.model or heads_label(c.case)} {pass_} {mask} {dtype} {length}"
            if several or c.impl != OURS:
                name = f"{c.impl}: {name}"
            table.add_row(f"[{_COLOURS[verdict]}]{verdict}[/]", escape(name), number(c.old.latency_ms),
                          number(c.new.latency_ms), _percent(c.change), f"{_percent(c.low)} to {_percent(c.high)}")
    return table


def _case_cells(case: Case) -> tuple[str, str, str, str]:
    batch = f"{case.batch} x " if case.batch > 1 and not case.varlen else ""
    mask = mask_label(case) + ("" if not case.seed else f", seed {case.seed}")
    return case.pass_, mask, DTYPE_SHORT[case.dtype], case.varlen or f"{batch}{length_label(case)}"


def _config(change: Change) -> str:
    def label(m: Measured) -> str:
        return m.label if m.config else "its own"

    if not change.old.config and not change.new.config:
        return ""
    same = change.old.config == change.new.config
    return label(change.new) if same else f"{label(change.old)} → {label(change.new)}"


def _percent(value: float) -> str:
    return f"{100 * value:+.1f}%"
