"""The commands that judge choices on recorded trials, without a GPU: ``replay``, ``ladder`` and ``heldout``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from sweeps.heldout import heldout_report, leave_one_out_report
from sweeps.ladder import ladder_report
from sweeps.replay import replay_text
from sweeps.search import exhaustive_line, from_exhaustive, read_records
from sweeps.store import StoreError, read_rows
from sweeps.strategies import STRATEGIES

BAD_RUN = 1


def add_commands(app: typer.Typer) -> None:
    """Adds them to ``python -m sweeps``."""
    app.command()(replay)
    app.command()(ladder)
    app.command()(heldout)


def replay(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory whose trials are played back.")],
    strategy: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Of {', '.join(STRATEGIES)}; may be repeated. Default: all."),
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials of a case.")] = 10,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each strategy, with other random numbers.")] = 20,
    candidates: Annotated[int, typer.Option(min=2, help="Only cases with at least so many candidates.")] = 10,
    search: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Also compare the search of this run with RUN's best.")
    ] = None,
) -> None:
    """Score search strategies on a run's recorded trials: regret after some numbers of trials. Needs no GPU."""

    def text() -> str:
        rows = read_rows(run_dir)
        found = replay_text(rows, strategy or list(STRATEGIES), trials, seeds, candidates)
        lines = [exhaustive_line(from_exhaustive(r, rows)) for r in (read_records(search) if search else [])]
        return "\n\n".join([found, *(line or "no case that both runs have in full" for line in lines)])

    _print_report(text)


def ladder(run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")]) -> None:
    """Judge the kernel's nearest tuned entry by leave-one-out on a run; writes ladder.md and ladder.csv there."""
    _print_report(lambda: ladder_report(run_dir))


def heldout(
    run_dirs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run directory, such as one of configs/heldout.yaml.")],
    without: Annotated[
        bool, typer.Option("--leave-one-out", help="Judge each case, of all RUNs, with a table that lacks its shape.")
    ] = False,
    table: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The tuned table; default flash_sink_attn/tuned/<gpu>.json.")
    ] = None,
) -> None:
    """Compare what the dispatcher chooses, implementation and tiles, with the best a run measured; writes heldout.md
    and heldout.csv there, or leave-one-out.md and .csv into the first RUN."""
    if without:
        _print_report(lambda: leave_one_out_report(run_dirs, table))
    elif len(run_dirs) == 1:
        _print_report(lambda: heldout_report(run_dirs[0], table))
    else:
        _fail("run: expected one, or --leave-one-out for several")


def _print_report(make: Callable[[], str]) -> None:
    try:
        typer.echo(make())
    except (StoreError, OSError, ValueError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(BAD_RUN)
