"""Files in, tables, plots and report.md out. Reads a run directory and nothing else; touches no GPU."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.devices import find_card
from sweeps.plots import write_plots
from sweeps.select import CaseResult, Selection, select, write_best_csv
from sweeps.store import read_environment, read_rows, write_results_csv
from sweeps.tables import (
    answer_table,
    best_table,
    failure_table,
    geometric_mean,
    implementation_tables,
    markdown,
    number,
    percent,
    workload_board,
)

INTERPRETER_WARNING = "Triton's interpreter on a CPU: these times mean nothing"

_RIVALS = {"eager": "eager", "flash": "the best of FlashAttention and cuDNN with the sink",
           "default": "the untuned heuristic"}

_READING = """\
- **ms**: median device time with a cold L2 cache, ± half the 95% interval of the median. **TFLOP/s**: useful FLOPs per
  second of it.
- **vs eager**, **vs flash**, **vs untuned**: that rival's time over ours in the same run, above 1 = ours is faster.
  Flash is the fastest FlashAttention or cuDNN row whose result contains the sink; untuned is our own heuristic without
  a tuned table.
- **runner-up**: how much slower the second best configuration is. **tied**: configurations whose interval overlaps the
  winner's, itself included; 1 is a clear winner.
- A configuration reads BLOCK_M x BLOCK_N, w = num_warps, s = num_stages, pack = PACK_GQA, oneloop = SPLIT_LOOPS off,
  r = maxnreg, tma = TMA. A backward has two kernels, dq and dkdv, tuned alone and then timed as a pair.
- Everything is in results.csv (a row per trial) and best.csv (a row per case)."""


def write_report(run_dir: Path) -> None:
    """Rebuild everything that is derived from a run's log.

    Writes results.csv (speedups filled), best.csv, tables/*.md, plots/*.png and report.md into ``run_dir``. May be
    called while the run is going on, and again.

    Args:
        run_dir: a run directory, see ``sweeps.store``.

    Raises:
        StoreError: it is not one, or a file cannot be written.
    """
    run_dir = Path(run_dir)
    env = read_environment(run_dir)
    everything = select(read_rows(run_dir))
    interpreter = env["gpu"] == "cpu"
    write_results_csv(run_dir, everything.rows)
    write_best_csv(everything, run_dir / "best.csv")
    selection = everything.on(env["gpu"])
    tables = {
        "answer": answer_table(selection), "workloads": workload_board(selection), "best": best_table(selection),
        "latency": implementation_tables(selection, "latency_ms"),
        "tflops": implementation_tables(selection, "tflops"), "failures": failure_table(selection),
    }
    (run_dir / "tables").mkdir(exist_ok=True)
    for name, text in tables.items():
        path = run_dir / "tables" / f"{name}.md"
        if text:
            path.write_text(text + "\n")
        else:
            path.unlink(missing_ok=True)
    card = None if interpreter else find_card(env["gpu"], env.get("sm_count"))
    plots = write_plots(selection, card, run_dir / "plots", warning=INTERPRETER_WARNING if interpreter else "")
    others = sorted({r.gpu for r in everything.results} - {env["gpu"]})
    (run_dir / "report.md").write_text(_report(run_dir.resolve().name, env, selection, tables, plots, others))


def _report(name: str, env: Mapping[str, Any], selection: Selection, tables: Mapping[str, str],
            plots: Sequence[Path], others: Sequence[str]) -> str:
    def images(prefix: str) -> str:
        return "\n\n".join(f"![{p.stem.replace('-', ' ')}](plots/{p.name})" for p in plots if p.stem.startswith(prefix))

    def folded(title: str, body: str) -> str:
        return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"

    overview = "\n\n".join(f"![{p.stem}](plots/{p.name})" for p in plots if p.stem == "speedup")
    sections: list[tuple[str, Sequence[str]]] = [
        ("Best block sizes", (headline(selection), tables["answer"], overview)),
        ("Common workloads, ours beside every peer", (tables["workloads"],)),
        ("Over the sequence length", (
            images("latency"), folded("Device time in ms, per implementation", tables["latency"]),
            folded("TFLOP/s, per implementation", tables["tflops"]))),
        ("Under the roofline", (images("roofline"),)),
        ("Speedups case by case", (images("speedup-"),)),
        ("Best configuration of every case", (tables["best"],)),
        ("Over the block sizes", (images("tiles"),)),
        ("What did not work", (tables["failures"],)),
        ("How to read it", (_READING,)),
        ("Provenance", (provenance_table(env, selection),)),
    ]
    head = [f"# {name}", f"{env['gpu']}, {env.get('started') or 'date unknown'}. {counts_line(selection)}"]
    if others:
        head.append(f"Rows of {', '.join(others)} in this directory are in results.csv and best.csv only.")
    if env["gpu"] == "cpu":
        head.insert(1, f"> **{INTERPRETER_WARNING}.** They are here to show that everything works.")
    body = [f"## {title}\n\n" + "\n\n".join(parts) for title, texts in sections if (parts := [t for t in texts if t])]
    return "\n\n".join([*head, *body]) + "\n"


def counts_line(selection: Selection) -> str:
    """How many cases and trials there were, and how these ended."""
    counts = Counter(r["status"] for r in selection.rows)
    ended = ", ".join(f"{n} {status}" for status, n in counts.most_common())
    return f"{_count(len(selection.results), 'case')}, {_count(len(selection.rows), 'trial')}: {ended or 'none'}."


def headline(selection: Selection) -> str:
    """The answer in a few lines: per pass how much faster than each rival, and how sure the choices are."""
    lines = []
    for pass_ in ("fwd", "bwd", "fwd_bwd"):
        results = [r for r in selection.results if r.case.pass_ == pass_ and r.best]
        if not results:
            continue
        said = [text for name, rival in _RIVALS.items() if (text := _speedup_text(results, name, rival))]
        against = [s for r in results if (s := r.speedup(r.best_peer)) is not None]
        won = sum(s >= 1 for s in against)
        of = _count(len(against), "case")
        first = f"; fastest of all that apply the sink in {won} of {of}" if against else ""
        lines.append(f"- **{pass_}** ({_count(len(results), 'case')}): "
                     f"{', '.join(said) or 'no rival was timed'}{first}.")
    timed = [r for r in selection.results if r.best]
    if timed:
        clear = sum(len(r.tied) == 1 for r in timed)
        widths = sorted(r.best.half_width for r in timed if r.best)
        lines.append(f"- **How sure**: a clear winner in {clear} of {_count(len(timed), 'case')}, a tie in the others; "
                     f"the winners' times are known to ±{percent(widths[len(widths) // 2])} in the median.")
    lost = [r for r in selection.results if r.own_rows and not r.best]
    if lost:
        lines.append(f"- **No winner** in {_count(len(lost), 'case')}: " + ", ".join(f"`{r.case.id}`" for r in lost[:5])
                     + (" ..." if len(lost) > 5 else "") + ".")
    return "\n".join(lines) or "No candidate was timed."


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _speedup_text(results: Sequence[CaseResult], name: str, rival: str) -> str:
    values = [s for r in results if (s := r.speedup(r.rivals[name])) is not None]
    if not values:
        return ""
    spread = "" if len(values) == 1 else f" ({number(min(values))}x to {number(max(values))}x)"
    return f"{number(geometric_mean(values))}x as fast as {rival}{spread}"


def provenance_table(env: Mapping[str, Any], selection: Selection) -> str:
    """Card, driver, versions and sources that the numbers depend on."""
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
    return markdown(["", ""], [[k, str(v)] for k, v in facts.items() if v], text_columns=2)


def _versions(packages: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {version}" for name, version in sorted((packages or {}).items()))
