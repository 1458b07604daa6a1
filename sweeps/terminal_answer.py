"""The answer of a run as the terminal shows it: a block per model, window and precision, 80 columns wide."""

from __future__ import annotations

from collections import Counter

from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sweeps.cases import Case
from sweeps.select import CaseResult, Selection, config_label
from sweeps.tables import DTYPE_SHORT, answers, heads_label, mask_label, number

_WIDTHS = {"pass": 8, "tokens": 7, "best block sizes": 33, "ms": 7, "untuned": 7, "eager": 6, "flash": 6}
_NUMBERS = ("ms", "untuned", "eager", "flash")


def answer_blocks(selection: Selection) -> Group:
    """Per case our best configuration, its time, and how many times faster it is than each rival.

    A backward's parts, which only its own best pair is made of, are shown where the whole was not swept.
    """
    blocks: dict[str, list[CaseResult]] = {}
    for answer in answers(selection):
        for result in answer.family:
            blocks.setdefault(_heading(result), []).append(result)
    parts: list[Text | Table] = [Text("Best block sizes", style="bold"), _table(header=True)]
    for heading, results in blocks.items():
        table = _table(header=False)
        for result in results:
            table.add_row(*_cells(result))
        parts += [Text(heading, style="bold cyan"), table]
    parts.append(Text("untuned, eager, flash: that rival's time over ours", style="dim"))
    return Group(*parts)


def _heading(result: CaseResult) -> str:
    c = result.case
    name = f"{result.model} {heads_label(c)}" if result.model else heads_label(c)
    return f"{name}, {mask_label(c)}, {DTYPE_SHORT[c.dtype]}"


def _table(*, header: bool) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), show_header=header, header_style="bold")
    for name, width in _WIDTHS.items():
        right = name in _NUMBERS
        table.add_column(name, width=width, justify="right" if right else "left", overflow="fold", no_wrap=right)
    return table


def _lengths(case: Case) -> str:
    """In a few characters: 8192, 1/4096 (queries/keys), 2x1024 (batch), a varlen batch's name."""
    if case.varlen:
        return case.varlen
    one = str(case.seqlen_q) if case.seqlen_q == case.seqlen_k else f"{case.seqlen_q}/{case.seqlen_k}"
    return one if case.batch == 1 else f"{case.batch}x{one}"


def _cells(result: CaseResult) -> list[str]:
    best = result.best
    head = [result.case.pass_, _lengths(result.case)]
    if best is None:
        counts = Counter(row["status"] for row in result.own_rows)
        why = ", ".join(f"{n} {status}" for status, n in counts.most_common()) or "nothing of ours was run"
        return [*head, f"[red]none[/]: {escape(why)}", "", "", "", ""]
    label = config_label(best.config).replace(" | ", "\n")
    if best.impl != "triton":
        label = f"{best.impl}: {label}"
    speedups = (result.speedup(rival) for rival in (result.default, result.eager, result.flash))
    return [*head, escape(label), number(best.latency_ms, 4), *("" if s is None else f"{number(s)}x" for s in speedups)]
