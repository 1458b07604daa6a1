"""Machine code in which a loop overwrites an operand it still needs is told from code that is sound."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flash_sink_attn.sass_check import parse, register_fault

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(__file__).parent / "data"

# An attention forward in one loop. The 5-D tile of Q lands in registers, as does P; with PIN the loop takes a copy of Q
# that the compiler cannot see through, which keeps the two apart.
KERNEL = '''
import json, os, subprocess, sys, tempfile
import torch, triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor
from flash_sink_attn import compile_only, kernel_cache
from flash_sink_attn.sass_check import register_fault

@triton.jit
def attend(Q, K, V, O, keys, scale, BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PIN: tl.constexpr):
    first = tl.program_id(0) * BM
    q = Q.load([0, first, 0, 0, 0]).reshape([BM, D])
    row = first + tl.arange(0, BM)
    m = tl.full([BM], -1e38, tl.float32)
    l = tl.full([BM], 0.0, tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for n in tl.range(0, keys, BN):
        a = q
        if PIN:
            a = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [q], dtype=q.dtype, is_pure=False, pack=2)
        s = tl.dot(a, K.load([n, 0]).T)
        s = tl.where((n + tl.arange(0, BN))[None, :] <= row[:, None], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1) * scale)
        p = tl.math.exp2(s * scale - m_new[:, None])
        alpha = tl.math.exp2(m - m_new)
        l = l * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(q.dtype), V.load([n, 0]), acc * alpha[:, None])
        m = m_new
    O.store([first, 0], (acc / l[:, None]).to(q.dtype))

def built(pin):
    tensor = torch.empty(512, 64, dtype=torch.bfloat16, device="meta")
    of = lambda x, block: TensorDescriptor(x, list(x.shape), list(x.stride()), block)
    q = of(tensor.view(1, 512, 1, 1, 64), [1, 64, 1, 1, 64])
    flat = of(tensor, [64, 64])
    return compile_only._inspect(attend.warmup(q, flat, flat, flat, 512, 0.125, BM=64, BN=64, D=64, PIN=pin,
                                               num_warps=4, num_stages=2, grid=(8,)))

compile_only.set_target(90)
release = kernel_cache.key_facts(90)["ptxas"].split("_")[1].split(".r")[0]
print(json.dumps([release, built(False).fault, built(True).fault]))
'''


def test_the_fault_is_seen_in_code_that_ptxas_12_8_made() -> None:
    said = register_fault((DATA / "ptxas-12.8-fault.sass").read_text())
    assert said is not None
    assert "the compiled loop at 0xb70 overwrites R88 at 0x1ea0 (F2FP" in said
    assert "HGMMA.64x64x16.F32.BF16 at 0xd60 still needs as it was written at 0x740 (LDSM" in said


def test_the_same_kernel_with_a_copy_of_q_is_sound() -> None:
    assert register_fault((DATA / "ptxas-12.8-sound.sass").read_text()) is None


def test_the_installed_compiler_is_told_right_or_wrong(tmp_path: Path) -> None:
    """ptxas 12.8 (Triton 3.6) miscompiles the kernel, 13.4 (Triton 3.9) does not; the pinned one is sound with both."""
    script = tmp_path / "attend.py"
    script.write_text(KERNEL)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    env |= {"PYTHONPATH": paths, "FLASH_SINK_ATTN_COMPILE_ONLY": "1", "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    release, plain, pinned = json.loads(done.stdout.splitlines()[-1])
    assert pinned is None
    version = tuple(map(int, release.split(".")))
    if version <= (13, 0):
        assert plain is not None and "overwrites" in plain
    elif version >= (13, 4):
        assert plain is None


def code(*lines: str) -> str:
    return "\n".join(f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines))


LOAD = "LDSM.16.M88.4 R8, [R2]"
USE = "HGMMA.64x64x16.F32.BF16 R24, R8, gdesc[UR4], RZ, !UPT"
BACK = "@!P0 BRA 0x10"


@pytest.mark.parametrize(
    "lines,faulty",
    [
        ((LOAD, USE, "FADD R20, R20, R21", BACK, "EXIT"), False),
        ((LOAD, USE, "F2FP.BF16.F32.PACK_AB R9, R25, R24", BACK, "EXIT"), True),
        # written only after the loop
        ((LOAD, USE, BACK, "F2FP.BF16.F32.PACK_AB R9, R25, R24", "EXIT"), False),
        # loaded again for the next turn: a software pipeline
        ((LOAD, USE, "LDSM.16.M88.4 R8, [R3]", BACK, "EXIT"), False),
        # made anew in every turn before it is used
        ((LOAD, "LDSM.16.M88.4 R8, [R3]", USE, "F2FP.BF16.F32.PACK_AB R9, R25, R24", BACK, "EXIT"), False),
        # a carried operand that nobody else uses: P of the turn before
        (("MOV R8, RZ", USE, "F2FP.BF16.F32.PACK_AB R8, R25, R24", BACK, "EXIT"), False),
        # two operands in the same registers, the first of them computed before the loop
        (("MOV R8, R3", USE, "F2FP.BF16.F32.PACK_AB R8, R25, R24",
          "HGMMA.64x64x16.F32.BF16 R56, R8, gdesc[UR4].tnspB, R56", BACK, "EXIT"), True),
        # a wide write that reaches into the operand from below
        ((LOAD, USE, "LDG.E.128 R4, [R2]", "IMAD.WIDE R10, R4, R5, R6", BACK, "EXIT"), True),
        # the operand comes from shared memory: nothing to overwrite
        ((LOAD, "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT", "F2FP.BF16.F32.PACK_AB R9, R25, R24", BACK,
          "EXIT"), False),
    ],
)
def test_what_is_a_fault_and_what_is_not(lines: tuple[str, ...], faulty: bool) -> None:
    assert (register_fault(code(*lines)) is not None) == faulty


def test_a_retry_block_behind_the_end_is_no_loop_around_everything() -> None:
    """Waits for a barrier lie behind the function and jump back into the loop; the epilogue may reuse registers."""
    lines = (LOAD, "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R30]", "@!P1 BRA 0x70", USE, "@!P0 BRA 0x10",
             "F2FP.BF16.F32.PACK_AB R9, R25, R24", "EXIT", "@!P1 BRA 0x70", "BRA 0x30")
    assert register_fault(code(*lines)) is None


def test_instructions_are_read_with_predicate_operands_and_widths() -> None:
    load, product, branch = parse(code("@!P2 LDG.E.64 R6, [R2.64]", "HGMMA.64x128x16.F16 R40, R8, gdesc[UR4], R40",
                                       "@P0 BRA 0x10"))
    assert (load.predicate, load.opcode, list(load.writes)) == ("@!P2", "LDG.E.64", [6, 7])
    assert list(product.writes) == list(range(40, 72)) and list(product.a_operand) == [8, 9, 10, 11]
    assert branch.target == 0x10 and branch.falls_through and not branch.writes
