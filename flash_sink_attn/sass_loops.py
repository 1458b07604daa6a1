"""The loops of a Hopper kernel that multiply: what they wait for and when, whether they spill, whether they serialise.

A warp-specialised attention kernel is fast when the softmax of one block runs while the tensor cores are busy. Nothing
in PTX asks for that: the assembler is free to move a wait above the exponentials or the exponentials below it, or to
wait after every product. The machine code says what it did.
"""

from __future__ import annotations

import dataclasses
import functools
import re

from flash_sink_attn.sass_check import Instruction, _Flow, parse

_PRODUCTS = ("HGMMA", "QGMMA", "IGMMA")
_WAIT = "WARPGROUP.DEPBAR"
# An exponential or two per row, for what was summed so far, are no block's.
_BLOCKS_SHARE = 0.9


@dataclasses.dataclass(frozen=True)
class MatrixLoop:
    """An innermost loop that holds matrix products.

    Attributes:
        address: of its first instruction, in bytes.
        code: its instructions by address; spins that the assembler put elsewhere come last.
    """

    address: int
    code: tuple[Instruction, ...]

    @functools.cached_property
    def events(self) -> tuple[str, ...]:
        """In order, from the first product after a wait for all: "shared" and "registers" for products by where their
        first operand lies, "wait N" for waits until at most N groups are pending, "exp"."""
        found = []
        for x in self.code:
            if x.opcode.startswith(_PRODUCTS):
                found.append("registers" if x.a_operand else "shared")
            elif x.opcode.startswith(_WAIT):
                pending = re.search(r"0x([0-9a-f]+)\s*$", x.operands)
                found.append(f"wait {int(pending[1], 16) if pending else 0}")
            elif x.opcode.startswith("MUFU.EX2"):
                found.append("exp")
        start = max((i + 1 for i, event in enumerate(found) if event == "wait 0"), default=0)
        return (*found[start:], *found[:start])

    @property
    def order(self) -> str:
        """The events, equal neighbours as one."""
        return ", ".join(event for i, event in enumerate(self.events) if i == 0 or self.events[i - 1] != event)

    @property
    def spills(self) -> int:
        """Loads from and stores to local memory."""
        return sum(x.opcode.startswith(("LDL", "STL")) for x in self.code)

    @property
    def serialised(self) -> bool:
        """Whether no product begins before the one before it has ended: each is followed by a wait for all."""
        steps = [event for event in self.events if event != "exp"]
        products = [i for i, event in enumerate(steps) if not event.startswith("wait")]
        return len(products) > 1 and all(steps[(i + 1) % len(steps)] == "wait 0" for i in products)

    @property
    def masks(self) -> int:
        """Selections between two floats, as a mask takes one per score."""
        return sum(x.opcode.startswith("FSEL") for x in self.code)

    @property
    def overlap(self) -> float:
        """The share of the exponentials that run while products are pending: after the wait that leaves one group, in
        front of the one that leaves none."""
        pending, inside, total = False, 0, 0
        for event in self.events:
            if event.startswith("wait"):
                pending = event != "wait 0"
            elif event == "exp":
                inside, total = inside + pending, total + 1
        return inside / total if total else 0.0

    @property
    def overlapped(self) -> bool:
        """S of this block, O of the one before, a wait for S alone, the exponentials, a wait for O; and no other."""
        products = [event for event in self.events if event in ("shared", "registers")]
        first = products.index("registers") if "registers" in products else 0
        waits = [event for event in self.events if event.startswith("wait")]
        return (0 < first and set(products[:first]) == {"shared"} and set(products[first:]) == {"registers"}
                and waits == ["wait 1", "wait 0"] and self.overlap >= _BLOCKS_SHARE)


def matrix_loops(sass: str) -> list[MatrixLoop]:
    """The innermost loops with matrix products of one function as ``cuobjdump -sass`` prints it."""
    code = parse(sass)
    if not code:
        return []
    flow = _Flow(code)
    loops = []
    for body in flow.loops().values():
        own = {i for block in body for i in range(*flow.bounds[block])}
        if any(code[i].opcode.startswith(_PRODUCTS) for i in own):
            loops.append(own)
    innermost = [own for own in loops if not any(other < own for other in loops)]
    return [MatrixLoop(code[min(own)].address, tuple(code[i] for i in sorted(own))) for own in
            sorted(innermost, key=min)]
