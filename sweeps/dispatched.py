"""Our kernels with the dispatcher's own choice for their untuned default: to judge a tuned table on shapes it has not.

In a config::

    implementations:
      triton: {use: "sweeps.dispatched:make", options: {card: h100}}
      hopper: {use: "sweeps.dispatched:make_hopper", options: {card: h100}}

The default row of each is what the ladder leads to for that implementation, whichever of the two a call would use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flash_sink_attn.config import Impl
from flash_sink_attn.dispatch import decide
from flash_sink_attn.tuned_table import TunedTable
from flash_sink_attn.validity import limits_of
from sweeps.cases import Case
from sweeps.export import default_path
from sweeps.ours import LAUNCHES, Hopper, Triton
from sweeps.regret import call_key


def chosen_config(impl: Impl, case: Case, arch: int, table: TunedTable) -> dict[str, Any]:
    """What a call of this shape would use of an implementation on the table's card, in the form of a trial's config."""
    kernels, key, limits = LAUNCHES[impl][case.pass_], call_key(case), limits_of(arch)
    tiles: dict[str, dict[str, Any]] = {
        kernel: decide(kernel, key, limits, table).config.to_dict() for kernel in kernels}
    return tiles if len(tiles) > 1 else tiles[kernels[0]]


class Dispatched(Triton):
    """The kernels of ``triton``. The default row is measured with what a tuned table leads the dispatcher to."""

    def __init__(self, table: TunedTable) -> None:
        self.table = table

    def default_config(self, case: Case, arch: int) -> dict[str, Any]:
        """See :func:`chosen_config`."""
        return chosen_config(self.name, case, arch, self.table)


class DispatchedHopper(Hopper):
    """The kernels of ``hopper``, likewise."""

    def __init__(self, table: TunedTable) -> None:
        self.table = table

    def default_config(self, case: Case, arch: int) -> dict[str, Any]:
        """See :func:`chosen_config`."""
        return chosen_config(self.name, case, arch, self.table)


def _table(options: Mapping[str, Any]) -> TunedTable:
    unknown = sorted(set(options) - {"table", "card"})
    if unknown or len(options) != 1:
        raise ValueError(f"options: expected table: FILE or card: NAME, got {dict(options)}")
    return TunedTable.load(
        Path(options["table"]).expanduser() if "table" in options else default_path(options["card"]))


def make(options: Mapping[str, Any]) -> Dispatched:
    """From ``table``, the path of a tuned table, or ``card``, the slug of one whose packaged table is meant ("h100").

    Raises:
        ValueError: neither, both, or another option; the table is corrupt or absent.
    """
    return Dispatched(_table(options))


def make_hopper(options: Mapping[str, Any]) -> DispatchedHopper:
    """As :func:`make`, of the Hopper kernels."""
    return DispatchedHopper(_table(options))
