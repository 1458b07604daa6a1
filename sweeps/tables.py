"""Markdown tables of a selection: what won, what everything takes, what failed and why."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from sweeps.cases import Case
from sweeps.registry import is_peer
from sweeps.select import CaseResult, Measured, Row, Selection, peer_order

PASS_ORDER = ("fwd", "bwd", "fwd_bwd", "bwd_dq", "bwd_dkdv")
DTYPE_SHORT = {"bfloat16": "bf16", "float16": "fp16"}
NONE = "-"
NOT_APPLICABLE = ("unavailable", "unsupported")     # statuses that say nothing went wrong

# The workloads every kernel with sinks is compared on: (name, heads_q, heads_kv, head_dim, seqlen, window, dtype).
WORKLOADS = (
    ("Qwen2.5-7B, window 256", 28, 4, 128, 4224, 256, "float16"),
    ("gpt-oss, causal", 64, 8, 64, 8192, None, "bfloat16"),
    ("gpt-oss, window 128", 64, 8, 64, 8192, 128, "bfloat16"),
    ("Llama-70B, causal", 64, 8, 128, 8192, None, "bfloat16"),
)


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> str:
    """A Markdown table, the first ``text_columns`` columns flush left and the others flush right."""
    def line(cells: Iterable[str]) -> str:
        return "| " + " | ".join(" ".join(str(c).split()).replace("|", "\\|") for c in cells) + " |"

    rule = ["---" if i < text_columns else "---:" for i in range(len(headers))]
    return "\n".join([line(headers), "|" + "|".join(rule) + "|", *map(line, rows)])


def number(value: float | None, digits: int = 3) -> str:
    """A number to ``digits`` significant digits without an exponent: 0.108, 1.92, 76.6, 1235."""
    if value is None:
        return NONE
    if value == 0:
        return "0"
    exponent = int(f"{value:.{digits - 1}e}".partition("e")[2])     # after rounding: 0.9999 is 1.00, not 1.000
    return f"{value:.{max(0, digits - 1 - exponent)}f}"


def times(value: float | None) -> str:
    """A speedup: 1.31x."""
    return NONE if value is None else f"{number(value)}x"


def percent(value: float | None) -> str:
    """A fraction as a percentage with one decimal."""
    return NONE if value is None else f"{100 * value:.1f}%"


def geometric_mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return math.exp(sum(map(math.log, values)) / len(values)) if values else None


def impl_order(impls: Iterable[str]) -> list[str]:
    """Ours first, then the peers in their usual order."""
    names = set(impls)
    ours = sorted((i for i in names if not is_peer(i)), key=lambda i: (i != "triton", i))
    return ours + peer_order(i for i in names if is_peer(i))


def heads_label(case: Case) -> str:
    """``64/8 x 64``, or ``64/8 x 192/128`` where the value head dim differs."""
    dim = f"{case.head_dim}" if case.head_dim == case.head_dim_v else f"{case.head_dim}/{case.head_dim_v}"
    return f"{case.heads_q}/{case.heads_kv} x {dim}"


def model_label(result: CaseResult) -> str:
    """``gpt-oss (64/8 x 64)``, or the shape alone for a case without a model."""
    return f"{result.model} ({heads_label(result.case)})" if result.model else heads_label(result.case)


def mask_label(case: Case) -> str:
    """``causal`` or ``window 128``, and that a case has no sinks."""
    return ("causal" if case.window is None else f"window {case.window}") + ("" if case.sinks else ", no sinks")


def length_label(case: Case) -> str:
    """The sequence length, ``1 of 4096`` for one query on 4096 keys, a varlen batch by its name."""
    if case.varlen:
        return f"{case.varlen} (varlen, {len(case.seqlens)} up to {case.seqlen_q})"
    return f"{case.seqlen_q}" if case.seqlen_q == case.seqlen_k else f"{case.seqlen_q} of {case.seqlen_k}"


def sort_key(result: CaseResult) -> tuple[object, ...]:
    """By model, precision, window and pass, and within those by length."""
    c = result.case
    return (result.gpu, result.model, c.heads_q, c.heads_kv, c.head_dim, c.head_dim_v, c.dtype, c.window is not None,
            c.window or 0, PASS_ORDER.index(c.pass_), c.varlen, c.batch, c.seqlen_q, c.seqlen_k, c.seed, c.sinks)


def grouped(results: Iterable[CaseResult], key: Callable[[CaseResult], object]) -> list[list[CaseResult]]:
    """Results of equal key together, groups and their members in the order of :func:`sort_key`."""
    groups: dict[object, list[CaseResult]] = {}
    for result in sorted(results, key=sort_key):
        groups.setdefault(key(result), []).append(result)
    return list(groups.values())


def family_key(result: CaseResult) -> tuple[object, ...]:
    """All of a case but its lengths: what one curve over the sequence length holds constant."""
    c = result.case
    return (result.gpu, result.model, c.heads_q, c.heads_kv, c.head_dim, c.head_dim_v, c.dtype, c.window, c.pass_,
            c.varlen, c.batch if not c.varlen else 0, c.sinks, None if c.seqlen_q == c.seqlen_k else c.seqlen_q)


def family_winners(family: Sequence[CaseResult]) -> list[tuple[str, list[CaseResult]]]:
    """The winners' labels over the lengths of a family, neighbours with the same one joined."""
    runs: list[tuple[str, list[CaseResult]]] = []
    for result in family:
        label = with_impl(result.best) if result.best else "no winner"
        if not runs or runs[-1][0] != label:
            runs.append((label, []))
        runs[-1][1].append(result)
    return runs


def lengths_span(results: Sequence[CaseResult]) -> str:
    """``4096``, or ``1024-4096``."""
    names = [length_label(r.case) for r in results]
    return names[0] if len(names) == 1 else f"{names[0]}-{names[-1]}"


def family_length(family: Sequence[CaseResult]) -> str:
    """The lengths of a family, and its batch where that is not 1: ``1024-4096``, ``4 x 2048``."""
    c = family[0].case
    return (f"{c.batch} x " if c.batch > 1 and not c.varlen else "") + lengths_span(family)


def family_configs(family: Sequence[CaseResult]) -> str:
    """The winners over the lengths of a family: ``64x32 w4 s3`` or ``64x32 w4 s3 (1024-4096); 64x64 w4 s3 (8192)``."""
    runs = family_winners(family)
    return runs[0][0] if len(runs) == 1 else "; ".join(f"{label} ({lengths_span(own)})" for label, own in runs)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a run says about one family: all of a case but its lengths.

    Attributes:
        family: its cases, by length.
        speedups: the geometric mean over the lengths of each rival's time over ours, by "eager", "flash", "default".
        clear, timed: in how many of the timed cases the winner stands alone.
        half_width: the median half width of the winners' intervals, relative; None where nothing was timed.
    """

    family: tuple[CaseResult, ...]
    speedups: Mapping[str, float | None]
    clear: int
    timed: int
    half_width: float | None


def answers(selection: Selection) -> list[Answer]:
    """One per family of whole passes; of the backward's parts only where the run has no whole backward."""
    whole = [r for r in selection.results if r.case.pass_ in ("fwd", "bwd", "fwd_bwd") and r.own_rows]
    covered = {r.case.shape_id for r in whole if r.case.pass_ == "bwd"}
    parts = [r for r in selection.results if r.case.pass_ in ("bwd_dq", "bwd_dkdv") and r.case.shape_id not in covered]
    found = []
    for family in grouped(whole + parts, family_key):
        timed = [r for r in family if r.best]
        widths = sorted(r.best.half_width for r in timed if r.best)
        speedups = {name: geometric_mean([s for r in timed if (s := r.speedup(r.rivals[name])) is not None])
                    for name in ("eager", "flash", "default")}
        found.append(Answer(tuple(family), speedups, sum(len(r.tied) == 1 for r in timed), len(timed),
                            widths[len(widths) // 2] if widths else None))
    return found


def answer_table(selection: Selection) -> str:
    """Per model, precision, window and pass: winners, mean speedups over the lengths, and how sure the choice is."""
    rows = []
    for a in answers(selection):
        first, c = a.family[0], a.family[0].case
        rows.append([
            model_label(first), c.pass_, DTYPE_SHORT[c.dtype], mask_label(c), family_length(a.family),
            family_configs(a.family), *(times(s) for s in a.speedups.values()), f"{a.clear} of {a.timed}",
            NONE if a.half_width is None else f"±{percent(a.half_width)}"])
    return markdown(["model (heads x dim)", "pass", "dtype", "mask", "length", "best block sizes", "vs eager",
                     "vs flash", "vs untuned", "clear winners", "interval"], rows, text_columns=6)


def best_table(selection: Selection) -> str:
    """The best configuration of every case, with its time, its certainty and its rivals."""
    rows = []
    for r in sorted(selection.results, key=sort_key):
        if not r.own_rows:
            continue
        head = [model_label(r), r.case.pass_, DTYPE_SHORT[r.case.dtype], mask_label(r.case), f"{r.case.batch}",
                length_label(r.case)]
        if r.best is None:
            rows.append([*head, "no candidate was ok", *[NONE] * 8])
            continue
        rows.append(head + [
            with_impl(r.best), f"{number(r.best.latency_ms, 4)} ±{percent(r.best.half_width)}",
            number(r.best.row.get("tflops")), f"{percent(r.margin[0])}" if r.margin else NONE, f"{len(r.tied)}",
            times(r.speedup(r.eager)), times(r.speedup(r.flash)), times(r.speedup(r.default)),
            f"{r.best_peer.impl} {number(r.best_peer.latency_ms, 4)}" if r.best_peer else NONE])
    return markdown(["model (heads x dim)", "pass", "dtype", "mask", "batch", "length", "best config", "ms", "TFLOP/s",
                     "runner-up", "tied", "vs eager", "vs flash", "vs untuned", "best peer, ms"], rows, text_columns=7)


def with_impl(m: Measured) -> str:
    """A configuration with the implementation it is of, where that is not the portable one."""
    return m.label if m.impl == "triton" else f"{m.impl}: {m.label}"


def fastest_of_each(result: CaseResult) -> dict[str, Measured]:
    """The fastest ok row of every implementation."""
    found = dict(result.peers)
    for m in reversed(result.ranked):
        found[m.impl] = m
    return found


def implementation_tables(selection: Selection, metric: str) -> str:
    """``latency_ms`` or ``tflops`` of every implementation over the sequence length, one table per model and precision.

    The best of a row is bold. Where an implementation has no time its status stands, or a dash where it is not
    installed or cannot do the case. Parts of the backward have no peers and are left out.
    """
    parts = []
    whole = [r for r in selection.results if r.case.pass_ not in ("bwd_dq", "bwd_dkdv")]
    for group in grouped(whole, lambda r: family_key(r)[:7]):
        impls = impl_order(row["impl"] for r in group for row in r.rows if row["status"] not in NOT_APPLICABLE)
        rows = []
        for r in group:
            values = {i: m.row.get(metric) for i, m in fastest_of_each(r).items()}
            known = [v for v in values.values() if v is not None]
            top = None if not known else min(known) if metric == "latency_ms" else max(known)
            rows.append([r.case.pass_, mask_label(r.case), f"{r.case.batch}", length_label(r.case)]
                        + [_cell(r, i, values.get(i), top) for i in impls])
        title = f"**{model_label(group[0])}, {DTYPE_SHORT[group[0].case.dtype]}**"
        parts.append(f"{title}\n\n{markdown(['pass', 'mask', 'batch', 'length', *impls], rows, text_columns=4)}")
    return "\n\n".join(parts)


def _cell(result: CaseResult, impl: str, value: float | None, top: float | None) -> str:
    if value is not None:
        text = number(value, 4)
        return f"**{text}**" if value == top else text
    statuses = {row["status"] for row in result.rows if row["impl"] == impl} - set(NOT_APPLICABLE)
    return statuses.pop() if len(statuses) == 1 else ("failed" if statuses else NONE)


@dataclasses.dataclass(frozen=True)
class FailureGroup:
    """Rows that ended in the same way, for the same kind of reason; ``message`` is the first one's."""

    status: str
    impls: tuple[str, ...]
    passes: tuple[str, ...]
    message: str
    count: int

    @property
    def harmless(self) -> bool:
        """Nothing went wrong: it was never going to run here."""
        return self.status in NOT_APPLICABLE


def failure_groups(selection: Selection) -> list[FailureGroup]:
    """Rows that are not ok, by status and kind of message; what cannot run here at all comes last."""
    groups: dict[tuple[bool, str, str], list[Row]] = {}
    for row in selection.rows:
        if row["status"] != "ok":
            kind = str(row.get("message") or "").replace(row["impl"], "")
            kind = re.sub(r"\d+(\.\d+)?(e[+-]?\d+)?", "#", kind)[:160]
            groups.setdefault((row["status"] in NOT_APPLICABLE, row["status"], kind), []).append(row)
    return [FailureGroup(status, tuple(impl_order(r["impl"] for r in rows)),
                         tuple(sorted({r["pass"] for r in rows}, key=PASS_ORDER.index)),
                         str(rows[0].get("message") or ""), len(rows))
            for (_, status, _), rows in sorted(groups.items(), key=lambda g: (g[0][:2], -len(g[1]), g[0]))]


def failure_table(selection: Selection) -> str:
    """:func:`failure_groups` as a table."""
    groups = failure_groups(selection)
    if not groups:
        return "Every trial was ok."
    lines = [[g.status, ", ".join(g.impls), ", ".join(g.passes), shorten(g.message), f"{g.count}"] for g in groups]
    return markdown(["status", "implementation", "pass", "message (of the first)", "trials"], lines, text_columns=4)


def shorten(message: str, limit: int = 200) -> str:
    """One line of at most ``limit`` characters."""
    text = " ".join(message.split())
    return text if len(text) <= limit else text[:limit - 1] + "…"


def workload_board(selection: Selection) -> str:
    """Our best row beside every peer's on the common workloads, both passes; "" where the run has none of them."""
    found = [(name, r) for name, *shape in WORKLOADS for pass_ in ("fwd", "bwd") for r in selection.results
             if r.case.pass_ == pass_ and r.case.batch == 1 and not r.case.varlen and r.case.sinks
             and shape == [r.case.heads_q, r.case.heads_kv, r.case.head_dim, r.case.seqlen_q, r.case.window,
                           r.case.dtype]
             and r.case.seqlen_k == r.case.seqlen_q and r.case.head_dim_v == r.case.head_dim]
    if not found:
        return ""
    impls = timed_impls([r for _, r in found])
    rows, marked = [], False
    for name, r in found:
        cells, no_sink = time_cells(r, impls)
        marked |= no_sink
        rows.append([name, r.case.pass_, DTYPE_SHORT[r.case.dtype], *cells, times(r.speedup(r.best_peer)),
                     with_impl(r.best) if r.best else NONE])
    table = markdown(["workload", "pass", "dtype", *impls, "best peer / ours", "our config"], rows, text_columns=3)
    note = NO_SINK if marked else ""
    return f"Device time in ms, batch 1; the fastest that applies the sink is bold.\n\n{table}{note}"


NO_SINK = "\n\n\\* without the sink, which this peer does not apply."


def timed_impls(results: Sequence[CaseResult]) -> list[str]:
    """The implementations that have a time in one of the results, in their usual order."""
    return [i for i in impl_order(row["impl"] for r in results for row in r.rows)
            if any(i in fastest_of_each(r) for r in results)]


def time_cells(result: CaseResult, impls: Sequence[str]) -> tuple[list[str], bool]:
    """Every implementation's time, bold the fastest that applies the sink; whether one is marked that does not."""
    values, marked, cells = fastest_of_each(result), False, []
    top = min((m.latency_ms for m in values.values() if m.row.get("applies_sink")), default=None)
    for impl in impls:
        m = values.get(impl)
        no_sink = m is not None and not m.row.get("applies_sink")
        marked |= no_sink
        cell = _cell(result, impl, m.latency_ms if m else None, None if no_sink else top)
        cells.append(cell + "*" if no_sink else cell)
    return cells, marked
