"""The command line: ``python run_sweep.py [CONFIG.yaml]`` and ``python -m sweeps run|doctor|report|export``.

Exit codes: 0 done; 1 the run could not go on; 2 a bad config or command line; 3 the config is made for another card;
130 interrupted.
"""

from __future__ import annotations

import functools
import os
import shlex
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.tuned_table import ENV_VAR
from sweeps.auto import choose_config
from sweeps.carried_cache import describe as describe_cache
from sweeps.carried_cache import report as report_cache
from sweeps.compile_table import card_name as spec_card
from sweeps.compile_table import write as write_compile_table
from sweeps.console import (
    RunProgress,
    build_table,
    counts_line,
    facts_table,
    implementation_table,
    make_console,
    plan_table,
    print_all,
    time_lines,
)
from sweeps.devices import find_card
from sweeps.doctor import diagnose
from sweeps.duels import duels_round
from sweeps.environment import environment
from sweeps.export import export as export_run
from sweeps.export import exported_line
from sweeps.finals import finals_round
from sweeps.judging_cli import add_commands as add_judging_commands
from sweeps.measuring_cli import add_commands as add_measuring_commands
from sweeps.models import ModelError, read_model
from sweeps.plan import Plan, make_plan
from sweeps.predict import history, machine_of, predict
from sweeps.registry import load
from sweeps.report import write_report
from sweeps.reporting_commands import board_command, compare_command, packed_command, report_command
from sweeps.runner import Phase, RunError, RunSummary
from sweeps.runner import run as run_trials
from sweeps.search import Search, exhaustive_line, from_exhaustive, read_records, write_record
from sweeps.select import select_run
from sweeps.spec import SweepSpec
from sweeps.specfile import SpecError, dump_spec, load_spec
from sweeps.store import StoreError, new_run_dir, read_environment, read_rows
from sweeps.strategies import STRATEGIES
from sweeps.terminal_answer import answer_blocks
from sweeps.tune import read_numbers, tune_spec

BAD_RUN, BAD_CONFIG, WRONG_CARD, INTERRUPTED = 1, 2, 3, 130
RESULTS = Path("results")
AUTO = Path("auto")

# \b keeps typer from joining the lines of a paragraph.
_EXAMPLES = """Examples:

\b
  python run_sweep.py auto                                       the config made for this machine
  python run_sweep.py configs/quick.yaml                         a first look on any CUDA card, under two minutes
  python run_sweep.py configs/cpu.yaml                           without a GPU: the whole job in Triton's interpreter
  python run_sweep.py configs/h100.yaml --dry-run                what would run
  python run_sweep.py configs/h100.yaml --limit 5                five minutes of it ...
  python run_sweep.py --resume results/h100/20250101T000000Z-h100   ... and the rest
  python run_sweep.py configs/h100.yaml --only 'fwd-*-w128'      forward cases with window 128
  python run_sweep.py configs/h100.yaml --set 'shapes.window=[256]' --set timing.precision=0.005
  python run_sweep.py configs/h100.yaml --set implementations.upstream.path=~/flash_sink_attn
  python run_sweep.py configs/h100.yaml --budget 2               search for two minutes instead of trying everything
  python run_sweep.py configs/h100.yaml --compile-only           without a GPU: registers, spills, bounds, a full cache
"""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    help="Sweeps the kernels of flash_sink_attn and names the best block sizes.",
    pretty_exceptions_enable=False,
)


@app.command(epilog=_EXAMPLES)
def run(
    config: Annotated[
        Path | None,
        typer.Argument(
            metavar="CONFIG.yaml",
            help="The sweep to run; see configs/. auto, or nothing: the one made for this machine.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write the run to DIR itself instead of results/<gpu>/<utc>-<name>."),
    ] = None,
    resume: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Go on with the run in DIR; CONFIG.yaml may be left out.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would run and how long it takes, and stop.")
    ] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="GLOB",
            help="Only cases, implementations, impl/case or models that match, such as 'fwd-*', 'fa3' or 'gpt-oss'.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Replace a value of the config, such as shapes.window=[256]; may be repeated.",
        ),
    ] = None,
    limit: Annotated[
        float | None, typer.Option(metavar="MINUTES", min=0.0, help="Begin no trial after this time.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(metavar="MINUTES", min=0.0, help="Search for so long instead of trying every candidate."),
    ] = None,
    strategy: Annotated[
        str, typer.Option(metavar="NAME", help=f"With --budget: {', '.join(STRATEGIES)}.")
    ] = "tpe",
    any_gpu: Annotated[bool, typer.Option("--any-gpu", help="Run a config on a card it is not made for.")] = False,
    compile_only: Annotated[
        bool,
        typer.Option(
            "--compile-only", help="Build every candidate for the config's card without a GPU, and time nothing."
        ),
    ] = False,
    retry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="STATUS", help="With --resume: try rows of this status again, such as crashed; may be repeated."
        ),
    ] = None,
) -> None:
    """Run a sweep: trial log, results.csv, best.csv, tables and plots."""
    console = make_console()
    env = environment()
    if config == AUTO or (config is None and resume is None):
        config = _chosen(console, env["gpu"])
    spec = _read_spec(config, resume, out, set_ or [])
    on_card = not compile_only
    if not spec.device.measured:
        console.print(f"[yellow]Nobody has run this config on its card yet ({spec.device.name}).[/]", highlight=False)
    refusal = spec.device.refusal(env["gpu"]) if on_card and not any_gpu else None
    if refusal and not dry_run:
        _fail(
            WRONG_CARD,
            f"{refusal}. --any-gpu runs it all the same"
            + (
                ", --compile-only builds it without a GPU, configs/cpu.yaml is made for the interpreter."
                if env["gpu"] == "cpu"
                else ", configs/quick.yaml is made for any CUDA card."
            ),
        )
    arch = env["arch"] if on_card and env["arch"] and not refusal else spec.device.compile_arch
    plan = _make_plan(spec, arch, only)
    _announce(console, spec, plan, env, refusal)
    if dry_run:
        for line in _predicted(spec, plan, env if on_card and not refusal else {}):
            console.print(escape(line), highlight=False, soft_wrap=True)
        return
    gpu = gpu_slug(env["gpu"]) if on_card else f"compiled-{gpu_slug(spec.device.name or f'sm{arch}')}"
    run_dir = resume or out or new_run_dir(RESULTS, gpu, spec.name)
    search = _search(plan, budget, strategy, env, run_dir) if budget is not None and on_card else None
    again = _command(run_dir, only, any_gpu, compile_only)
    if search and budget is not None:
        again += f" --budget {budget:g} --strategy {strategy}"
    summary = _run_trials(console, spec, plan, run_dir, limit, tuple(retry or ()), compile_only, again, search)
    if search and budget is not None:
        write_record(run_dir, search, read_rows(run_dir), strategy, budget)
        console.print(search.coverage(read_rows(run_dir)).line(), highlight=False, soft_wrap=True)
    _finish(console, summary, compile_only, again)


@app.command()
def doctor() -> None:
    """Say what this machine has (GPU, driver, versions, peers) and what it can run."""
    console = make_console()
    found = diagnose()
    versions = {name: " ".join(f"{k} {v}" for k, v in own.items()) for name, (_, own) in found.implementations.items()}
    print_all(
        console,
        [
            facts_table("This machine", found.machine),
            implementation_table({name: reason for name, (reason, _) in found.implementations.items()}),
            facts_table("Versions", {name: text for name, text in versions.items() if text}),
        ],
    )
    console.print("What it can run:", *found.advice, sep="\n  ", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(0 if found.healthy else BAD_RUN)


app.command("report")(report_command)
app.command("board")(board_command)
app.command("packed")(packed_command)
app.command("compare")(compare_command)


@app.command()
def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
    to: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: flash_sink_attn/tuned/<gpu>.json.")] = None,
) -> None:
    """Write the best block sizes of a run into the tuned table that the kernel reads."""
    try:
        done = export_run(run_dir, to)
    except (StoreError, OSError, ValueError) as error:
        _fail(BAD_RUN, str(error))
    typer.echo(exported_line(done))


@app.command()
def tune(
    model: Annotated[
        str,
        typer.Option(metavar="CONFIG.json|PRESET", help="A Transformers config file, or a preset such as gpt-oss."),
    ],
    seqlens: Annotated[str, typer.Option(metavar="N,N...", help="Tokens; default 8192,2048,4096,1024.")] = "",
    windows: Annotated[str, typer.Option(metavar="N,N...", help="In place of the model's; none = causal only.")] = "",
    minutes: Annotated[float | None, typer.Option(metavar="N", min=0.0, help="Begin no trial after this time.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The table; default flash_sink_attn/tuned/<gpu>.json.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run, and stop.")] = False,
) -> None:
    """Find the block sizes of one model on this card and let the kernel use them."""
    console = make_console()
    env = environment()
    try:
        lengths = tuple(n for n in read_numbers("--seqlens", seqlens) if n is not None)
        spec = tune_spec(read_model(model), lengths, read_numbers("--windows", windows))
    except ModelError as error:
        _fail(BAD_CONFIG, str(error))
    refusal = spec.device.refusal(env["gpu"])
    if refusal and not dry_run:
        _fail(WRONG_CARD, f"{refusal}: the interpreter's times say nothing about a GPU.")
    plan = _make_plan(spec, env["arch"] or spec.device.compile_arch, None)
    _announce(console, spec, plan, env, refusal)
    if dry_run:
        return
    run_dir = new_run_dir(RESULTS, gpu_slug(env["gpu"]), spec.name)
    again = _command(run_dir, None, False, False)
    _finish(console, _run_trials(console, spec, plan, run_dir, minutes, (), False, again), False, again)
    try:
        done = export_run(run_dir, out)
    except (StoreError, OSError, ValueError) as error:
        _fail(BAD_RUN, f"{error}\nthe run is in {run_dir}; python -m sweeps export {run_dir} --to FILE")
    typer.echo(exported_line(done))
    if out is not None:
        typer.echo(f"the kernel uses it with {ENV_VAR}={out}")


add_judging_commands(app)
add_measuring_commands(app)


def main() -> None:
    """``python -m sweeps``."""
    app(prog_name="python -m sweeps")


def run_main() -> None:
    """``python run_sweep.py``: the command run by itself."""
    alone = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    alone.command(epilog=_EXAMPLES)(run)
    alone(prog_name="python run_sweep.py")


def _fail(code: int, message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)


def _chosen(console: Console, gpu: str) -> Path:
    """The machine's own config, saying which and why."""
    try:
        config, why = choose_config(gpu)
    except FileNotFoundError as error:
        _fail(BAD_CONFIG, str(error))
    console.print(f"auto: {escape(os.path.relpath(config))}, since {escape(why)}", highlight=False, soft_wrap=True)
    return config


def _read_spec(config: Path | None, resume: Path | None, out: Path | None, overrides: list[str]) -> SweepSpec:
    if resume is not None and out is not None:
        _fail(BAD_CONFIG, "--out: expected either --out or --resume, got both")
    if resume is not None and not (resume / "trials.jsonl").is_file():
        _fail(BAD_CONFIG, f"--resume: expected the directory of a run, got {resume}")
    if out is not None and (out / "trials.jsonl").is_file():
        _fail(BAD_CONFIG, f"--out: {out} holds a run already; --resume {out} goes on with it")
    source = config if config is not None else (resume or Path()) / "spec.yaml"
    try:
        return load_spec(source, overrides)
    except SpecError as error:
        _fail(BAD_CONFIG, str(error))


def _make_plan(spec: SweepSpec, arch: int, only: str | None) -> Plan:
    try:
        plan = make_plan(spec, arch, only=only)
    except (ValueError, ImportError, TypeError) as error:
        _fail(BAD_CONFIG, f"implementations: {error}")
    if not plan.first and not plan.wholes:
        _fail(BAD_CONFIG, f"--only: {only!r} matches no case, implementation or model of the config")
    return plan


def _command(run_dir: Path, only: str | None, any_gpu: bool, compile_only: bool) -> str:
    """The command that goes on with the run; its config lies in its directory, other options have to be given again."""
    words = ["python", "run_sweep.py", "--resume", str(run_dir), *(["--only", only] if only else [])]
    words += [*(["--any-gpu"] if any_gpu else []), *(["--compile-only"] if compile_only else [])]
    return shlex.join(words)


def _announce(console: Console, spec: SweepSpec, plan: Plan, env: dict[str, Any], refusal: str | None) -> None:
    """What will run, and what of it can."""
    console.print(f"[bold]{escape(spec.name)}[/]  {escape(spec.description.strip())}".rstrip(), highlight=False)
    where = "no GPU: Triton's interpreter, whose times mean nothing" if env["gpu"] == "cpu" else env["gpu"]
    console.print(f"on {escape(refusal or where)}", highlight=False)
    here = {}
    for name, entry in spec.implementations.items():
        try:
            here[name] = load(entry.use or name, entry.all_options()).unavailable()
        except Exception as error:  # a broken peer is a row of the run, not the end of it
            here[name] = f"{type(error).__name__}: {error}"
    print_all(console, [plan_table(plan), implementation_table(here)])
    first = len(plan.first)
    console.print(
        f"{first} trials, and up to {plan.second_round_size()} of whole passes with the best tiles\n", highlight=False
    )


def _last_phases(plan: Plan, run_dir: Path) -> list[Phase]:
    """What is timed again, in the same moments: candidates of ours, then the winners and the fastest peers."""
    return [functools.partial(finals_round, plan=plan), functools.partial(duels_round, plan=plan, run_dir=run_dir)]


def _search(plan: Plan, minutes: float, strategy: str, env: dict[str, Any], run_dir: Path) -> Search:
    """The phases of a run under a budget."""
    last = [plan.second_round, *_last_phases(plan, run_dir)]
    try:
        return Search(plan, minutes, strategy, find_card(env["gpu"], env["sm_count"]), last)
    except ValueError as error:
        _fail(BAD_CONFIG, f"--{error}")


def _predicted(spec: SweepSpec, plan: Plan, env: dict[str, Any]) -> list[str]:
    """How long the run will take, by earlier ones on its card; ``env`` {} = this machine is not the one it is for."""
    gpu = env.get("gpu") or spec.device.name
    if not gpu or gpu == "cpu":
        return []
    costs, cores = history(RESULTS, gpu)
    cores = env.get("cpu_count") or cores or 1
    found = predict(plan, costs, machine_of(cores), finals=spec.timing.finals.enabled is not False)
    if found is None:
        return [f"no earlier run on {gpu} below {RESULTS}: no prediction of the time it takes"]
    return [f"{found.line()} (by {costs.runs} earlier run{'s' if costs.runs > 1 else ''} on this card, {cores} cores)",
            *found.notes]


def _run_trials(
    console: Console,
    spec: SweepSpec,
    plan: Plan,
    run_dir: Path,
    limit: float | None,
    retry: tuple[str, ...],
    compile_only: bool,
    again: str,
    search: Search | None = None,
) -> RunSummary:
    phases: list[Phase] = [plan.built_ahead] if compile_only else [
        plan.opening, plan.second_round, *_last_phases(plan, run_dir)]
    console.print(f"writing {escape(str(run_dir))}", highlight=False, soft_wrap=True)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "spec.yaml").write_text(dump_spec(spec))
        with RunProgress(console) as progress:
            return run_trials(
                spec,
                run_dir,
                phases=search or phases,
                limit_minutes=limit,
                on_event=progress,
                retry=retry,
                compile_only=compile_only,
            )
    except KeyboardInterrupt:
        _fail(INTERRUPTED, f"interrupted; go on with: {again}")
    except (StoreError, RunError, OSError) as error:
        _fail(BAD_RUN, f"{error}\ngo on with: {again}")


def _say_what_was_found(console: Console, summary: RunSummary, rows: list[dict[str, Any]], compile_only: bool) -> None:
    """The kernel cache's share in the run, and how far a search was from trying everything."""
    lines: list[str] = []
    built, records = summary.cache_hits + summary.cache_misses, read_records(summary.run_dir)
    env = read_environment(summary.run_dir) if built or records else {}
    if built:
        lines += report_cache(summary.cache_hits, summary.cache_misses, env["arch"])
        if compile_only:
            described = describe_cache(env["arch"])
            lines.append(f"docs/compile-only.md says how to carry the cache, which {described} describes")
    if records:
        same = [row for row in rows if row.get("environment") == env["fingerprint"]]
        lines.append(exhaustive_line(from_exhaustive(records[-1], same)))
    for line in filter(None, lines):
        console.print(escape(line), highlight=False, soft_wrap=True)


def _written(run_dir: Path, compile_only: bool) -> str:
    page = "report.html, " if (run_dir / "report.html").is_file() else ""
    return "results.csv" if compile_only else f"{page}report.md, best.csv, results.csv, plots"


def _finish(console: Console, summary: RunSummary, compile_only: bool, again: str) -> None:
    """Tables and plots, the answer, and how to go on where something is left."""
    run_dir = summary.run_dir
    rows = read_rows(run_dir)
    missing = ""
    if compile_only:
        console.print(build_table(rows))
        card = spec_card(rows)
        for path in write_compile_table(run_dir, rows, find_card(card) if card else None):
            console.print(escape(str(path)), highlight=False, soft_wrap=True)
    else:
        missing = write_report(run_dir)
        console.print(answer_blocks(select_run(run_dir)))
    console.print(
        f"{counts_line(summary.counts)}; {summary.new_rows} new in {summary.elapsed_s:.0f} s, device busy "
        f"{100 * summary.gpu_busy:.0f}%",
        highlight=False,
    )
    for line in time_lines(summary):
        console.print(escape(line), highlight=False, soft_wrap=True)
    console.print(
        f"{escape(str(run_dir))}: {_written(run_dir, compile_only)}",
        highlight=False,
        soft_wrap=True,
    )
    if missing:
        console.print(escape(missing), highlight=False, soft_wrap=True)
    _say_what_was_found(console, summary, rows, compile_only)
    if summary.stopped:
        why = "interrupted" if summary.interrupted else "time limit reached"
        console.print(
            f"{why}, {summary.remaining} trials of this round left; go on with:\n  {escape(again)}",
            highlight=False,
            soft_wrap=True,
        )
    elif not compile_only and any(row["gpu"] != "cpu" for row in rows):
        console.print(
            f"let the kernel use it: python -m sweeps export {escape(str(run_dir))}", highlight=False, soft_wrap=True
        )
    if summary.interrupted:
        raise typer.Exit(INTERRUPTED)
