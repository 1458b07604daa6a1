"""Loops that multiply, found and judged in small listings that look like cuobjdump's."""

from __future__ import annotations

import pytest

from flash_sink_attn.sass_loops import matrix_loops

QK = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, !UPT"
PV = "HGMMA.64x64x16.F32.BF16 R88, R132, gdesc[UR24].tnspB, R88"
ONE, ALL = "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
EXP, MASK = "MUFU.EX2 R4, R4", "FSEL R4, R4, -INF , P0"


def listing(*code: str) -> str:
    """Instructions 16 bytes apart; "@name" stands for the address of the line that begins with "name:"."""
    places = {line.partition(":")[0]: 16 * i for i, line in enumerate(code) if ":" in line}
    lines = []
    for i, line in enumerate(code):
        text = line.partition(":")[2] if ":" in line else line
        for name, address in places.items():
            text = text.replace(f"@{name}", f"0x{address:x}")
        lines.append(f"        /*{16 * i:04x}*/                   {text} ;    /* 0x0 */")
    return "\n".join(lines)


def loop(*body: str) -> str:
    """A loop in a loop, with a product behind it that belongs to the outer one."""
    return listing("MOV R1, R2", "outer:MOV R3, RZ", f"inner:{body[0]}", *body[1:], "@P0 BRA @inner", PV, ALL,
                   "@P1 BRA @outer", "EXIT")


@pytest.mark.parametrize(("body", "overlapped", "serialised", "overlap"), [
    ([QK, QK, PV, PV, ONE, EXP, EXP, ALL], True, False, 1.0),
    ([EXP, EXP, ALL, QK, QK, PV, PV, ONE], True, False, 1.0),  # where the loop begins is the assembler's choice
    ([QK, QK, PV, PV, ONE, ALL, EXP, EXP], False, False, 0.0),
    ([QK, QK, PV, PV, ONE, EXP, ALL, EXP], False, False, 0.5),
    ([QK, QK, ALL, EXP, EXP, PV, PV, ALL], False, False, 0.0),
    ([QK, ALL, QK, ALL, PV, ALL, PV, ALL, EXP], False, True, 0.0),
    ([PV, PV, QK, QK, ONE, EXP, ALL], False, False, 1.0),
    ([QK, QK, ALL], False, False, 0.0),
])
def test_when_the_exponentials_run(body: list[str], overlapped: bool, serialised: bool, overlap: float) -> None:
    (found,) = matrix_loops(loop(*body))
    assert (found.overlapped, found.serialised, found.overlap) == (overlapped, serialised, overlap)


def test_a_loop_is_read_where_it_is_innermost() -> None:
    (found,) = matrix_loops(loop(QK, MASK, PV, ONE, "STL [R1], R2", EXP, "LDL.LU R2, [R1]", ALL))
    assert (found.address, found.masks, found.spills) == (0x20, 1, 2)
    assert found.order == "shared, registers, wait 1, exp, wait 0"
    assert matrix_loops(loop(EXP)) != []  # then the outer one is innermost
    assert matrix_loops(listing("a:MOV R1, R2", "@P0 BRA @a", QK, "EXIT")) == [] == matrix_loops("")


def test_partitions_that_only_a_table_leads_to() -> None:
    """Each of a warp-specialised kernel's is a loop that begins where the table points, so nothing falls into it."""
    part = [QK, PV, ONE, EXP, ALL]
    text = listing("BRX R2 -0x80", f"first:{part[0]}", *part[1:], "@P0 BRA @first", "BRA @join",
                   f"second:{part[0]}", *part[1:], "@P0 BRA @second", "join:EXIT")
    assert [(x.address, x.overlapped) for x in matrix_loops(text)] == [(0x10, True), (0x80, True)]


def test_a_spin_that_lies_elsewhere_is_no_loop_of_its_own() -> None:
    text = listing("MOV R1, R2", f"loop:{QK}", PV, ONE, EXP, "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2",
                   "@!P0 BRA @spin", f"back:{ALL}", "@P1 BRA @loop", "EXIT",
                   "spin:SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R1], R2", "@!P0 BRA @spin", "BRA @back")
    (found,) = matrix_loops(text)
    assert found.overlapped and found.address == 0x10 and len(found.code) == 11
