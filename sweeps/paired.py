"""Who is faster, from samples taken in pairs: whatever slows both members of a pair drops out of their ratio.

The interval is that of the Wilcoxon signed-rank test: order statistics of the Walsh averages, the means of all pairs of
log-ratios. It needs no normal noise, only that the log-ratios lie symmetrically about their middle, as differences of
equally shaped noise do; single samples far off do not move it, as they would a t interval; and unlike the order
statistics of the log-ratios themselves it resolves less than a tick of the event clock (32 ns, 0.2% of a 16 us kernel),
where many samples are equal.

Which of two short kernels is faster can depend on where the tensors lie in memory: by 1 to 2% of a backward of 50 us,
constant in a process and other in the next. Blocks that go round several placements of the inputs show it. But blocks
on one placement share its effect, and Wilcoxon's interval, which takes all blocks for independent, gets as narrow as
one likes about what is true of these placements only. So the interval is widened until it holds the middle of every
placement. The range of the middles of K placements holds the median over all there could be with a confidence of
1 - 2 ** (1 - K), however they are distributed (4: 87.5%), and more blocks cannot improve on it; Wilcoxon's interval
stands for the noise, at 99%. In other words, a rival is slower by more than a margin when Wilcoxon's interval says so
and the middle of no placement contradicts.

Every placement has to show the margin, and not just "slower": of equal rivals that placements move apart by 1%
(standard deviation), 4 of 4 placements show 0.3% the same way in 4% of contests, and anything the same way in 12.5%,
while one placement alone names a winner in 56%. An interval of Student's t from 4 middles would be as honest, but is
several times as wide where placements do not matter. This one costs next to nothing there: a rival slower by 1% is
found after 12 blocks instead of 11 (noise 0.4%), one slower by 2% after 8 as before, since Wilcoxon's interval of 8
blocks is their whole range, so that each of them must show the margin anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np

# At each look. With at most nine looks at growing counts, an equal rival is called slower in less than 5% of contests.
CONFIDENCE = 0.99
MIN_PAIRS = 8  # the fewest that have an interval at this confidence
_EXACT_UP_TO = 40


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A time over another's: the estimate and its interval. 1.02 = 2% slower.

    Attributes:
        ratio: the estimate.
        low, high: the interval, Wilcoxon's and every placement's middle.
        half_width: of Wilcoxon's interval alone, which more blocks make narrower.
    """

    ratio: float
    low: float
    high: float
    half_width: float = 0.0

    def within(self, margin: float) -> bool:
        """Whether the whole interval lies within 1 +- margin."""
        return 1 - margin <= self.low and self.high <= 1 + margin


def ratio(reference: Sequence[float], rival: Sequence[float], confidence: float = CONFIDENCE,
          placements: Sequence[int] = ()) -> Ratio:
    """The rival's time over the reference's, from the pairs that both have: equal positions belong to one moment.

    Args:
        reference, rival: samples in any one unit, positive. Of unequal lengths, the common beginning counts.
        confidence: of Wilcoxon's interval. Where the pairs are too few for it, their whole range is returned.
        placements: of each position, which placement of the inputs it was taken on; () = all on one.

    Raises:
        ValueError: no pair, or pairs without a placement beside others that have one.
    """
    pairs = min(len(reference), len(rival))
    if pairs == 0:
        raise ValueError("samples: expected at least one pair, got none")
    if placements and len(placements) < pairs:
        raise ValueError(f"placements: expected one for each of {pairs} pairs, got {len(placements)}")
    logs = np.log(np.asarray(rival[:pairs], dtype=float)) - np.log(np.asarray(reference[:pairs], dtype=float))
    walsh = _walsh(logs)
    rank = _rank(pairs, confidence)
    low, high = (walsh[rank - 1], walsh[-rank]) if rank else (walsh[0], walsh[-1])
    where = np.asarray(placements[:pairs])
    middles = [np.median(_walsh(logs[where == placement])) for placement in set(placements[:pairs])]
    return Ratio(math.exp(float(np.median(walsh))), math.exp(min([low, *middles])), math.exp(max([high, *middles])),
                 (math.exp(high) - math.exp(low)) / 2)


def _walsh(logs: np.ndarray) -> np.ndarray:
    """The Walsh averages, ascending."""
    first, second = np.triu_indices(len(logs))
    return np.sort((logs[first] + logs[second]) / 2)


@functools.lru_cache(maxsize=4096)
def _rank(count: int, confidence: float) -> int:
    """Which Walsh average, counted from both ends, bounds the interval; 0 = too few pairs for this confidence."""
    tail = (1 - confidence) / 2
    total = count * (count + 1) // 2
    if count > _EXACT_UP_TO:
        deviation = math.sqrt(count * (count + 1) * (2 * count + 1) / 24)
        return max(0, math.floor(total / 2 + statistics.NormalDist().inv_cdf(tail) * deviation))
    ways = [1] + [0] * total  # subsets of the ranks 1 .. count by their sum: the statistic's null distribution
    for rank in range(1, count + 1):
        for value in range(total, rank - 1, -1):
            ways[value] += ways[value - rank]
    below = 0
    for value, number in enumerate(ways):
        below += number
        if below > tail * 2**count:
            return value
    return 0


@dataclasses.dataclass(frozen=True)
class Standing:
    """How a contest stands.

    Attributes:
        best: index of the fastest.
        ratios: each one's time over the best's, in the order given; exactly 1 for the best itself.
        tied: indices of those that are not known to be slower by more than the margin, the best first, then by ratio.
        decided: whether every rival is known to be slower by more than that, or as good within it.
        half_width: of the widest undecided ratio, by Wilcoxon's interval; 0 where all are decided.
    """

    best: int
    ratios: tuple[Ratio, ...]
    tied: tuple[int, ...]
    decided: bool
    half_width: float


def standing(samples: Sequence[Sequence[float]], tie_margin: float, placements: Sequence[int] = ()) -> Standing:
    """Compares contestants timed in blocks, each once per block.

    Args:
        samples: per contestant, block by block. One that dropped out as slower has fewer than the others.
        tie_margin: a rival whose whole interval lies within 1 +- this is as good as the best.
        placements: of each block, which placement of the inputs all of it was taken on; () = all on one.

    A rival is slower when its whole interval lies above 1 + margin, which is so in every placement then, or when it
    dropped out; with fewer than ``MIN_PAIRS`` blocks nobody is known to be slower.
    """
    blocks = max(map(len, samples))
    running = [i for i, own in enumerate(samples) if len(own) == blocks]
    best = _fastest(samples, running)
    ratios = tuple(Ratio(1.0, 1.0, 1.0) if i == best else ratio(samples[best], own, placements=placements)
                   for i, own in enumerate(samples))
    enough = blocks >= MIN_PAIRS
    tied = [i for i in running if i != best and (not enough or ratios[i].low <= 1 + tie_margin)]
    undecided = [ratios[i].half_width for i in tied if not (enough and ratios[i].within(tie_margin))]
    return Standing(best, ratios, (best, *sorted(tied, key=lambda i: (ratios[i].ratio, i))), not undecided,
                    max(undecided, default=0.0))


def _fastest(samples: Sequence[Sequence[float]], running: Sequence[int]) -> int:
    """Lowest trimmed mean of the logs, each taken relative to its block; the first of equal ones."""
    logs = np.log(np.asarray([samples[i] for i in running], dtype=float))
    centred = np.sort(logs - logs.mean(axis=0), axis=1)
    cut = centred.shape[1] // 5
    means = centred[:, cut:centred.shape[1] - cut].mean(axis=1)
    return running[int(np.argmin(means))]
