"""Trials and finals to decisions: the best configuration of every case, how sure that is, and what its rivals take."""

from __future__ import annotations

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sweeps.cases import Case, family
from sweeps.measured import (
    BACKWARD_KERNELS,
    TILE_COLUMNS,
    TILE_DEFAULTS,
    Measured,
    Row,
    config_json,
    config_label,
    interval,
    tile_columns,
)
from sweeps.paired import Ratio
from sweeps.registry import PEERS, is_peer, peer_of
from sweeps.store import read_finals, read_rows
from sweeps.verdict import Contest, Neighbour, Verdict, find_contest, in_duel, key_of, wrong_in_final

__all__ = ["BACKWARD_KERNELS", "NOT_RUN", "TILE_COLUMNS", "TILE_DEFAULTS", "CaseResult", "Measured", "Row", "Selection",
           "best_row", "config_json", "config_label", "interval", "peer_order", "select", "select_run", "tile_columns",
           "write_best_csv"]

NOT_RUN = "not_run"     # status in best.csv of a case that a run stopped before
WALL_NOISE = 0.03       # wall times of a first pass closer than this share are not told apart
Record = Mapping[str, Any]


def peer_order(impls: Iterable[str]) -> list[str]:
    """Names of peers in the order of PEERS, a variant after the peer it is one of."""
    def key(impl: str) -> tuple[int, str]:
        peer = peer_of(impl)
        return (len(PEERS) if peer is None else PEERS.index(peer)), impl

    return sorted(set(impls), key=key)


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """What a run says about one case on one card.

    Attributes:
        gpu, case, model: the card's name as in the rows, the case, and its label ("" = none).
        rows: every row of the case, in the order of the log.
        ranked: the candidates of ours that were timed, the winner first, then those tied with it, then by time: those
            of the final by theirs there, the others by theirs in the first pass as the winner's has changed since.
        tied: those of ``ranked`` that are not known to be slower, the winner first. After a final by their paired
            ratios; without one, those whose interval overlaps the winner's.
        peers: the fastest ok row of each peer, by name, fastest first.
        peer_failures: status of each peer that has no ok row.
        eager, flash, default: the rivals of the speedup columns: eager; the fastest FlashAttention or cuDNN row whose
            result contains the sink; our untuned heuristic. None where the run has none.
        verdict: how the final came out, None where the first pass decided.
        duels: of the peers that were timed in the same moments as the winner, by name: time over the winner's, with its
            interval. Their times in ``peers`` are by these.
    """

    gpu: str
    case: Case
    model: str
    rows: tuple[Row, ...]
    ranked: tuple[Measured, ...]
    tied: tuple[Measured, ...]
    peers: Mapping[str, Measured]
    peer_failures: Mapping[str, str]
    eager: Measured | None
    flash: Measured | None
    default: Measured | None
    verdict: Verdict | None = None
    duels: Mapping[str, Ratio] = dataclasses.field(default_factory=dict)

    @property
    def best(self) -> Measured | None:
        return self.ranked[0] if self.ranked else None

    @property
    def runner_up(self) -> Measured | None:
        return self.ranked[1] if len(self.ranked) > 1 else None

    @property
    def best_peer(self) -> Measured | None:
        """The fastest peer whose result contains the sink, as ours does."""
        return next((m for m in self.peers.values() if m.row.get("applies_sink")), None)

    @property
    def rivals(self) -> dict[str, Measured | None]:
        """Who the speedup columns compare with, by the columns' endings."""
        return {"eager": self.eager, "flash": self.flash, "default": self.default}

    @property
    def own_rows(self) -> list[Row]:
        return [r for r in self.rows if not is_peer(r["impl"])]

    @property
    def margin(self) -> tuple[float, float, float] | None:
        """By how much the runner-up is slower (0.02 = 2%), with its interval.

        Where both were in a final that of their paired ratio; it can be below 0 where a tie was decided by the
        neighbouring shapes. Otherwise the bounds that the intervals of their two medians of the first pass allow.
        """
        a, b = self.best, self.runner_up
        if a is None or b is None:
            return None
        scale = 1.0
        if self.verdict is not None:
            for entrant, paired in zip(self.verdict.entrants[1:], self.verdict.ratios, strict=True):
                if key_of(entrant) == key_of(b):
                    return paired.ratio - 1, paired.low - 1, paired.high - 1
            scale = self.verdict.scale
        return b.latency_ms / a.latency_ms * scale - 1, b.low / a.high * scale - 1, b.high / a.low * scale - 1

    @property
    def wall_disagrees(self) -> bool | None:
        """Whether a caller waits less for another candidate of ours than for the winner, beyond the noise.

        None = not known: one looked quicker in the first pass, and no final has timed both against each other.
        """
        if self.verdict is not None and self.verdict.wall_disagrees is not None:
            return self.verdict.wall_disagrees
        walls = [m.row["wall_ms"] for m in self.ranked if m.row.get("wall_ms")]
        if self.best is None or not self.best.row.get("wall_ms"):
            return None
        return False if min(walls) >= self.best.row["wall_ms"] * (1 - WALL_NOISE) else None

    def speedup(self, rival: Measured | None) -> float | None:
        """How many times faster than the rival: its time over our best's, None where one of them is missing."""
        return None if rival is None or self.best is None else rival.latency_ms / self.best.latency_ms


@dataclasses.dataclass(frozen=True)
class Selection:
    """The decisions of a run.

    Attributes:
        results: one per case and card, in the order of the log.
        rows: all rows, in the order of the log, the speedup columns of the ok ones filled.
    """

    results: tuple[CaseResult, ...]
    rows: tuple[Row, ...]

    def on(self, gpu: str) -> Selection:
        """What was measured on one card; a run resumed on another one holds both."""
        return Selection(tuple(r for r in self.results if r.gpu == gpu), tuple(r for r in self.rows if r["gpu"] == gpu))

    def get(self, case_id: str) -> CaseResult | None:
        """The result of a case by its id, the first card's where there are several."""
        return next((r for r in self.results if r.case.id == case_id), None)


def select(rows: Iterable[Mapping[str, Any]], finals: Iterable[Record] = ()) -> Selection:
    """Choose the best configuration of every case.

    Where a final was held (see :func:`sweeps.verdict.find_contest`), it decides: the winner is the fastest, or within a
    tie the configuration that does best on the neighbouring shapes. Otherwise the winner is the timed ok row of ours
    with the lowest ``latency_ms``; of equal ones the first by implementation and configuration text: the order of the
    log plays no part. A configuration measured several times counts with its last ok row. What the noise does not
    separate from the winner is its tie set.

    An untuned default that cannot tell what it chooses is logged with the configuration {}. It stands for the one whose
    machine code is the same, and is a candidate of its own only where that was not measured by name. Where nothing
    tells which it chose, it wins only if the noise separates it from every named one.

    Args:
        rows: rows of a trial log, see ``sweeps.rows.make_row``.
        finals: records of the finals' log, oldest first.
    """
    filled = [dict(r) for r in rows]
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in filled:
        groups.setdefault((row["gpu"], row["case"]), []).append(row)
    records: dict[tuple[str, str], list[Record]] = {}
    for record in finals:
        records.setdefault((record["gpu"], record["case"]), []).append(record)
    first = [_case_result(group, wrong_in_final(records.get(key, ()))) for key, group in groups.items()]
    contests = [find_contest(result.ranked, records.get(key, ())) for key, result in zip(groups, first, strict=True)]
    results = tuple(result if contest is None else _after_final(result, contest, _neighbours(result, first))
                    for result, contest in zip(first, contests, strict=True))
    results = tuple(_after_duels(result, records.get(key, ())) for key, result in zip(groups, results, strict=True))
    for result in results:
        _fill_speedups(result)
    return Selection(results, tuple(filled))


def select_run(run_dir: Path) -> Selection:
    """:func:`select` on a run directory.

    Raises:
        StoreError: it is not one.
    """
    return select(read_rows(run_dir), read_finals(run_dir))


def _neighbours(result: CaseResult, everything: Sequence[CaseResult]) -> list[Neighbour]:
    """The other shapes of the family on the same card, the pass's result and its parts'."""
    shapes: dict[str, dict[str, CaseResult]] = {}
    for other in everything:
        if other.gpu == result.gpu and family(other.case) == family(result.case):
            shapes.setdefault(other.case.shape_id, {})[other.case.pass_] = other
    shapes.pop(result.case.shape_id)

    def times(other: CaseResult | None) -> dict[tuple[str, str], float]:
        return {key_of(m): m.latency_ms for m in other.ranked} if other else {}

    found = []
    for passes in shapes.values():
        own = passes.get(result.case.pass_)
        leaders = frozenset(map(key_of, own.tied)) if own else frozenset()
        parts = {part: times(passes.get(part)) for part in BACKWARD_KERNELS.values()}
        found.append(Neighbour(times(own), parts, leaders))
    return found


def _after_final(result: CaseResult, contest: Contest, neighbours: Sequence[Neighbour]) -> CaseResult:
    verdict = contest.verdict(neighbours)
    timed = {key_of(m): m for m in verdict.entrants}
    tied = {key_of(m) for m in verdict.tied}

    def by_time(m: Measured) -> float:
        return m.latency_ms if key_of(m) in timed else m.latency_ms * verdict.scale

    # Not all that were in the final were faster than all that were not: one may be there for its wall time.
    others = [m for m in result.ranked if key_of(m) not in timed]
    behind = sorted((m for m in (*verdict.entrants[1:], *others) if key_of(m) not in tied), key=by_time)
    default = result.default
    if default is not None:
        default = timed.get(key_of(default), default)
    ahead = [m for m in verdict.entrants if key_of(m) in tied or m is verdict.entrants[0]]
    return dataclasses.replace(result, ranked=(*ahead, *behind), tied=verdict.tied, default=default, verdict=verdict)


def _after_duels(result: CaseResult, records: Iterable[Record]) -> CaseResult:
    found = {} if result.best is None else in_duel(result.best, result.peers, records)
    if not found:
        return result
    timed = [found[name][0] if name in found else peer for name, peer in result.peers.items()]
    peers = {m.impl: m for m in sorted(timed, key=lambda m: (m.latency_ms, m.impl))}
    return dataclasses.replace(result, peers=peers, duels={name: against for name, (_, against) in found.items()},
                               eager=peers.get("eager"), flash=_flash(peers))


def _flash(peers: Mapping[str, Measured]) -> Measured | None:
    return next((m for m in peers.values() if m.row.get("is_flash") and m.row.get("applies_sink")), None)


def _case_result(rows: list[Row], wrong: Collection[str]) -> CaseResult:
    """What the first pass says; ``wrong``: keys of rows that are out since then."""
    timed = [r for r in rows if r["status"] == "ok" and r.get("latency_ms") is not None
             and r.get("key") not in wrong]
    ranked = _rank([r for r in timed if not is_peer(r["impl"])], rows)
    peers: dict[str, Measured] = {}
    for m in sorted((Measured.of(r, r.get("config") or {}) for r in timed if is_peer(r["impl"])),
                    key=lambda m: (m.latency_ms, m.impl, config_json(m.config))):
        peers.setdefault(m.impl, m)
    # of several implementations under test, ours sets the mark
    defaults = [r for r in timed if r.get("is_default") and not is_peer(r["impl"])]
    default = max(defaults, key=lambda r: r["impl"] == "triton", default=None)
    return CaseResult(
        gpu=rows[0]["gpu"],
        case=Case.from_dict(rows[0]["case_fields"]),
        model=next((r["model"] for r in rows if r.get("model")), ""),
        rows=tuple(rows),
        ranked=tuple(ranked),
        tied=tuple(m for m in ranked if m.low <= ranked[0].high),
        peers=peers,
        peer_failures={r["impl"]: r["status"] for r in rows if is_peer(r["impl"]) and r["impl"] not in peers},
        eager=peers.get("eager"),
        flash=_flash(peers),
        default=None if default is None else Measured.of(default, _resolved(default, rows)),
    )


def _rank(own: list[Row], rows: list[Row]) -> list[Measured]:
    """Our candidates, the winner first and then by time."""
    latest: dict[tuple[str, str], Measured] = {}
    # named ones last, so that they take the place of an untuned default that chose the same
    for row in sorted(own, key=lambda r: bool(r.get("config"))):
        config = _resolved(row, rows)
        latest[row["impl"], config_json(config)] = Measured.of(row, config)
    ranked = sorted(latest.values(), key=lambda m: (m.latency_ms, m.impl, config_json(m.config)))
    named = next((m for m in ranked if m.config), None)
    if named and not ranked[0].config and named.low <= ranked[0].high:
        ranked.remove(named)
        ranked.insert(0, named)
    return ranked


def _resolved(row: Row, rows: list[Row]) -> Mapping[str, Any]:
    """The configuration a row ran with; {} for an untuned default of which nothing tells what it chose."""
    if row.get("config") or not row.get("is_default"):
        return row.get("config") or {}
    same = (r["config"] for r in rows if r["impl"] == row["impl"] and r.get("config") and r["status"] != "duplicate"
            and row.get("binary") and r.get("binary") == row["binary"])
    return next(same, {})


def _fill_speedups(result: CaseResult) -> None:
    for row in result.rows:
        for name, rival in result.rivals.items():
            timed = row["status"] == "ok" and row.get("latency_ms") is not None
            row[f"speedup_vs_{name}"] = rival.latency_ms / row["latency_ms"] if timed and rival is not None else None


def _no_winner(own: list[Row]) -> tuple[str, str]:
    """Status and message of a case without a winner."""
    # a backward is timed in pairs of its parts' winners: without rows of its own the run ended before
    if not own:
        return NOT_RUN, "no candidate of ours was tried in this run"
    counts = Counter(r["status"] for r in own)
    if counts["ok"]:
        return NOT_RUN, f"{counts['ok']} candidates were compiled, none was timed"
    return counts.most_common(1)[0][0], "no candidate was ok: " + ", ".join(f"{n} {s}" for s, n in counts.most_common())


def best_row(result: CaseResult, peers: Iterable[str] = ()) -> Row:
    """The row of best.csv for a case, with a column for each of PEERS and of ``peers``.

    Times are in ms. A case without a winner says why in status and message.
    """
    own, best = result.own_rows, result.best
    names = peer_order([*PEERS, *result.peers, *peers])
    row: Row = {"gpu": result.gpu, "model": result.model, "case": result.case.id, **result.case.columns()}
    row["status"], row["message"] = ("ok", "") if best else _no_winner(own)
    row |= {"impl": best.impl if best else None, **tile_columns(best.config if best else {}),
            "config": config_json(best.config) if best else None,
            "is_default": bool(result.default and best.impl == result.default.impl
                               and best.config == result.default.config) if best else None}
    if best is not None and row["num_warps"] is None:
        row["num_warps"] = best.row.get("num_warps")    # the Hopper kernels' follow from their tiles
    row |= {"latency_ms": best.latency_ms if best else None, "latency_ms_low": best.low if best else None,
            "latency_ms_high": best.high if best else None}
    row |= {name: best.row.get(name) if best else None
            for name in ("samples", "stop_reason", "wall_ms", "tflops", "pct_peak", "gb_per_s")}
    margin, runner_up = result.margin, result.runner_up
    row |= {"candidates": len(own), "candidates_ok": len(result.ranked), "ties": len(result.tied),
            "tie_set": json.dumps([{"impl": m.impl, "config": dict(m.config), "latency_ms": m.latency_ms}
                                   for m in result.tied]) if best else None,
            "runner_up": config_json(runner_up.config) if runner_up else None,
            "margin": margin[0] if margin else None, "margin_low": margin[1] if margin else None,
            "margin_high": margin[2] if margin else None}
    verdict = result.verdict
    row |= {"source": None if best is None else "first pass" if verdict is None or verdict.alone else "finals",
            "first_pass_ms": best.row.get("first_pass_ms", best.latency_ms) if best else None,
            "drift": verdict.drift if verdict else None, "energy_j": verdict.energy_j if verdict else None,
            "tflops_per_w": verdict.tflops_per_w if verdict else None, "wall_disagrees": result.wall_disagrees}
    for name, rival in (result.rivals | {"best_peer": result.best_peer}).items():
        if name in ("flash", "best_peer"):
            row[f"{name}_impl" if name == "flash" else name] = rival.impl if rival else None
        if name != "eager":
            row[f"{name}_ms"] = rival.latency_ms if rival else None
        row[f"speedup_vs_{name}"] = result.speedup(rival)
    against = result.duels.get(result.best_peer.impl) if result.best_peer else None
    row |= {"best_peer_source": None if result.best_peer is None else "duel" if against else "first pass",
            "best_peer_ratio_low": against.low if against else None,
            "best_peer_ratio_high": against.high if against else None}
    row |= {f"{peer}_ms": result.peers[peer].latency_ms if peer in result.peers else None for peer in names}
    row["peers_without_sink"] = " ".join(p for p, m in result.peers.items() if not m.row.get("applies_sink"))
    row["peers_failed"] = json.dumps(dict(result.peer_failures)) if result.peer_failures else None
    return row


def write_best_csv(selection: Selection, path: Path) -> None:
    """best.csv: one row per case, empty where a value does not exist (see :func:`best_row`)."""
    peers = {p for r in selection.results for p in r.peers}
    _write_csv([best_row(r, peers) for r in selection.results], path)


def _write_csv(rows: list[Row], path: Path) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="") as f:
        writer = csv.DictWriter(f, list(rows[0]) if rows else ["case"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)
