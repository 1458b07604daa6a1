"""The estimate of the Hopper kernels' times, against what an H200 measured."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

from flash_sink_attn.config import HopperBwdForm
from flash_sink_attn.estimate import Kind, microseconds, rows_time
from flash_sink_attn.regimes import kinds
from flash_sink_attn.tuned_table import ShapeKey

MEASURED = Path(__file__).parent / "data/h200-kinds.csv"
LATE_HOST = 1.15  # of the lowest sample: from here on the median is the host's time


def measured(ordered: bool) -> dict[ShapeKey, dict[Kind, float]]:
    """Microseconds by shape and kind, of rows that the host was in time for."""
    found: dict[ShapeKey, dict[Kind, float]] = defaultdict(dict)
    for row in csv.DictReader(MEASURED.open()):
        d, n, us = int(row["head_dim"]), int(row["tokens"]), float(row["median_us"])
        if us < LATE_HOST * float(row["lowest_us"]) and ordered == (row["ordered"] == "1"):
            key = ShapeKey.fixed("bfloat16", d, d, int(row["heads_q"]), int(row["heads_kv"]),
                                 int(row["window"]) if row["window"] else None, 1, n, n)
            found[key][Kind(HopperBwdForm(int(row["form"])), int(row["shares"]))] = us
    return found


def test_the_kind_it_names_is_among_the_fastest_that_were_measured() -> None:
    behind = {}
    for key, times in measured(False).items():
        worth = [kind for kind in kinds(key) if kind in times]
        if len(worth) > 1 and (key.window is None or key.window <= 256):
            chosen = min(worth, key=lambda kind: microseconds(key, kind))
            behind[key] = times[chosen] / min(times[kind] for kind in worth)
    assert len(behind) > 110
    assert statistics.mean(behind.values()) < 1.015 and max(behind.values()) < 1.2, max(behind, key=behind.__getitem__)
    assert sum(x > 1.05 for x in behind.values()) <= 0.1 * len(behind)


def test_its_error_is_a_few_percent() -> None:
    for ordered, most in ((False, 0.05), (True, 0.1)):
        errors = [abs(math.log(microseconds(key, kind, ordered) / us)) for key, times in measured(ordered).items()
                  if key.window is None or key.window <= 256 for kind, us in times.items()]
        assert len(errors) > 20 and statistics.median(errors) < most, (ordered, statistics.median(errors))


def test_rows_time_counts_what_the_longest_program_goes_through() -> None:
    one = ShapeKey.fixed("bfloat16", 64, 64, 1, 1, None, 1, 256, 256)
    assert rows_time(one, 256, 64) == 256 * (256 + 128)  # one tile, and what any costs
    assert rows_time(one, 192, 128) == 192 * (256 + 128)  # the second of two tiles sees all keys
    assert rows_time(one._replace(window=100), 192, 128) == 192 * (256 + 128)  # and the first block of them, too
    assert rows_time(one._replace(seqlen_q=64, seqlen_k=320), 64, 64) == 64 * (320 + 128)
    even = one._replace(heads_q=132 * 13, heads_kv=132 * 13)
    assert rows_time(even, 256, 64) == 13 * rows_time(one, 256, 64)
    assert rows_time(one._replace(seqlen_q=0, seqlen_k=0), 256, 64) == 0
