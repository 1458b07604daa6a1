"""Tuned tile configurations of one GPU: what a sweep found best, by kernel and shape.

A table is one JSON file, ``flash_sink_attn/tuned/<gpu>.json`` or the file that ``FLASH_SINK_ATTN_TUNED`` names::

    {"schema_version": 3,
     "gpu": "h100",
     "arch": 90,
     "runs": {"20260102T030405Z-h100": {"date": "2026-01-02", "gpu_name": "...", "torch": "2.11.0", "triton": "3.6.0",
                                        "kernel_code": "3f2a...", ...}},
     "entries": [{"kernel": "fwd",
                  "key": {"dtype": "bfloat16", "head_dim": 64, "head_dim_v": 64, "heads_q": 64, "heads_kv": 8,
                          "window": 128, "batch": 1, "seqlen_q": 8192, "seqlen_k": 8192, "varlen": false},
                  "config": {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, ...},
                  "latency_ms": 0.108, "measured_as": "fwd", "best_ms": 0.1075, "default_ms": 0.131,
                  "case": "fwd-bfloat16-b1-q8192-k8192-h64x8-d64x64-w128", "run": "20260102T030405Z-h100"}]}

Entries hold for the card they were measured on; the dispatcher lends them to another card of the same architecture only
with a warning. Files of schema version 1, which had neither ``arch`` nor ``best_ms``, are still read, and so are those
of version 2, which know only the portable kernels.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

from flash_sink_attn.config import (
    BLOCK_SIZES,
    CONFIG_CLASS,
    KERNELS,
    KERNELS_OF,
    NUM_WARPS,
    AnyConfig,
    Kernel,
    TileConfig,
    reproducible,
)

SCHEMA_VERSION = 3
_READABLE = (1, 2, 3)
ENV_VAR = "FLASH_SINK_ATTN_TUNED"
DTYPES = ("bfloat16", "float16")

logger = logging.getLogger("flash_sink_attn")


class TunedTableError(ValueError):
    """A tuned table that cannot be read; the message names the file and the field."""


class ShapeKey(NamedTuple):
    """What a tuned entry holds for. Build it with :meth:`fixed` or :meth:`packed`, in the export as in the call.

    Attributes:
        dtype: of q, k and v, "bfloat16" or "float16".
        head_dim, head_dim_v: of q and k, and of v and o.
        heads_q, heads_kv: query and key heads.
        window: keys a query sees, itself included; None is causal only.
        batch, seqlen_q, seqlen_k: as in the call for a fixed length, see :meth:`packed` for varlen.
        varlen: whether the sequences are packed along one dimension.
    """

    dtype: str
    head_dim: int
    head_dim_v: int
    heads_q: int
    heads_kv: int
    window: int | None
    batch: int
    seqlen_q: int
    seqlen_k: int
    varlen: bool

    @classmethod
    def fixed(
        cls, dtype: str, head_dim: int, head_dim_v: int, heads_q: int, heads_kv: int, window: int | None, batch: int,
        seqlen_q: int, seqlen_k: int,
    ) -> ShapeKey:
        """The key of a call on (batch, seqlen, heads, head_dim) tensors, lengths in tokens."""
        return cls(dtype, head_dim, head_dim_v, heads_q, heads_kv, window, batch, seqlen_q, seqlen_k, False)

    @classmethod
    def packed(
        cls, dtype: str, head_dim: int, head_dim_v: int, heads_q: int, heads_kv: int, window: int | None,
        total_q: int, max_seqlen_q: int, max_seqlen_k: int,
    ) -> ShapeKey:
        """The key of a varlen call: ``total_q`` query tokens in sequences of at most the given lengths.

        The lengths of a packed batch differ from call to call, and a key of the lengths themselves would never be met
        again. What the best tile depends on is how much work there is and how long the longest row is, so both are
        rounded up to powers of two: ``seqlen_q`` and ``seqlen_k`` are the rounded maxima, and ``batch`` is the number
        of sequences of ``seqlen_q`` tokens that the rounded total makes, at least 1. How many sequences there are plays
        no part.
        """
        seqlen_q = _power_of_two(max_seqlen_q)
        batch = max(1, _power_of_two(total_q) // seqlen_q)
        return cls(dtype, head_dim, head_dim_v, heads_q, heads_kv, window, batch, seqlen_q,
                   _power_of_two(max_seqlen_k), True)


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length() if n > 1 else 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tuned configuration.

    Attributes:
        kernel: its name, see flash_sink_attn.config.
        key: the shape it was measured on.
        config: the configuration.
        latency_ms: median device time in ms of the pass it was chosen by.
        measured_as: that pass: "fwd"; "bwd" where the backward was timed as a whole; "bwd_dq" or "bwd_dkdv" where only
            the one kernel was.
        default_ms: time of the untuned heuristic on the same pass in the same run, None where it was not measured.
        case: what exactly was measured; several varlen batches share a key.
        run: name of the run, a key of :attr:`TunedTable.runs`.
        best_ms: time in ms of the fastest configuration measured with it, which is ``latency_ms`` or at most 1% less
            where one configuration stands for several shapes; None where it is not known.
    """

    kernel: Kernel
    key: ShapeKey
    config: AnyConfig
    latency_ms: float
    measured_as: str
    default_ms: float | None
    case: str
    run: str
    best_ms: float | None = None

    @property
    def slot(self) -> tuple[str, ShapeKey]:
        """What a table holds one entry of: a kernel and a shape, and apart from the fastest backward the fastest of
        those that give the same bits each time."""
        only = self.kernel == "hopper_bwd" and reproducible(self.config)
        return (_same_bits(self.kernel) if only else self.kernel), self.key

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return dataclasses.asdict(self) | {"key": self.key._asdict()}


def _same_bits(kernel: Kernel) -> str:
    return f"{kernel}, same bits each time"


@dataclasses.dataclass(frozen=True)
class TunedTable:
    """The tuned entries of one card.

    Attributes:
        gpu: slug of the card, "h100".
        entries: by their slots.
        runs: provenance of every run an entry names: date, card, driver, versions, hash of the kernel sources.
        path: where the table came from, for messages.
        arch: compute capability of the card, 90 for Hopper; None where the file does not say.
    """

    gpu: str
    entries: Mapping[tuple[str, ShapeKey], Entry]
    runs: Mapping[str, Mapping[str, Any]]
    path: str = ""
    arch: int | None = None

    def exact(self, kernel: Kernel, key: ShapeKey) -> AnyConfig | None:
        """The configuration tuned for exactly this kernel and shape, or None."""
        entry = self.entry(kernel, key)
        return None if entry is None else entry.config

    def entry(self, kernel: Kernel, key: ShapeKey, deterministic: bool = False) -> Entry | None:
        """As :meth:`exact`, with the measured time and the run it comes from.

        Args:
            deterministic: only a configuration that gives the same bits each time.
        """
        if kernel != "hopper_bwd":
            return self.entries.get((kernel, key))
        same_bits = self.entries.get((_same_bits(kernel), key))
        any_ = None if deterministic else self.entries.get((kernel, key))
        return min((e for e in (any_, same_bits) if e is not None), key=lambda e: e.latency_ms, default=None)

    def of_kernel(self, kernel: Kernel) -> tuple[Entry, ...]:
        """All entries of one kernel."""
        return self._by_kernel.get(kernel, ())

    @cached_property
    def _by_kernel(self) -> dict[str, tuple[Entry, ...]]:
        return {kernel: tuple(e for e in self.entries.values() if e.kernel == kernel) for kernel in KERNELS}

    @classmethod
    def build(
        cls, gpu: str, entries: Iterable[Entry], runs: Mapping[str, Mapping[str, Any]], path: str = "",
        arch: int | None = None,
    ) -> TunedTable:
        """A table of these entries; of several for one kernel and shape the last stays."""
        by_key: dict[tuple[str, ShapeKey], Entry] = {e.slot: e for e in entries}
        return cls(gpu, by_key, {name: runs[name] for name in sorted({e.run for e in by_key.values()})}, path,
                   arch)

    def to_dict(self) -> dict[str, Any]:
        """The JSON document, entries in a stable order."""
        # windows are positive, so None as 0 comes first
        ordered = sorted(self.entries.values(), key=lambda e: (
            e.kernel, e.key._replace(window=e.key.window or 0), e.slot[0]))
        return {"schema_version": SCHEMA_VERSION, "gpu": self.gpu, "arch": self.arch,
                "runs": {k: dict(v) for k, v in self.runs.items()}, "entries": [e.to_dict() for e in ordered]}

    def save(self, path: Path) -> None:
        """Write the table, one entry a line, replacing ``path`` in one step so that no reader meets half a file."""
        document = self.to_dict()
        entries = ",\n".join("  " + json.dumps(e) for e in document.pop("entries"))
        head = json.dumps(document, indent=1)[:-2]
        text = f'{head},\n "entries": [\n{entries}\n ]\n}}\n'
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, suffix=".part", delete=False) as f:
            f.write(text)
        os.chmod(f.name, 0o644)
        os.replace(f.name, path)

    @classmethod
    def load(cls, path: Path) -> TunedTable:
        """Read and check a table file.

        Raises:
            TunedTableError: the file cannot be read, is no JSON, or a field is missing or wrong; names file and field.
        """
        try:
            text = path.read_text()
        except (OSError, UnicodeDecodeError) as e:
            raise TunedTableError(f"tuned table {path}: cannot be read: {e}") from e
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, path: str) -> TunedTable:
        """As :meth:`load`, from the file's text; ``path`` is for messages."""
        try:
            document = json.loads(text)
        except json.JSONDecodeError as e:
            raise TunedTableError(f"tuned table {path}: not valid JSON: {e}") from e
        reader = _Reader(path)
        version = reader.field(document, "", "schema_version", int)
        if version not in _READABLE:
            raise reader.error("schema_version", f"expected {' or '.join(map(str, _READABLE))}, got {version}")
        optional_number = (int, type(None))
        arch = reader.positive(document, "", "arch", optional_number) if version > 1 else None
        runs = reader.field(document, "", "runs", dict)
        for name in runs:
            reader.field(runs, "runs", name, dict)
        entries = reader.field(document, "", "entries", list)
        return cls.build(reader.field(document, "", "gpu", str),
                         [reader.entry(e, f"entries[{i}]", runs) for i, e in enumerate(entries)], runs, path, arch)


class _Reader:
    """Typed access to a parsed document, with errors that name file and field."""

    def __init__(self, path: str) -> None:
        self.path = path

    def error(self, where: str, what: str) -> TunedTableError:
        return TunedTableError(f"tuned table {self.path}: {where}: {what}")

    def field(self, owner: Any, where: str, name: str, kind: type | tuple[type, ...]) -> Any:
        """``owner[name]``, which must be there and of type ``kind`` (a bool is no int)."""
        full = f"{where}.{name}" if where else name
        if not isinstance(owner, dict):
            raise self.error(where or "document", f"expected an object, got {owner!r}")
        if name not in owner:
            raise self.error(full, "missing")
        value = owner[name]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join("null" if k is type(None) else k.__name__ for k in kinds)
            raise self.error(full, f"expected {names}, got {value!r}")
        return value

    def one_of(self, owner: Any, where: str, name: str, allowed: tuple[Any, ...]) -> Any:
        value = self.field(owner, where, name, type(allowed[0]))
        if value not in allowed:
            raise self.error(f"{where}.{name}", f"expected one of {list(allowed)}, got {value!r}")
        return value

    def positive(self, owner: Any, where: str, name: str, kind: type | tuple[type, ...] = int) -> Any:
        value = self.field(owner, where, name, kind)
        if value is not None and not value > 0:
            raise self.error(f"{where}.{name}".lstrip("."), f"expected a positive number, got {value!r}")
        return value

    def entry(self, e: Any, where: str, runs: Mapping[str, Any]) -> Entry:
        kernel = self.one_of(e, where, "kernel", KERNELS)
        run = self.field(e, where, "run", str)
        if run not in runs:
            raise self.error(f"{where}.run", f"expected one of the names under runs, got {run!r}")
        return Entry(
            kernel=kernel,
            key=self.key(self.field(e, where, "key", dict), f"{where}.key"),
            config=self.config(kernel, self.field(e, where, "config", dict), f"{where}.config"),
            latency_ms=float(self.positive(e, where, "latency_ms", (int, float))),
            measured_as=self.one_of(e, where, "measured_as", _measured_as(kernel)),
            default_ms=self.positive(e, where, "default_ms", (int, float, type(None))),
            case=self.field(e, where, "case", str),
            run=run,
            best_ms=self.positive(e, where, "best_ms", (int, float, type(None))) if "best_ms" in e else None)

    def key(self, k: dict[str, Any], where: str) -> ShapeKey:
        unknown = sorted(set(k) - set(ShapeKey._fields))
        if unknown:
            raise self.error(f"{where}.{unknown[0]}", f"unknown, expected {list(ShapeKey._fields)}")
        optional = (int, type(None))
        numbers = {f: self.positive(k, where, f, optional if f == "window" else int)
                   for f in ShapeKey._fields if f not in ("dtype", "varlen")}
        dtype, varlen = self.one_of(k, where, "dtype", DTYPES), self.field(k, where, "varlen", bool)
        return ShapeKey(dtype=dtype, varlen=varlen, **numbers)

    def config(self, kernel: Kernel, c: dict[str, Any], where: str) -> AnyConfig:
        of = CONFIG_CLASS[kernel]
        if of is TileConfig:
            for name, allowed in (("BLOCK_M", BLOCK_SIZES), ("BLOCK_N", BLOCK_SIZES)):
                self.one_of(c, where, name, allowed)
            if "num_warps" in c:
                self.one_of(c, where, "num_warps", NUM_WARPS)
        for field in dataclasses.fields(of):
            if field.name in c:
                kind: Any = {"bool": bool, "int": int}.get(str(field.type), (int, type(None)))
                counts = kind is not bool and not field.name.isupper()  # of registers or stages
                (self.positive if counts else self.field)(c, where, field.name, kind)
        try:
            return of.from_dict(c)
        except ValueError as e:
            raise self.error(where, str(e)) from e


def _measured_as(kernel: Kernel) -> tuple[str, ...]:
    """The passes an entry of the kernel may have been chosen by."""
    if any(kernel in of["fwd"] for of in KERNELS_OF.values()):
        return ("fwd",)
    return ("bwd", kernel) if any(len(of["bwd"]) > 1 and kernel in of["bwd"] for of in KERNELS_OF.values()) else (
        "bwd",)


def load_table(gpu_slug: str) -> TunedTable | None:
    """The table for a card ("h100", see ``flash_sink_attn.devices.gpu_slug``), or None where there is none.

    A file named by the environment variable ``FLASH_SINK_ATTN_TUNED`` stands in for the packaged table; one that was
    made for another card does so with one warning only as far as :func:`load_others` goes. Files are read once per
    process and path.

    Raises:
        TunedTableError: the file is corrupt or, where the variable names it, absent.
    """
    user = _user_table(os.environ.get(ENV_VAR) or None)
    if user is not None:
        if user.gpu == gpu_slug:
            return user
        _warn_other_card(user.path, user.gpu, gpu_slug)
    return _packaged(gpu_slug)


def load_others(gpu_slug: str, arch: int) -> tuple[TunedTable, ...]:
    """The tables of other cards of the same architecture: the user's file if it is one, then the packaged ones by name.

    A table that does not say its card's architecture is none of them.

    Raises:
        TunedTableError: a file is corrupt.
    """
    user = _user_table(os.environ.get(ENV_VAR) or None)
    packaged = (table for slug in _packaged_slugs() if (table := _packaged(slug)) is not None)
    return tuple(t for t in (*((user,) if user else ()), *packaged) if t.gpu != gpu_slug and t.arch == arch)


@cache
def _user_table(user_file: str | None) -> TunedTable | None:
    if user_file is None:
        return None
    try:
        return TunedTable.load(Path(user_file).expanduser())
    except TunedTableError as e:
        raise TunedTableError(f"{e} (set by {ENV_VAR})") from e


@cache
def _warn_other_card(path: str, of: str, here: str) -> None:
    logger.warning("%s=%s holds entries for %r, this card is %r: the packaged table goes first",
                   ENV_VAR, path, of, here)


@cache
def _packaged_slugs() -> tuple[str, ...]:
    folder = importlib.resources.files("flash_sink_attn") / "tuned"
    if not folder.is_dir():
        return ()
    return tuple(sorted(f.name.removesuffix(".json") for f in folder.iterdir() if f.name.endswith(".json")))


@cache
def _packaged(gpu_slug: str) -> TunedTable | None:
    resource = importlib.resources.files("flash_sink_attn") / "tuned" / f"{gpu_slug}.json"
    if not resource.is_file():
        return None
    table = TunedTable.parse(resource.read_text(), str(resource))
    if table.gpu != gpu_slug:
        raise TunedTableError(f"tuned table {resource}: gpu: expected {gpu_slug!r}, got {table.gpu!r}")
    return table


def forget_tables() -> None:
    """Read every file anew: after a table was written, in the process that wrote it."""
    for cached in (_user_table, _warn_other_card, _packaged_slugs, _packaged):
        cached.cache_clear()
