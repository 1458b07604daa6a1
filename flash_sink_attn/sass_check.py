"""A check of Hopper machine code for operands that are overwritten while a loop still needs them.

ptxas (seen in 12.8 to 13.0; 13.4 is sound) can give two values of a loop the same registers: a loop-invariant A operand
of wgmma, such as the Q tile of a forward, and one made in the loop, such as P. The first turn of the loop is right, all
later ones multiply with P in place of Q. Such a kernel runs, is as fast as a sound one, and is wrong.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P[T0-9]+)\s+)?([A-Z][A-Z0-9_.a-z]*)\s*([^;]*);")
_TENSOR = ("HGMMA", "QGMMA", "IGMMA")
_A_REGISTERS = 4  # per thread: 64 x 16 two-byte, or 64 x 32 one-byte elements over 128 threads
_LOADS = ("LDSM", "LDS", "LDG", "LD", "LDL", "LDC")
# Instructions whose first register is read or is an address.
_NO_RESULT = (
    "ST", "RED", "BAR", "BRA", "BRX", "BSSY", "BSYNC", "EXIT", "UTMA", "UBLK", "SYNCS.ARRIVE", "WARP", "MEMBAR",
    "FENCE", "DEPBAR", "NOP", "CCTL", "ERRBAR", "CALL", "RET", "JMP", "BPT", "ISETP", "FSETP", "HSETP2", "DSETP",
    "PLOP3", "FCHK", "R2UR", "VOTEU", "NANOSLEEP", "USETMAXREG", "ELECT")
_PAIRS = ("DADD", "DFMA", "DMUL", "CS2R")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: byte address in its function, predicate ("" = always executed), opcode with its modifiers, and
    operands as text."""

    address: int
    predicate: str
    opcode: str
    operands: str

    @functools.cached_property
    def writes(self) -> range:
        """The numbers of the general registers it writes; an upper bound where their count is not in the opcode."""
        if self.opcode.startswith(_NO_RESULT):
            return range(0)
        found = re.match(r"(?:U?P[T0-9]+,\s*)*R(\d+)\b", self.operands)
        if not found:
            return range(0)
        first, width = int(found[1]), 1
        if self.opcode.startswith(_TENSOR):
            shape = re.search(r"64x(\d+)x\d+\.F(16|32)", self.opcode)
            width = int(shape[1]) // (4 if shape[2] == "16" else 2) if shape else 1
        elif ".128" in self.opcode or (self.opcode.startswith("LDSM") and self.opcode.endswith(".4")):
            width = 4
        elif ".64" in self.opcode or ".WIDE" in self.opcode or (
                self.opcode.startswith("LDSM") and self.opcode.endswith(".2")) or (
                self.opcode.startswith(_PAIRS) and ".32" not in self.opcode):
            width = 2
        return range(first, first + width)

    @functools.cached_property
    def a_operand(self) -> range:
        """Of a tensor-core instruction that takes its first operand from registers: their numbers."""
        found = re.match(r"R\d+,\s*R(\d+)\b", self.operands) if self.opcode.startswith(_TENSOR) else None
        return range(int(found[1]), int(found[1]) + _A_REGISTERS) if found else range(0)

    @functools.cached_property
    def target(self) -> int | None:
        """Where a branch goes."""
        found = re.search(r"\b0x([0-9a-f]+)\s*$", self.operands) if self.opcode.startswith(("BRA", "JMP")) else None
        return int(found[1], 16) if found else None

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction can be the one that follows."""
        ends = self.opcode.startswith(("BRA", "BRX", "JMP", "EXIT", "RET"))
        conditional = self.predicate not in ("", "@PT") or re.match(r"!?U?P\d", self.operands) is not None
        return not ends or conditional or ".DIV" in self.opcode


def parse(sass: str) -> list[Instruction]:
    """The instructions of one function as ``cuobjdump -sass`` prints them."""
    return [Instruction(int(m[1], 16), m[2] or "", m[3], m[4].strip()) for m in map(_LINE.search, sass.splitlines())
            if m]


class _Flow:
    """Basic blocks of a function: where they lie, who follows whom, and which blocks form loops."""

    def __init__(self, code: list[Instruction]) -> None:
        index = {instruction.address: i for i, instruction in enumerate(code)}
        starts = {0} | {index[t] for instruction in code if (t := instruction.target) in index}
        starts |= {i + 1 for i, x in enumerate(code[:-1]) if x.target is not None or not x.falls_through}
        self.bounds = list(zip(sorted(starts), [*sorted(starts)[1:], len(code)], strict=True))
        block_at = {start: number for number, (start, _) in enumerate(self.bounds)}
        self.successors: list[set[int]] = []
        for _, end in self.bounds:
            last = code[end - 1]
            after = {block_at[index[t]]} if (t := last.target) in index else set()
            if last.falls_through and end in block_at:
                after.add(block_at[end])
            self.successors.append(after)
        self.predecessors: list[set[int]] = [set() for _ in self.bounds]
        for block, after in enumerate(self.successors):
            for other in after:
                self.predecessors[other].add(block)

    def _roots(self) -> set[int]:
        """The first block, and where jumps by a table (of warp-specialised kernels) go: of what nothing else reaches,
        the block that lies first."""
        roots: set[int] = set()
        reached: set[int] = set()
        for block in range(len(self.bounds)):
            if block in reached:
                continue
            roots.add(block)
            waiting = [block]
            while waiting:
                if (member := waiting.pop()) not in reached:
                    reached.add(member)
                    waiting += self.successors[member]
        return roots

    def loops(self) -> dict[int, set[int]]:
        """Header block -> the blocks of its natural loop (Aho, Sethi and Ullman, 9.6)."""
        everything = set(range(len(self.bounds)))
        roots = self._roots()
        dominators = [{block} if block in roots else set(everything) for block in everything]
        changed = True
        while changed:
            changed = False
            for block in sorted(everything - roots):
                before = [dominators[p] for p in self.predecessors[block]]
                found = (set.intersection(*before) if before else set()) | {block}
                changed |= found != dominators[block]
                dominators[block] = found
        loops: dict[int, set[int]] = {}
        for block, after in enumerate(self.successors):
            for header in after & dominators[block]:
                body, waiting = loops.setdefault(header, {header}), [block]
                while waiting:
                    if (member := waiting.pop()) not in body:
                        body.add(member)
                        waiting += self.predecessors[member]
        return loops


def _reaching(code: list[Instruction], flow: _Flow, register: int, uses: Iterable[int]) -> dict[int, set[int]]:
    """For every use (an instruction's index) the writes of ``register`` that can have made what it reads."""
    writes = {i for i, instruction in enumerate(code) if register in instruction.writes}

    def through(block: int, live: set[int], stop: int | None = None) -> set[int]:
        start, end = flow.bounds[block]
        for i in range(start, end if stop is None else stop):
            if i in writes:
                live = {i} if not code[i].predicate else live | {i}  # under a predicate the old value may survive
        return live

    entry: list[set[int]] = [set() for _ in flow.bounds]
    waiting = list(range(len(flow.bounds)))
    while waiting:
        block = waiting.pop(0)
        out = through(block, set(entry[block]))
        for after in flow.successors[block]:
            if not out <= entry[after]:
                entry[after] |= out
                waiting.append(after)
    found = {}
    for use in uses:
        block = next(n for n, (start, end) in enumerate(flow.bounds) if start <= use < end)
        found[use] = through(block, set(entry[block]), use)
    return found


def register_fault(sass: str) -> str | None:
    """Why the kernel computes something else than its source says, or None where no such fault is seen.

    A tensor-core instruction X in a loop takes its A operand from registers that were written before the loop, and also
    reads what the loop itself wrote there on its turn before. That is a fault where

    - the write before the loop is a load and the one in the loop is none: a loaded tile is replaced by a computed one;
    - or the value written in the loop belongs to another tensor-core instruction of the loop, which never reads the
      one from before: two values share registers while both are needed.

    A tile that is loaded before the loop for its first turn and loaded again in it for the next one, or an operand
    carried from turn to turn, is neither.

    Args:
        sass: the disassembly of one function (``cuobjdump -sass``).
    """
    code = parse(sass)
    users: dict[int, list[int]] = {}  # register -> tensor-core instructions that read it as A
    for i, instruction in enumerate(code):
        for register in instruction.a_operand:
            users.setdefault(register, []).append(i)
    if not users:
        return None
    flow = _Flow(code)
    loops = [(header, {i for block in body for i in range(*flow.bounds[block])})
             for header, body in flow.loops().items()]
    for register in sorted(users):
        if not any(register in code[i].writes for _, loop in loops for i in loop):
            continue
        reaching = _reaching(code, flow, register, users[register])
        for header, loop in loops:
            for use in (u for u in users[register] if u in loop):
                before, inside = reaching[use] - loop, reaching[use] & loop
                if not before or not inside:
                    continue
                replaced = (all(_is_load(code[i]) for i in before) and not any(_is_load(code[i]) for i in inside))
                shared = [u for u in users[register] if u in loop and u != use and reaching[u] & inside
                          and not reaching[u] - loop]
                if replaced or shared:
                    first, writer = code[min(before)], code[min(inside)]
                    return (f"the compiled loop at 0x{code[flow.bounds[header][0]].address:x} overwrites R{register} "
                            f"at 0x{writer.address:x} ({writer.opcode}), which {code[use].opcode} at "
                            f"0x{code[use].address:x} still needs as it was written at 0x{first.address:x} "
                            f"({first.opcode}) before the loop")
    return None


def _is_load(instruction: Instruction) -> bool:
    return instruction.opcode.partition(".")[0] in _LOADS
