"""What a contest found, and the fields that the finals' log has of it."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

from sweeps.energy import Energy
from sweeps.paired import Standing
from sweeps.sensors import Reading, summary


@dataclasses.dataclass(frozen=True)
class FinalTiming:
    """Samples of a contest and how they came about. Times in milliseconds; lists are in the order of the calls.

    Attributes:
        samples_ms: per entrant, block by block; one that dropped out has fewer. Equal positions are of one block. Of a
            winner the last may be of blocks with nobody else in them.
        standing: how it ended.
        stop_reason: "winner" (all others are slower), "tie" (those left are as good as each other), "precision",
            "time", "samples", or "alone" (nobody to compare with).
        mode: "spin", "host_bound" or "cpu".
        note: what a reader must know about the times, "" = nothing.
        host_ms: what the host needs to queue each call.
        wall_samples_ms: per entrant, what a caller waits, block by block; empty where not asked for.
        wall_source: which clock took them, "" = none did.
        energy: of those that may be chosen; None for the others and where the card does not tell.
        late_blocks, retaken_blocks: thrown away because the host came late, or heat held the card back.
        readings: the sensors, chunk by chunk.
        seed: of the random order.
        tie_margin: by how much rivals may differ and still be as good as each other.
        block_placements: of each block, the number of the placement that it was taken on.
        placements_note: why there are not as many placements as were asked for, "" = there are.
        tainted: the process should be replaced, because a failed graph capture may have left traces.
        incomplete: what could not be taken once the contest was decided, and why; part of ``note``. "" = nothing.
    """

    samples_ms: tuple[tuple[float, ...], ...]
    standing: Standing
    stop_reason: str
    mode: str
    note: str
    host_ms: tuple[float, ...]
    wall_samples_ms: tuple[tuple[float, ...], ...]
    wall_source: str
    energy: tuple[Energy | None, ...]
    late_blocks: int
    retaken_blocks: int
    readings: tuple[Reading, ...]
    seed: int
    tie_margin: float
    block_placements: tuple[int, ...] = ()
    placements_note: str = ""
    tainted: bool = False
    incomplete: str = ""

    def row_fields(self) -> dict[str, Any]:
        """The record's fields, JSON-able. ``entrants`` has one dict per call, in their order; ``block_placements`` is
        empty where all blocks had the same."""
        entrants = []
        count = len(set(self.block_placements))
        for n, samples in enumerate(self.samples_ms):
            own, walls, energy = self.standing.ratios[n], self.wall_samples_ms[n], self.energy[n]
            entrants.append({
                "samples_ms": [round(ms, 6) for ms in samples], "samples": len(samples),
                "latency_ms": statistics.median(samples), "ratio": own.ratio, "ratio_low": own.low,
                "ratio_high": own.high, "tied": n in self.standing.tied, "host_ms": self.host_ms[n],
                "wall_ms": statistics.median(walls) if walls else None,
                "wall_samples_ms": [round(ms, 6) for ms in walls],
                **(energy.fields() if energy else {"energy_j": None})})
        described = summary(self.readings)
        return {"entrants": entrants, "stop_reason": self.stop_reason, "blocks": max(map(len, self.samples_ms)),
                "timing": self.mode, "note": self.note, "wall_source": self.wall_source, "seed": self.seed,
                "tie_margin": self.tie_margin, "placements": count, "placements_note": self.placements_note,
                "block_placements": list(self.block_placements) if count > 1 else [],
                "late_blocks": self.late_blocks, "retaken_blocks": self.retaken_blocks,
                **described, "throttle": list(described["throttle"])}
