"""Our kernel with the dispatcher's own choice for its untuned default: to judge a tuned table on shapes it has not.

In a config::

    implementations:
      triton: {use: "sweeps.dispatched:make", options: {card: h100}}
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flash_sink_attn.config import Kernel, limits_of
from flash_sink_attn.dispatch import decide
from flash_sink_attn.tuned_table import TunedTable
from sweeps.cases import Case
from sweeps.export import default_path
from sweeps.ours import LAUNCHES, Triton
from sweeps.regret import call_key


class Dispatched(Triton):
    """The kernels of ``triton``. The default row is measured with what a tuned table leads the dispatcher to."""

    def __init__(self, table: TunedTable) -> None:
        self.table = table

    def default_config(self, case: Case, arch: int) -> dict[str, Any]:
        """What a call of this shape would use on the table's card, in the form of a trial's config."""
        kernels: tuple[Kernel, ...] = LAUNCHES["triton"][case.pass_]
        key, limits = call_key(case), limits_of(arch)
        tiles: dict[str, dict[str, Any]] = {
            kernel: decide(kernel, key, limits, self.table).config.to_dict() for kernel in kernels}
        return tiles if len(tiles) > 1 else tiles[kernels[0]]


def make(options: Mapping[str, Any]) -> Dispatched:
    """From ``table``, the path of a tuned table, or ``card``, the slug of one whose packaged table is meant ("h100").

    Raises:
        ValueError: neither, both, or another option; the table is corrupt or absent.
    """
    unknown = sorted(set(options) - {"table", "card"})
    if unknown or len(options) != 1:
        raise ValueError(f"options: expected table: FILE or card: NAME, got {dict(options)}")
    path = Path(options["table"]).expanduser() if "table" in options else default_path(options["card"])
    return Dispatched(TunedTable.load(path))
