"""How good the dispatcher is on shapes that were never tuned: its choices against what a run measured for them."""

from __future__ import annotations

from pathlib import Path

from flash_sink_attn.config import Kernel, limits_of
from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.dispatch import Decision, decide
from flash_sink_attn.tuned_table import ShapeKey, TunedTable
from sweeps.cases import Case
from sweeps.export import default_path
from sweeps.regret import Pick, case_table, csv_text, picks, summary_table
from sweeps.select import select_run
from sweeps.spec import DEFAULT_ARCH
from sweeps.store import read_environment


def heldout(run_dir: Path, table: Path | None = None) -> list[Pick]:
    """What the dispatcher chooses with a table for each case of a run, beside the best that the run measured.

    Args:
        run_dir: a run, such as one of ``configs/heldout.yaml``, whose default rows are the dispatcher's choices.
        table: the tuned table; default the packaged one of the run's card. A table of another card of the same
            architecture stands on the rung it would stand on there.

    Raises:
        StoreError: no run there. TunedTableError: the table is corrupt or absent. ValueError: no timed case of ours.
    """
    env = read_environment(run_dir)
    slug, arch = gpu_slug(env["gpu"]), env.get("arch") or DEFAULT_ARCH
    loaded, limits = TunedTable.load(table or default_path(slug)), limits_of(arch)
    own, others = (loaded, ()) if loaded.gpu == slug else (None, (loaded,))

    def choose(kernel: Kernel, case: Case, key: ShapeKey) -> Decision:
        return decide(kernel, key, limits, own, others)

    found = picks(select_run(run_dir).on(env["gpu"]), choose, limits)
    if not found:
        raise ValueError(f"run: {run_dir} has no timed case of a single kernel of ours")
    return found


def heldout_report(run_dir: Path, table: Path | None = None) -> str:
    """Writes ``heldout.md`` and ``heldout.csv`` into a run directory, and returns the Markdown's summary."""
    found = heldout(run_dir, table)
    env = read_environment(run_dir)
    shapes = len({p.case.shape_id for p in found})
    exact = sum(p.decision.source == "exact" for p in found)
    text = (f"{len(found)} cases of {shapes} shapes on {env['gpu']}, run {run_dir.resolve().name}: time of the "
            f"configuration that the dispatcher chooses with {table.name if table else 'the packaged table'}, over the "
            "best that was measured for the case."
            + (f" {exact} of them are in the table and so not held out." if exact else "") + "\n\n"
            + summary_table(found))
    (run_dir / "heldout.md").write_text(f"# Held-out shapes\n\n{text}\n\n{case_table(found)}\n")
    (run_dir / "heldout.csv").write_text(csv_text(found))
    return text
