"""The time below which a configuration should not get on a card, and what holds it there; without running it.

Where :func:`sweeps.cost.floor_ms` asks what the case needs, this asks what the configuration does about it: its tiles
reach over the mask's edge, its programs are indivisible, and only as many of them run at once as fit. With

    programs P, steps n_p of program p (tiles of the streamed side that it visits), N = sum of n_p
    tile = BLOCK_M x BLOCK_N; head dims padded to what the kernel computes (d, dv)
    b = programs an SM holds (occupancy), S = SMs

and for work that an SM does at most at a rate r, of w per step,

    at_least(w / r) = w / r x max(N / S, max n_p, ceil(P / S) x min n_p)

(no SM has less than its share, than the longest program, or than its number of programs times the shortest), it is the
largest of

    memory   compulsory bytes / copy rate                                       (cost.compulsory_bytes, card's ceiling)
    tensor   at_least(2 x tile x GEMM width / (GEMM rate / S))                  GEMM width: fwd d + dv, bwd_dq 2 d + dv,
                                                                                bwd_dkdv 2 d + 2 dv
    exp      at_least(exp2 of the tile and, in fwd, one per row / 16 per clock) 16: CUDA programming guide, throughput
    latency  (STEP + (tensor cycles + exp cycles of one step) / G) / clock
             x max(N / min(P, b x S), max n_p + ENDS)                           G: groups of four warps in a program

The last is Little's law: a step's products, softmax and barrier follow one another in each group of warps, so one
program cannot be faster than their sum, and an SM hides it only with the programs it holds. STEP and ENDS (prologue and
epilogue, in steps) are fitted, see LATENCY_FIT; the three others are hard. Added is START_US, an empty launch.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

from flash_sink_attn.validity import split_head_dim
from sweeps.cases import Case
from sweeps.cost import compulsory_bytes, pairs
from sweeps.devices import Card
from sweeps.occupancy import occupancy

EXP_PER_CLOCK = 16     # of one SM, compute capability 8.x and 9.0
# LATENCY_FIT: chosen out of a grid of values on an H100 sweep of 593 rows, where they keep the prediction below the
# measured time in 99% of the rows; the measured time is 2.2 times the prediction in the median, and between 1.3 and 3.4
# times it in 90% of the rows.
STEP_CYCLES = 300.0
END_STEPS = 2.0
START_US = 2.0
KERNELS = ("fwd", "bwd_dq", "bwd_dkdv")


@dataclasses.dataclass(frozen=True)
class Bound:
    """Attributes: ms (the predicted bound), binds (memory, tensor, exp or latency), parts (ms by those names, without
    the launch), programs, blocks and warps an SM holds, limit (what limits those), waves (programs over what the card
    holds at once), wasted (share of the visited tiles' elements that the mask hides or that lie beyond the ends)."""

    ms: float
    binds: str
    parts: Mapping[str, float]
    programs: int
    blocks: int
    warps: int
    limit: str
    waves: float
    wasted: float


def steps_of(case: Case, config: Mapping[str, Any]) -> Counter[float]:
    """Steps of a program -> how many programs take so many. The ranges are those of the kernels' own loops; a tail of
    TAIL_N keys is as much of a step as it is of BLOCK_N.

    Raises:
        ValueError: a pass of several kernels; each of its kernels has steps of its own.
    """
    if case.pass_ not in KERNELS:
        raise ValueError(f"case: expected a pass of one kernel ({', '.join(KERNELS)}), got {case.pass_}")
    m, n, group = config["BLOCK_M"], config["BLOCK_N"], case.heads_q // case.heads_kv
    sequences = Counter(((length, length) for length in case.seqlens) if case.varlen
                        else [(case.seqlen_q, case.seqlen_k)] * case.batch)
    packed = group if config.get("PACK_GQA") else 1
    found: Counter[float] = Counter()
    tail = config.get("TAIL_N") or 0
    for (len_q, len_k), times in sequences.items():
        offset = len_k - len_q
        if case.pass_ == "bwd_dkdv":
            for first in range(0, len_k, n):
                begin = min(max(first - offset, 0), len_q) // 16 * 16
                end = len_q if case.window is None else max(min(first + n - 1 - offset + case.window, len_q), begin)
                found[-(-(end - begin) // m) * group] += times * case.heads_kv
            continue
        for start in range(0, len_q * packed, m):
            last = min((start + m - 1) // packed, len_q - 1) + offset
            begin = 0 if case.window is None else max(start // packed + offset - case.window + 1, 0)
            whole, rest = divmod(max(last + 1 - begin, 0), n)
            found[whole + (tail / n if 0 < rest <= tail else rest > 0)] += times * case.heads_q // packed
    return found


def gemm_width(case: Case) -> int:
    """Columns of all products of one step, head dims as the kernel pads them."""
    d, dv = sum(split_head_dim(case.head_dim)), sum(split_head_dim(case.head_dim_v))
    return {"fwd": d + dv, "bwd_dq": 2 * d + dv, "bwd_dkdv": 2 * d + 2 * dv}[case.pass_]


def bound(case: Case, config: Mapping[str, Any], card: Card, *, registers: int, shared_bytes: int) -> Bound | None:
    """What binds a configuration of one of our kernels, see the top of this module.

    Args:
        config: TileConfig's fields by name.
        card: its ceilings and its clock.
        registers, shared_bytes: of the compiled kernel, per thread and per program.

    Returns:
        None where no program fits an SM, or nothing is known of the card's clock.
    """
    if not card.boost_mhz:
        return None
    held = occupancy(card.arch, registers, shared_bytes, config.get("num_warps", 4))
    if not held.blocks:
        return None
    steps = steps_of(case, config)
    programs, total = steps.total(), sum(n * times for n, times in steps.items())
    tensor, exp = _cycles(case, config, card)
    chain = max(total / min(programs, held.blocks * card.sms), max(steps) + END_STEPS)
    step = STEP_CYCLES + (tensor + exp) / max(1, config.get("num_warps", 4) // 4)
    parts = _throughput(case, card, steps, tensor, exp) | {"latency": chain * step / card.boost_mhz / 1e3}
    tile = config["BLOCK_M"] * config["BLOCK_N"]
    binds = max(parts, key=lambda name: parts[name])
    return Bound(ms=parts[binds] + START_US / 1e3, binds=binds, parts=parts, programs=programs, blocks=held.blocks,
                 warps=held.warps, limit=held.limit, waves=programs / (held.blocks * card.sms),
                 wasted=1 - useful(case) / (total * tile) if total else 0.0)


def throughput_bound_ms(case: Case, config: Mapping[str, Any], card: Card) -> float | None:
    """The largest of memory, tensor and exp, ms: what is known of a configuration before it is compiled.

    None for a pass of several kernels, a configuration without tiles, or a card whose clock is not known.
    """
    if case.pass_ not in KERNELS or not {"BLOCK_M", "BLOCK_N"} <= set(config) or not card.boost_mhz:
        return None
    return max(_throughput(case, card, steps_of(case, config), *_cycles(case, config, card)).values())


def _cycles(case: Case, config: Mapping[str, Any], card: Card) -> tuple[float, float]:
    """SM cycles of one step: of its products, and of its exponentials."""
    tile = config["BLOCK_M"] * config["BLOCK_N"]
    rate = card.ceiling_tflops * 1e12 / card.sms / ((card.boost_mhz or 0.0) * 1e6)    # FLOPs per clock of one SM
    return (2.0 * tile * gemm_width(case) / rate,
            (tile + (config["BLOCK_M"] if case.pass_ == "fwd" else 0)) / EXP_PER_CLOCK)


def _throughput(case: Case, card: Card, steps: Counter[float], tensor: float, exp: float) -> dict[str, float]:
    programs, total = steps.total(), sum(n * times for n, times in steps.items())
    share = max(total / card.sms, max(steps), math.ceil(programs / card.sms) * min(steps))
    ms = share / ((card.boost_mhz or 0.0) * 1e3)
    return {"memory": compulsory_bytes(case) / (card.ceiling_tb_per_s * 1e9), "tensor": tensor * ms, "exp": exp * ms}


def useful(case: Case) -> float:
    """Visible (query head, query, key) triples."""
    return float(case.heads_q * pairs(case))
