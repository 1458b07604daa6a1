"""Which tile configuration a call uses: the ladder from what the caller says down to a heuristic.

1. ``explicit``: the call's own configuration.
2. ``exact``: the tuned table's entry for exactly this kernel and shape.
3. ``nearest``: the table's nearest entry of the same family that the validity rule accepts for this shape, if it is
   near enough (:mod:`flash_sink_attn.nearest`).
4. ``other card``: exact, else nearest, in the table of another card of the same architecture; with one logged warning.
5. ``heuristic``: a rule of thumb from measurements on an H100.

``flash_sink_attn.explain`` says which rung a call stands on, and why.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from functools import cache, lru_cache
from importlib import metadata
from typing import Literal, NamedTuple

import torch

from flash_sink_attn.config import AnyConfig, AttnConfig, Kernel, reproducible
from flash_sink_attn.devices import gpu_slug
from flash_sink_attn.heuristic import heuristic
from flash_sink_attn.kernel_code import CODE_FIELD, impl_of, kernel_code_hash
from flash_sink_attn.nearest import FARTHEST, nearest
from flash_sink_attn.regimes import lends
from flash_sink_attn.tuned_table import (
    ENV_VAR,
    Entry,
    ShapeKey,
    TunedTable,
    forget_tables,
    load_others,
    load_table,
)
from flash_sink_attn.validity import Limits, limits_of, reject_reason

Rung = Literal["explicit", "exact", "nearest", "other card", "heuristic"]

logger = logging.getLogger("flash_sink_attn")


class Choice(NamedTuple):
    """A configuration and the rung of the ladder it comes from."""

    config: AnyConfig
    source: Rung


class Decision(NamedTuple):
    """How a kernel's configuration was found.

    Attributes:
        kernel: its name, see flash_sink_attn.config.
        config: the configuration.
        source: the rung of the ladder.
        reason: why this rung and none above it, in words.
        entry: the tuned entry it comes from, None where it comes from none.
        table: the table of that entry.
        distance: of that entry's shape from the call's; 0 for the same shape.
    """

    kernel: Kernel
    config: AnyConfig
    source: Rung
    reason: str
    entry: Entry | None = None
    table: TunedTable | None = None
    distance: float | None = None


class DeviceInfo(NamedTuple):
    """A device as dispatching sees it; without a GPU there is no slug and the limits are Hopper's."""

    slug: str | None
    arch: int


@lru_cache(maxsize=64)
def device_info(device: torch.device) -> DeviceInfo:
    """What ``device`` is; a CPU runs the interpreter, with the configurations of a Hopper card."""
    if device.type != "cuda":
        return DeviceInfo(None, 90)
    properties = torch.cuda.get_device_properties(device)
    return DeviceInfo(gpu_slug(properties.name), properties.major * 10 + properties.minor)


def decide(
    kernel: Kernel, key: ShapeKey, limits: Limits, own: TunedTable | None, others: Iterable[TunedTable] = (),
    deterministic: bool = False,
) -> Decision:
    """The rungs below ``explicit``, as a function of the tables alone; neither logs nor reads anything.

    Args:
        kernel: its name, see flash_sink_attn.config.
        key: the call's shape.
        limits: of the GPU the call runs on.
        own: the table of that GPU, None where there is none.
        others: tables of other cards of its architecture, the ones to prefer first.
        deterministic: only configurations that give the same bits each time.
    """
    def usable(entry: Entry) -> bool:
        return (not deterministic or reproducible(entry.config)) and reject_reason(
            entry.config, kernel, head_dim=key.head_dim, head_dim_v=key.head_dim_v,
            group=key.heads_q // key.heads_kv, limits=limits) is None

    missed: list[str] = []
    for table in (*((own,) if own else ()), *others):
        lent = table is not own
        entry = table.entry(kernel, key, deterministic)
        if entry is not None and usable(entry):
            what = "the entry for exactly this shape"
            found: tuple[Entry, float] | None = (entry, 0.0)
        else:
            found = nearest(kernel, key, table.of_kernel(kernel),
                            lambda e: lends(e, key, deterministic) and usable(e))
            what = "" if found is None else f"the nearest entry, at distance {found[1]:.2f} of at most {FARTHEST:g}"
        if found is not None and found[1] <= FARTHEST:
            source: Rung = "other card" if lent else "exact" if entry is found[0] else "nearest"
            why = f"{what}, of {table.gpu}'s table" + (f"; {'; '.join(missed)}" if missed else "")
            return Decision(kernel, found[0].config, source, why, found[0], table, found[1])
        near = ("no usable entry of this kernel, head dims, kind of mask and kind of shape" if found is None
                else f"its nearest entry is at distance {found[1]:.2f}, more than {FARTHEST:g}")
        missed.append(f"{table.gpu}'s table: {near}")
    why = "; ".join(missed) or "there is no tuned table for this device or its architecture"
    return Decision(kernel, heuristic(kernel, key, limits, deterministic), "heuristic", why)


@lru_cache(maxsize=4096)
def _below_explicit(
    kernel: Kernel, key: ShapeKey, device: DeviceInfo, user_table: str | None, deterministic: bool
) -> tuple[Choice, Decision]:
    own, others = (None, ()) if device.slug is None else (
        load_table(device.slug), load_others(device.slug, device.arch))
    decision = decide(kernel, key, limits_of(device.arch), own, others, deterministic)
    if decision.source == "other card" and decision.table is not None:
        _warn_lent(decision.table.gpu, device.slug or "")
    if decision.entry is not None and decision.table is not None:
        _warn_stale(decision.table.path, decision.entry.run, stale(decision.table, decision.entry))
    return Choice(decision.config, decision.source), decision


def stale(table: TunedTable, entry: Entry) -> str:
    """What of the software an entry was measured with is another one here, in words; "" = nothing known to be."""
    measured = table.runs.get(entry.run, {})
    impl = impl_of(entry.kernel)
    here = {"triton": _triton_version(), CODE_FIELD[impl]: kernel_code_hash(impl)}
    words = {"triton": "Triton", CODE_FIELD[impl]: "kernel code"}
    return " and ".join(f"{words[name]} {measured[name]} (here {value})" for name, value in here.items()
                        if measured.get(name) and measured[name] != value)


@cache
def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        import triton

        return str(triton.__version__)


@cache
def _warn_lent(of: str, here: str) -> None:
    logger.warning("no tuned entries for %r fit: tiles measured on %r are used, a card of the same architecture; "
                   "`python -m sweeps tune` measures this one", here, of)


@cache
def _warn_stale(path: str, run: str, difference: str) -> None:
    if difference:
        logger.warning("tuned table %s: the entries of run %s were measured with %s: they are used all the same",
                       path, run, difference)


def explain_kernel(
    kernel: Kernel, key: ShapeKey, device: torch.device, explicit: AttnConfig | None = None, deterministic: bool = False
) -> Decision:
    """As :func:`choose`, with how the configuration was found."""
    if explicit is not None and (config := getattr(explicit, kernel)) is not None:
        return Decision(kernel, config, "explicit", "the call's own configuration")
    return _below_explicit(kernel, key, device_info(device), os.environ.get(ENV_VAR), deterministic)[1]


def choose(
    kernel: Kernel, key: ShapeKey, device: torch.device, explicit: AttnConfig | None = None, deterministic: bool = False
) -> Choice:
    """The configuration of one kernel for a call of shape ``key`` on ``device``.

    A shape seen before costs a dictionary lookup.

    Raises:
        TunedTableError: a tuned table is corrupt.
    """
    if explicit is not None and (config := getattr(explicit, kernel)) is not None:
        return Choice(config, "explicit")
    return _below_explicit(kernel, key, device_info(device), os.environ.get(ENV_VAR), deterministic)[0]


_times_forgotten = [0]


def generation() -> int:
    """Another number after every :func:`forget`: decisions kept elsewhere hold for one of them."""
    return _times_forgotten[0]


def forget() -> None:
    """Read the tuned tables anew and decide anew: after a table was written, in the process that wrote it."""
    forget_tables()
    _times_forgotten[0] += 1
    for cached in (_below_explicit, _warn_lent, _warn_stale):
        cached.cache_clear()
