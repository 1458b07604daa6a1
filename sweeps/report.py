"""Files in, tables, plots, report.md and report.html out. Reads a run directory and nothing else; touches no GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.devices import find_card
from sweeps.html_report import MissingPackages, check_packages, run_page
from sweeps.overview import INTERPRETER_WARNING, counts_line, headline, provenance
from sweeps.plots import write_plots
from sweeps.select import Selection, select_run, write_best_csv
from sweeps.sittings import sitting_lines
from sweeps.store import read_environment, read_sittings, write_results_csv
from sweeps.tables import (
    answer_table,
    best_table,
    failure_table,
    implementation_tables,
    markdown,
    workload_board,
)

READING = (
    "**ms**: median device time with a cold L2 cache, ± half the 95% interval of the median. **TFLOP/s**: useful FLOPs "
    "per second of it.",
    "**vs eager**, **vs flash**, **vs untuned**: that rival's time over ours in the same run, above 1 = ours is "
    "faster. Flash is the fastest FlashAttention or cuDNN row whose result contains the sink; untuned is our own "
    "heuristic without a tuned table.",
    "**runner-up**: how much slower the second best configuration is. **tied**: configurations whose interval overlaps "
    "the winner's, itself included; 1 is a clear winner.",
    "A configuration reads BLOCK_M x BLOCK_N, w = num_warps, s = num_stages, pack = PACK_GQA, oneloop = SPLIT_LOOPS "
    "off, r = maxnreg, tma = TMA, rega = REGISTER_A, tail = TAIL_N, branch = BRANCH_MASKS; of the Hopper kernels "
    "q = Q_STAGES, h = HEADS, shareq = SHARE_Q, p = PROGRAMS_PER_SM, pack with a number = PACK_HEADS, alone = LOADER "
    "off, form = FORM, b = BUFFERS, split = SPLIT_GROUP, det = DETERMINISTIC. A portable backward has two kernels, dq "
    "and dkdv, tuned alone and then timed as a pair.",
    "Everything is in results.csv (a row per trial) and best.csv (a row per case).",
)


def write_report(run_dir: Path) -> str:
    """Rebuild everything that is derived from a run's log.

    Writes results.csv (speedups filled), best.csv, tables/*.md, plots/*.png and *.svg, report.md and, where the
    packages of the extra "report" are installed, report.html into ``run_dir``. May be called while the run is going
    on, and again.

    Args:
        run_dir: a run directory, see ``sweeps.store``.

    Returns:
        "" or, where report.html could not be written, why and what writes it later; an earlier one is removed then.

    Raises:
        StoreError: it is not one, or a file cannot be written.
    """
    run_dir = Path(run_dir)
    env = read_environment(run_dir)
    everything = select_run(run_dir)
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
    name, sittings = run_dir.resolve().name, read_sittings(run_dir)
    (run_dir / "report.md").write_text(_report(name, env, selection, tables, plots, others, sittings))
    page = run_dir / "report.html"
    try:
        check_packages(run_dir)
    except MissingPackages as missing:
        page.unlink(missing_ok=True)
        return str(missing)
    reading = [line.replace("**", "") for line in READING]
    page.write_text(run_page(name, env, selection, card, sittings, reading, others), encoding="utf-8")
    return ""


def _report(name: str, env: Mapping[str, Any], selection: Selection, tables: Mapping[str, str],
            plots: Sequence[Path], others: Sequence[str], sittings: Sequence[Mapping[str, Any]]) -> str:
    def images(prefix: str) -> str:
        return "\n\n".join(f"![{p.stem.replace('-', ' ')}](plots/{p.name})" for p in plots if p.stem.startswith(prefix))

    def folded(title: str, body: str) -> str:
        return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"

    overview = "\n\n".join(f"![{p.stem}](plots/{p.name})" for p in plots if p.stem == "speedup")
    facts = provenance(env, selection)
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
        ("Where the time went", sitting_lines(sittings)),
        ("What did not work", (tables["failures"],)),
        ("How to read it", ("\n".join(f"- {line}" for line in READING),)),
        ("Provenance", (markdown(["", ""], [list(item) for item in facts.items()], text_columns=2),)),
    ]
    head = [f"# {name}", f"{env['gpu']}, {env.get('started') or 'date unknown'}. {counts_line(selection)}"]
    if others:
        head.append(f"Rows of {', '.join(others)} in this directory are in results.csv and best.csv only.")
    if env["gpu"] == "cpu":
        head.insert(1, f"> **{INTERPRETER_WARNING}.** They are here to show that everything works.")
    body = [f"## {title}\n\n" + "\n\n".join(parts) for title, texts in sections if (parts := [t for t in texts if t])]
    return "\n\n".join([*head, *body]) + "\n"
