"""How many programs an SM holds at once, from what one of them needs.

Limits are those of the CUDA programming guide (technical specifications per compute capability) and of the rules by
which NVIDIA's occupancy calculator rounds: registers are given to a warp in units of 256, shared memory to a block in
units of 128 bytes with 1024 bytes for the system.
"""

from __future__ import annotations

import dataclasses

REGISTERS = 65536
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SYSTEM_SHARED = 1024

# compute capability -> (warps, blocks, shared memory bytes) of one SM
_SM = {80: (64, 32, 167936), 86: (48, 16, 102400), 87: (48, 16, 167936), 89: (48, 24, 102400),
       90: (64, 32, 233472), 100: (64, 32, 233472), 103: (64, 32, 233472), 120: (48, 24, 102400)}


@dataclasses.dataclass(frozen=True)
class Occupancy:
    """Attributes: blocks (programs) and warps that one SM holds at once, and the resource that sets the limit:
    registers, shared memory, warps or blocks."""

    blocks: int
    warps: int
    limit: str


def occupancy(arch: int, registers: int, shared_bytes: int, num_warps: int) -> Occupancy:
    """Occupancy of a kernel on an SM of compute capability ``arch`` (90 for Hopper).

    Args:
        registers: per thread.
        shared_bytes: of one program.
        num_warps: of one program.

    Raises:
        ValueError: an architecture whose limits are not known, or a program without warps.
    """
    if arch not in _SM:
        raise ValueError(f"arch: expected one of {', '.join(map(str, _SM))}, got {arch}")
    if num_warps < 1:
        raise ValueError(f"num_warps: expected at least 1, got {num_warps}")
    warps, blocks, shared = _SM[arch]
    per_warp = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    # Each of the SM's four quarters has a register file of its own, and a warp lives in one quarter.
    by_registers = 4 * (REGISTERS // 4 // max(per_warp, _REGISTER_UNIT)) // num_warps
    per_block = -(-(shared_bytes + _SYSTEM_SHARED) // _SHARED_UNIT) * _SHARED_UNIT
    found = {"registers": by_registers, "shared memory": shared // per_block, "warps": warps // num_warps,
             "blocks": blocks}
    limit = min(found, key=lambda name: found[name])
    return Occupancy(found[limit], found[limit] * num_warps, limit)
