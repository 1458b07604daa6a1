"""The commands that read runs and write about them: ``report``, ``board``, ``packed`` and ``compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.markup import escape

from sweeps.beside import write_beside
from sweeps.board import board_markdown, boards
from sweeps.compare import OURS, SAME_WITHIN, CompareError, FailOn, compare
from sweeps.compare_text import comparison_markdown, comparison_table, control_line, headline
from sweeps.console import make_console
from sweeps.packed import packing_markdown, packings
from sweeps.report import write_report
from sweeps.select import Selection, select_run
from sweeps.store import StoreError, read_environment

BROKEN, REFUSED = 1, 2
BESIDE = "beside.html"


def report_command(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run directories.")],
    beside: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Of several runs: the page that shows them side by side, with a .md of the same name. "
            f"Default: {BESIDE} in the directory that holds them all.",
        ),
    ] = None,
) -> None:
    """Rebuild report.html, tables and plots of runs from their files alone; several runs also side by side."""
    if beside is not None and len(runs) < 2:
        _fail(REFUSED, "--beside: expected two runs or more, got one")
    try:
        for run_dir in runs:
            missing = write_report(run_dir)
            typer.echo(f"{run_dir}: {'report.md' if missing else 'report.html, report.md'}, tables and plots written")
        if len(runs) > 1:
            page = beside or Path(os.path.commonpath([r.resolve().parent for r in runs])) / BESIDE
            missing = write_beside(runs, page)
            typer.echo(f"{page.with_suffix('.md') if missing else page}: written")
        if missing:
            typer.echo(missing)
    except (StoreError, OSError) as error:
        _fail(BROKEN, str(error))


def board_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
) -> None:
    """Ours against the fastest peer of a run in Markdown: a ratio per case, their geometric mean, the worst one."""
    typer.echo("\n\n".join(map(board_markdown, boards(_selection(run_dir)))) or "No case of ours was tried.")


def packed_command(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN", help="Run directory.")],
) -> None:
    """Packed batches of a run beside the same sequences in calls of a fixed length, in Markdown."""
    typer.echo(packing_markdown(packings(_selection(run_dir))))


def compare_command(
    old: Annotated[Path, typer.Argument(metavar="OLD", help="Run directory.")],
    new: Annotated[Path, typer.Argument(metavar="NEW", help="Run directory of the same card.")],
    impl: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="ours (default), a peer's name, peers or all; may be repeated."),
    ] = None,
    fail_on: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Exit with status 1 where a case is SLOWER by more than this (slower:2%), or has no time any more "
            "(lost); may be repeated.",
        ),
    ] = None,
    same_within: Annotated[
        float, typer.Option(metavar="PERCENT", min=0.0, help="A change this small either way is none.")
    ] = 100 * SAME_WITHIN,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the comparison as a Markdown comment.")
    ] = None,
) -> None:
    """Say of every case of two runs whether it is FASTER, SLOWER, the SAME, or whether that is UNSURE."""
    console = make_console()
    try:
        rules = [FailOn.parse(text) for text in fail_on or ()]
        # a rule finer than the margin would never be broken
        limits = [r.threshold for r in rules if r.kind == "slower" and r.threshold]
        found = compare(old, new, impl or [OURS], min([same_within / 100, *limits]))
        if markdown is not None:
            markdown.write_text(comparison_markdown(found), encoding="utf-8")
    except CompareError as error:
        _fail(REFUSED, str(error))
    except (StoreError, OSError) as error:
        _fail(BROKEN, str(error))
    for name, before, after in found.differs:
        console.print(f"{name}: {escape(before)} → {escape(after)}", highlight=False, soft_wrap=True)
    for warning in found.warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", highlight=False, soft_wrap=True)
    if any(c.verdict != "SAME" for c in found.changes):
        console.print(comparison_table(found))
    for line in (control_line(found), f"{found.old} → {found.new}: {headline(found)}"):
        if line:
            console.print(escape(line), highlight=False, soft_wrap=True)
    broken = found.failures(rules)
    for line in broken:
        console.print(f"[red]fails:[/] {escape(line)}", highlight=False, soft_wrap=True)
    if broken:
        raise typer.Exit(BROKEN)


def _selection(run_dir: Path) -> Selection:
    """What a run measured on its own card."""
    try:
        return select_run(run_dir).on(read_environment(run_dir)["gpu"])
    except (StoreError, OSError) as error:
        _fail(BROKEN, str(error))


def _fail(code: int, message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(code)
