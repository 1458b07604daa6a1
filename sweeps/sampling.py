"""How long to sample: the one definition of what the ``timing`` section of a config and the timing code share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, StrictBool

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(gt=0)]

# Half a 95% interval of the median, relative to it. On an H100 beside peers that were preparing theirs 23 of 2,000 rows
# were beyond it, with a median of up to 2.5 times the right one.
DISTURBED = 0.05


@dataclasses.dataclass(frozen=True)
class Sampling:
    """When to stop sampling one call on its own.

    Attributes:
        precision: sampling stops once half the 95% interval of the median is below this share of it; default 0.01.
        min_samples: never fewer on a GPU, unless ``max_ms`` is over after three; default 10. At least 6 are needed for
            an interval.
        max_samples: never more; default 200.
        max_ms: sampling also stops after this time, milliseconds, flushes and spins included; default 150.
        warmup_ms: calls before the first sample, milliseconds; default 10.
        wall_ms: time for the samples of wall_ms, milliseconds; default 20, 0 = none.
    """

    precision: Positive = 0.01
    min_samples: Count = 10
    max_samples: Count = 200
    max_ms: Positive = 150.0
    warmup_ms: NonNegative = 10.0
    wall_ms: NonNegative = 20.0


@dataclasses.dataclass(frozen=True)
class FinalSampling:
    """When to stop timing the finalists of a case against each other.

    Attributes:
        precision: blocks stop once half the interval of every undecided ratio is below this share; default 0.003.
        tie_margin: rivals whose whole interval lies within 1 +- this share are as good as each other, and one is slower
            when its whole interval lies above; default 0.003.
        max_blocks: never more blocks (each entrant once, in random order); default 200.
        max_ms: blocks also stop after this time, milliseconds, flushes and spins included; default 300.
        warmup_ms: calls of each entrant before the first block, milliseconds; default 3.
        wall_ms: time for wall-clock blocks of all entrants together, milliseconds; default 20, 0 = none.
        energy_ms: how long the winner of a whole pass is repeated to measure its energy, milliseconds; default 150,
            0 = not at all.
        placements: how many copies of the inputs, each elsewhere in memory, the blocks go round; default 4, 1 = one
            place for all blocks. Fewer where memory is short, and one where a call takes longer than a millisecond: a
            final's record says how many there were, and why not as many as asked for.
        race: default true: who is slower drops out, and it is over when the fastest is known. False: all run until
            every ratio is known to ``precision``, or one of the limits.
    """

    precision: Positive = 0.003
    tie_margin: NonNegative = 0.003
    max_blocks: Count = 200
    max_ms: Positive = 300.0
    warmup_ms: NonNegative = 3.0
    wall_ms: NonNegative = 20.0
    energy_ms: NonNegative = 150.0
    placements: Count = 4
    race: StrictBool = True


def disturbed(fields: Mapping[str, Any]) -> bool:
    """Whether somebody else's work on the device is likely to be in a trial's times.

    Others were preparing theirs meanwhile, and the time limit came before the median was known to DISTURBED. Of fewer
    than six samples, which have no interval, the range counts.
    """
    samples, latency = fields.get("samples_ms") or (), fields.get("latency_ms")
    if not samples or not latency or not fields.get("overlapped") or fields.get("stop_reason") != "time":
        return False
    half_width = fields.get("half_width")
    if half_width is None:
        half_width = (max(samples) - min(samples)) / 2 / latency
    return bool(half_width > DISTURBED)
