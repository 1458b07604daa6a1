"""From the records of the finals to winners: who won each contest, who is tied, and which of the tied is taken."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sweeps.cost import flops
from sweeps.measured import BACKWARD_KERNELS, Measured, Row, config_json
from sweeps.paired import Ratio, ratio, standing

_STEP = 0.005   # neighbours' mean ratios this close count as equal: they are no more certain than that

Key = tuple[str, str]               # (impl, config as text)
Times = Mapping[Key, float]         # ms of every timed candidate of a case


def key_of(candidate: Measured) -> Key:
    return candidate.impl, config_json(candidate.config)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """How a final came out.

    Attributes:
        entrants: those that were timed to the end of it without a fault, the winner first, then by time; their times
            and intervals are the final's, those of one who was alone the first pass's.
        tied: those of ``entrants`` that are not known to be slower than the fastest, the winner first.
        ratios: of the other entrants, in their order: time over the winner's, with its interval.
        record: the final's line of the log.
        own: of each entrant, in their order, what the record says about it.
    """

    entrants: tuple[Measured, ...]
    tied: tuple[Measured, ...]
    ratios: tuple[Ratio, ...]
    record: Mapping[str, Any]
    own: tuple[Mapping[str, Any], ...]

    @property
    def wall_disagrees(self) -> bool | None:
        """Whether a caller waits less for another entrant, beyond the noise of the wall clock; None = not measured."""
        walls = [own.get("wall_samples_ms") or () for own in self.own]
        if len(walls) < 2 or not all(walls):
            return None
        return any(ratio(walls[0], other).high < 1 for other in walls[1:])

    @property
    def energy_j(self) -> float | None:
        """Joules of one call of the winner."""
        return self.own[0].get("energy_j")

    @property
    def tflops_per_w(self) -> float | None:
        """Useful TFLOP/s per watt of the winner, which is its useful TFLOPs per joule."""
        return flops(self.entrants[0].case) / self.energy_j / 1e12 if self.energy_j else None

    @property
    def drift(self) -> float:
        """The winner's time in the final over that of the first pass, less 1."""
        return self.own[0]["latency_ms"] / self.entrants[0].row["first_pass_ms"] - 1

    @property
    def scale(self) -> float:
        """The winner's time that counts over that of the first pass, for whoever has only the latter."""
        return self.entrants[0].latency_ms / self.entrants[0].row["first_pass_ms"]

    @property
    def alone(self) -> bool:
        """Whether there was nobody to compare with: the final was held for the energy, and the first pass decided."""
        return len(self.record["entrants"]) == 1


@dataclasses.dataclass(frozen=True)
class Contest:
    """A final that counts: candidates of one case with what its record says of each, the first pass's order."""

    candidates: tuple[Measured, ...]
    own: tuple[Mapping[str, Any], ...]
    record: Mapping[str, Any]

    def verdict(self, neighbours: Sequence[Neighbour]) -> Verdict:
        """The winner: the fastest, or of those as good as it the one that does best on the neighbouring shapes."""
        samples = [own["samples_ms"] for own in self.own]
        margin = float(self.record.get("tie_margin") or 0.0)
        placements = self.record.get("block_placements") or ()
        now = standing(samples, margin, placements)
        # A rival that is only not known to be slower is tied, too; taking it could cost more than the margin.
        free = [n for n in now.tied if now.ratios[n].ratio <= 1 + margin]
        winner = free[choose([self.candidates[n] for n in free], neighbours)]
        against = {n: ratio(samples[winner], samples[n], placements=placements)
                   for n in range(len(samples)) if n != winner}
        order = [winner, *sorted(against, key=lambda n: (n not in now.tied, against[n].ratio, key_of(
            self.candidates[n])))]
        timed = [_timed(self.candidates[n], self.own[n], self.record) for n in order]
        return Verdict(tuple(timed), tuple(timed[:len(now.tied)]), tuple(against[n] for n in order[1:]), self.record,
                       tuple(self.own[n] for n in order))


def find_contest(ranked: Sequence[Measured], records: Iterable[Mapping[str, Any]]) -> Contest | None:
    """The last final of a case that counts, or None.

    One counts when it ran to its end with at least one entrant, and the fastest of the first pass was in it: rows that
    came later may have brought a faster one.

    Args:
        ranked: the timed candidates of ours, fastest first.
        records: of the case's finals, oldest first.
    """
    by_row = {candidate.row.get("key"): candidate for candidate in ranked}
    found = None
    for record in records:
        entrants = record.get("entrants") or []
        leader = ranked[0].row.get("key") if ranked else None
        if (record.get("against_peers") or record.get("status") != "ok" or not ranked
                or leader not in {e.get("key") for e in entrants}):
            continue
        ran = [e for e in entrants if e.get("status") == "ok" and e.get("samples_ms") and e.get("key") in by_row]
        if ran:
            found = Contest(tuple(by_row[e["key"]] for e in ran), tuple(ran), record)
    return found


def in_duel(
    best: Measured, peers: Mapping[str, Measured], records: Iterable[Mapping[str, Any]]
) -> dict[str, tuple[Measured, Ratio]]:
    """The peers that were timed against the winner (:mod:`sweeps.duels`), by name, each with its ratio.

    A peer's time is that ratio times the winner's time, so that the two stand to each other as they did in the duel.

    Args:
        best: the winner, with the time that counts.
        peers: as the first pass has them.
        records: of the case's finals and duels, oldest first; the last duel with the winner counts.
    """
    found: dict[str, tuple[Measured, Ratio]] = {}
    for record in records:
        ran = {str(e["key"]): e for e in record.get("entrants") or []
               if e.get("status") == "ok" and e.get("samples_ms") and e.get("key")}
        ours = ran.get(str(best.row.get("key")))
        if not record.get("against_peers") or record.get("status") != "ok" or ours is None:
            continue
        scale = best.latency_ms / ours["latency_ms"]
        for name, peer in peers.items():
            own = ran.get(str(peer.row.get("key")))
            if own is not None:
                against = ratio(ours["samples_ms"], own["samples_ms"],
                                placements=record.get("block_placements") or ())
                found[name] = _in_duel(peer, own, scale, against, best)
    return found


def _in_duel(peer: Measured, own: Mapping[str, Any], scale: float, against: Ratio,
             best: Measured) -> tuple[Measured, Ratio]:
    ms = best.latency_ms * against.ratio
    row: Row = peer.row | {"first_pass_ms": peer.latency_ms, "latency_ms": ms,
                           "samples_ms": [sample * scale for sample in own["samples_ms"]],
                           "samples": len(own["samples_ms"])}
    row |= {name: row[name] * peer.latency_ms / ms for name in ("tflops", "pct_peak", "gb_per_s") if row.get(name)}
    return Measured.of(row, peer.config), against


def wrong_in_final(records: Iterable[Mapping[str, Any]]) -> set[str]:
    """Keys of the rows whose configuration gave a wrong result in a final, and is out however fast."""
    return {str(e["key"]) for record in records for e in record.get("entrants") or []
            if e.get("status") == "incorrect" and e.get("key")}


def _timed(candidate: Measured, own: Mapping[str, Any], record: Mapping[str, Any]) -> Measured:
    """The candidate with its time in the final, and a row that says the same."""
    row: Row = candidate.row | {"first_pass_ms": candidate.latency_ms}
    if len(record["entrants"]) == 1:
        return dataclasses.replace(candidate, row=row)
    scale = candidate.latency_ms / own["latency_ms"]
    row |= {name: row[name] * scale for name in ("tflops", "pct_peak", "gb_per_s") if row.get(name)}
    row |= {name: record.get(name)
            for name in ("stop_reason", "sm_clock_mhz", "power_w", "temperature_c", "throttle")}
    row |= {"latency_ms": own["latency_ms"], "samples_ms": own["samples_ms"], "samples": len(own["samples_ms"])}
    if own.get("wall_ms"):
        row["wall_ms"] = own["wall_ms"]
    return Measured.of(row, candidate.config)


# ---- within a tie


@dataclasses.dataclass(frozen=True)
class Neighbour:
    """Another shape of the same family and pass: the first pass's times there, and who is tied for the lead.

    Attributes:
        times: of the candidates of the pass; of a backward made of parts, none.
        parts: of its parts, by their names.
        leaders: the winner and who is tied with it.
    """

    times: Times
    parts: Mapping[str, Times]
    leaders: frozenset[Key]

    def score(self, candidate: Measured) -> float | None:
        """The candidate's time over the best one's; None where it was not timed.

        A pair is scored by the sum of its parts' times, since few pairs are timed as such.
        """
        names = [part for part in BACKWARD_KERNELS.values() if isinstance(candidate.config.get(part), Mapping)]
        tables = [self.parts.get(part, {}) for part in names] or [self.times]
        configs = [candidate.config[part] for part in names] or [candidate.config]
        own = [table.get((candidate.impl, config_json(config))) for table, config in zip(tables, configs, strict=True)]
        known = [ms for ms in own if ms is not None]
        if len(known) < len(own):
            return None
        return sum(known) / sum(min(ms for (impl, _), ms in table.items() if impl == candidate.impl)
                                for table in tables)


def choose(tied: Sequence[Measured], neighbours: Sequence[Neighbour]) -> int:
    """Which of the tied candidates to take; the order in which they are given plays no part.

    The one with the lowest geometric mean of its times over the best ones', over those neighbours where all of the tied
    were timed; of equal ones that which leads on most neighbours, so that few different configurations are in use; then
    the first by implementation and text.
    """
    table = [[neighbour.score(candidate) for candidate in tied] for neighbour in neighbours]
    common = [[s for s in scores if s is not None] for scores in table]
    common = [scores for scores in common if len(scores) == len(tied)]

    def rank(n: int) -> tuple[int, int, Key]:
        mean = sum(math.log(scores[n]) for scores in common) / len(common) if common else 0.0
        leads = sum(key_of(tied[n]) in neighbour.leaders for neighbour in neighbours)
        return round(mean / _STEP), -leads, key_of(tied[n])

    return min(range(len(tied)), key=rank)
