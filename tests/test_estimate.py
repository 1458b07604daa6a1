"""The estimate of the Hopper kernels' times, against what an H200 measured."""

from __future__ import annotations

import csv
import math
import statistics
from collections import defaultdict
from pathlib import Path

import pytest

from flash_sink_attn.config import HopperBwdForm
from flash_sink_attn.estimate import Kind, _steps, microseconds, rows_time
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
        if len(worth) > 1:
            chosen = min(worth, key=lambda kind: microseconds(key, kind))
            behind[key] = times[chosen] / min(times[kind] for kind in worth)
    assert len(behind) > 140
    assert statistics.mean(behind.values()) < 1.012 and max(behind.values()) < 1.2, max(behind, key=behind.__getitem__)
    assert sum(x > 1.05 for x in behind.values()) <= 0.08 * len(behind)


@pytest.mark.parametrize(("form", "ordered", "median", "ninth"), [
    (HopperBwdForm.ACCUMULATE, False, 0.03, 0.1), (HopperBwdForm.ACCUMULATE, True, 0.05, 0.14),
    (HopperBwdForm.RECOMPUTE, False, 0.045, 0.11),
])
def test_its_error_is_a_few_percent(form: HopperBwdForm, ordered: bool, median: float, ninth: float) -> None:
    """The events' own time, some 2.5 us, is in the measured ones."""
    errors = [abs(math.log(microseconds(key, kind, ordered) / us)) for key, times in measured(ordered).items()
              for kind, us in times.items() if kind.form == form]
    assert len(errors) > 30
    assert statistics.median(errors) < median and statistics.quantiles(errors, n=10)[8] < ninth


def test_programs_are_gone_through_as_the_card_takes_them() -> None:
    one = ShapeKey.fixed("bfloat16", 64, 64, 1, 1, None, 1, 256, 256)
    assert _steps(one, 1, 2) == 4 + 2                                    # the first keys, which all queries see
    assert _steps(one._replace(window=64), 1, 2) == 3 + 2                # 128 keys are seen by 191 queries
    assert _steps(one._replace(heads_q=4), 1, 2) == 16 + 2 and _steps(one._replace(heads_q=4), 2, 2) == 8 + 2
    assert _steps(one._replace(seqlen_q=64), 1, 2) == 1 + 2              # the last queries see all keys
    assert _steps(one._replace(batch=67), 1, 2) == (4 + 2) + (2 + 2)     # 66 heads at once; one where some ended
    most = one._replace(seqlen_q=128, seqlen_k=128, batch=132 * 12)      # as many as are gone through
    assert _steps(most, 1, 2) == 12 * (2 + 2)
    assert _steps(most._replace(batch=most.batch + 1), 1, 2) == pytest.approx(12.4 * (2 + 2), rel=0.01)
    assert _steps(one._replace(seqlen_q=0, seqlen_k=0), 1, 2) == 2


def test_rows_time_counts_what_the_longest_program_goes_through() -> None:
    one = ShapeKey.fixed("bfloat16", 64, 64, 1, 1, None, 1, 256, 256)
    assert rows_time(one, 256, 64) == 256 * (256 + 128)  # one tile, and what any costs
    assert rows_time(one, 192, 128) == 192 * (256 + 128)  # the second of two tiles sees all keys
    assert rows_time(one._replace(window=100), 192, 128) == 192 * (256 + 128)  # and the first block of them, too
    assert rows_time(one._replace(seqlen_q=64, seqlen_k=320), 64, 64) == 64 * (320 + 128)
    even = one._replace(heads_q=132 * 13, heads_kv=132 * 13)
    assert rows_time(even, 256, 64) == 13 * rows_time(one, 256, 64)
    assert rows_time(one._replace(seqlen_q=0, seqlen_k=0), 256, 64) == 0
