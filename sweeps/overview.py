"""A run in a few words and facts: what every report says first and last, whatever it is written in."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from sweeps.columns import WHOLE_PASSES
from sweeps.select import CaseResult, Selection
from sweeps.tables import geometric_mean, number, percent

INTERPRETER_WARNING = "Triton's interpreter on a CPU: these times mean nothing"
RIVALS = {"eager": "eager", "flash": "the best of FlashAttention and cuDNN with the sink",
          "default": "the untuned heuristic"}


@dataclasses.dataclass(frozen=True)
class Speedup:
    """Ours against one rival over the cases of a pass: geometric mean and range of its time over ours."""

    rival: str
    mean: float
    low: float
    high: float
    cases: int


@dataclasses.dataclass(frozen=True)
class PassSummary:
    """A pass in numbers: in ``won`` of ``against`` cases ours is the fastest of all that apply the sink."""

    pass_: str
    cases: int
    speedups: tuple[Speedup, ...]
    won: int
    against: int


@dataclasses.dataclass(frozen=True)
class Certainty:
    """How sure the choices are: clear winners of the timed cases, and the median half width of the winners' times."""

    clear: int
    cases: int
    half_width: float


def pass_summaries(selection: Selection) -> list[PassSummary]:
    """One for each of WHOLE_PASSES that has a winner."""
    found = []
    for pass_ in WHOLE_PASSES:
        results = [r for r in selection.results if r.case.pass_ == pass_ and r.best]
        if not results:
            continue
        against = [s for r in results if (s := r.speedup(r.best_peer)) is not None]
        speedups = [x for name in RIVALS if (x := _speedup(results, name)) is not None]
        found.append(PassSummary(pass_, len(results), tuple(speedups), sum(s >= 1 for s in against), len(against)))
    return found


def _speedup(results: Sequence[CaseResult], rival: str) -> Speedup | None:
    values = [s for r in results if (s := r.speedup(r.rivals[rival])) is not None]
    mean = geometric_mean(values)
    return None if mean is None else Speedup(rival, mean, min(values), max(values), len(values))


def certainty(selection: Selection) -> Certainty | None:
    """None where no case has a winner."""
    timed = [r for r in selection.results if r.best]
    widths = sorted(r.best.half_width for r in timed if r.best)
    if not timed:
        return None
    return Certainty(sum(len(r.tied) == 1 for r in timed), len(timed), widths[len(widths) // 2])


def without_winner(selection: Selection) -> list[CaseResult]:
    """Cases in which candidates of ours were tried and none was ok."""
    return [r for r in selection.results if r.own_rows and not r.best]


def headline(selection: Selection) -> str:
    """The answer in a few lines of Markdown: per pass how much faster than each rival, and how sure the choices are."""
    lines = []
    for p in pass_summaries(selection):
        said = [f"{number(s.mean)}x as fast as {RIVALS[s.rival]}"
                + ("" if s.cases == 1 else f" ({number(s.low)}x to {number(s.high)}x)") for s in p.speedups]
        first = f"; fastest of all that apply the sink in {p.won} of {count(p.against, 'case')}" if p.against else ""
        lines.append(f"- **{p.pass_}** ({count(p.cases, 'case')}): {', '.join(said) or 'no rival was timed'}{first}.")
    sure = certainty(selection)
    if sure:
        lines.append(f"- **How sure**: a clear winner in {sure.clear} of {count(sure.cases, 'case')}, a tie in the "
                     f"others; the winners' times are known to ±{percent(sure.half_width)} in the median.")
    lost = without_winner(selection)
    if lost:
        lines.append(f"- **No winner** in {count(len(lost), 'case')}: " + ", ".join(f"`{r.case.id}`" for r in lost[:5])
                     + (" ..." if len(lost) > 5 else "") + ".")
    return "\n".join(lines) or "No candidate was timed."


def counts_line(selection: Selection) -> str:
    """How many cases and trials there were, and how these ended."""
    counts = Counter(r["status"] for r in selection.rows)
    ended = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    return f"{count(len(selection.results), 'case')}, {count(len(selection.rows), 'trial')}: {ended or 'none'}."


def count(n: int, what: str) -> str:
    """``1 case``, ``2 cases``."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def provenance(env: Mapping[str, Any], selection: Selection) -> dict[str, str]:
    """Card, driver, versions and sources that the numbers depend on, by name; what is not known is left out."""
    commit = env.get("git_commit")
    dirty = " with local changes" if env.get("git_dirty") else ""
    memory = env.get("memory_bytes")
    facts = {
        "GPU": env["gpu"], "SMs": env.get("sm_count"), "memory": f"{memory / 2**30:.1f} GiB" if memory else None,
        "driver": env.get("driver"), "CUDA": env.get("cuda"), "torch": env.get("torch"), "triton": env.get("triton"),
        "python": env.get("python"), "peers": _versions(env.get("packages")),
        "Triton environment": _versions(env.get("triton_env")),
        "commit": f"{commit[:12]}{dirty}" if commit else None, "kernel sources": env.get("kernel_source"),
        "timing": env.get("timing_mode"), "other environments in this directory": len(env.get("earlier") or []) or None,
    }
    versions: dict[str, Mapping[str, Any]] = {r["impl"]: r["versions"] for r in selection.rows if r.get("versions")}
    facts |= {f"version of {impl}": _versions(v) for impl, v in sorted(versions.items())}
    return {k: str(v) for k, v in facts.items() if v}


def _versions(packages: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted((packages or {}).items()))
