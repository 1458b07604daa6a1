"""How a run ended and where its time went: what the terminal shows and summary.json keeps."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """How a run ended.

    Attributes:
        run_dir: where its files are.
        counts: rows by status, of the whole run directory.
        new_rows: rows written this time.
        remaining: trials and finals of the phase it stopped in that have no row yet.
        stopped: "" (complete), "interrupted" or "limit".
        elapsed_s: of this time.
        gpu_busy: share of the elapsed time in which some worker had the device to itself and prepared inputs, ran,
            checked or timed on it.
        seconds: where the workers' time went, by stage, all of them together; "idle" is time without a trial to run,
            "waiting" time in which another had the device, "starting" that of new workers.
        workers: the same by worker ("ours", "peers", "peers 2").
        new_finals: finals written this time.
        cache_hits, cache_misses: configurations of ours that lay in Triton's cache on disk, and that had to be built.
    """

    run_dir: Path
    counts: dict[str, int]
    new_rows: int
    remaining: int
    stopped: str
    elapsed_s: float
    gpu_busy: float
    seconds: dict[str, float]
    workers: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)
    new_finals: int = 0
    cache_hits: int = 0
    cache_misses: int = 0

    @property
    def interrupted(self) -> bool:
        return self.stopped == "interrupted"

    @property
    def cached_share(self) -> float | None:
        """Share of our configurations that were found built: 0 is a cold run, 1 a warm one; None = nothing to build."""
        asked = self.cache_hits + self.cache_misses
        return self.cache_hits / asked if asked else None

    def sitting(self) -> dict[str, Any]:
        """What summary.json keeps of it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "run_dir"}
        return fields | {"elapsed_s": round(self.elapsed_s, 3), "gpu_busy": round(self.gpu_busy, 4),
                         "cached_share": self.cached_share}
