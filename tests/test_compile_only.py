"""Kernels built for Hopper without one: every family becomes tensor-core code that spills nothing, and only once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sink_attn.compile_only import compile_kernel
from flash_sink_attn.config import TileConfig

ROOT = Path(__file__).resolve().parent.parent

SETUP = """
import json, os, sys
from pathlib import Path
import torch
from flash_sink_attn.compile_only import compile_kernel
from flash_sink_attn.config import TileConfig

def build(kernel, tile, **shape):
    shape = dict(batch=2, seqlen_q=4096, seqlen_k=4096, heads_q=64, heads_kv=8, head_dim=64, window=None) | shape
    shape = dict(head_dim_v=shape["head_dim"], dtype=torch.bfloat16) | shape
    return compile_kernel(kernel, TileConfig(**tile), **shape)

def cubins():
    return {path.parent.name for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*.cubin")}
"""


def compiling(code: str, cache: Path) -> list[Any]:
    """What ``code`` printed, as JSON lines, in a process that may compile and has nothing in its cache."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))  # something may be found by it
    env |= {"PYTHONPATH": paths, "FLASH_SINK_ATTN_COMPILE_ONLY": "1", "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, "-c", SETUP + code], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def tile(block_m: int, block_n: int, num_warps: int, num_stages: int, **more: Any) -> dict[str, Any]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps, "num_stages": num_stages, **more}


ONE_LOOP = {"SPLIT_LOOPS": False}
BRANCHES = {"SPLIT_LOOPS": False, "BRANCH_MASKS": True}
D128 = {"head_dim": 128}
MIMO = {"head_dim": 192, "head_dim_v": 128, "window": 128}
VARLEN = {"varlen": True, "window": 128}

# Out of configs/, where they leave registers to spare: (kernel, tile, what the shape is besides gpt-oss, causal).
FAMILIES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("fwd", tile(64, 64, 4, 3), {}),
    ("fwd", tile(64, 32, 4, 2, PACK_GQA=True, **ONE_LOOP), {"window": 128}),
    ("fwd", tile(64, 32, 4, 3, PACK_GQA=True, TMA=True, TAIL_N=16, **BRANCHES), {"window": 128}),
    ("fwd", tile(64, 64, 4, 2, TMA=True), D128),
    ("fwd", tile(64, 32, 4, 2, **ONE_LOOP), D128 | VARLEN | {"dtype": "float16"}),
    ("fwd", tile(64, 32, 4, 2, PACK_GQA=True, **ONE_LOOP), MIMO),
    ("bwd_dq", tile(64, 64, 4, 2), {}),
    ("bwd_dq", tile(64, 32, 4, 2, **ONE_LOOP), D128 | {"window": 256}),
    ("bwd_dq", tile(64, 64, 4, 2, TMA=True, **BRANCHES), {"window": 128}),
    ("bwd_dq", tile(64, 64, 4, 2, **ONE_LOOP), VARLEN | {"dtype": "float16"}),
    ("bwd_dq", tile(64, 32, 4, 2, **ONE_LOOP), MIMO),
    ("bwd_dkdv", tile(32, 64, 4, 3, TMA=True), {}),
    ("bwd_dkdv", tile(64, 64, 4, 3, TMA=True, **BRANCHES), {"window": 128}),
    ("bwd_dkdv", tile(32, 64, 8, 2, **ONE_LOOP), D128 | {"window": 256}),
    ("bwd_dkdv", tile(32, 64, 4, 3, **ONE_LOOP), VARLEN | {"dtype": "float16"}),
    ("bwd_dkdv", tile(32, 64, 8, 2, **ONE_LOOP), MIMO),
]


# Of the selections between two floats in a loop with products, how many a forward jump within the loop can skip.
SKIPPED = """
from flash_sink_attn import compile_only
from flash_sink_attn.sass_loops import matrix_loops

texts = []
facts = compile_only._facts
compile_only._facts = lambda text: texts.append(text) or facts(text)

def masks():
    total = skipped = 0
    for loop in matrix_loops(texts[-1]):
        jumps = [(x.address, x.target) for x in loop.code if x.target is not None]
        end = max(address for address, target in jumps if target == loop.address)
        masks = [x.address for x in loop.code if x.opcode.startswith("FSEL")]
        total += len(masks)
        skipped += sum(any(a < mask < b <= end for a, b in jumps) for mask in masks)
    return total, skipped
"""


def test_every_family_compiles_to_tensor_core_code_without_spills(tmp_path: Path) -> None:
    code = SKIPPED + f"""
for kernel, tile, shape in {FAMILIES!r}:
    shape = shape | {{"dtype": getattr(torch, shape.get("dtype", "bfloat16"))}}
    b = build(kernel, tile, **shape)
    print(json.dumps(dict(registers=b.registers, spills=b.spills, shared=b.shared_bytes, hgmma=b.hgmma,
                          tma=b.tma > 0, binary=b.binary, masks=masks())))
"""
    built = compiling(code, tmp_path)
    assert len({b["binary"] for b in built}) == len(FAMILIES)
    for b, family in zip(built, FAMILIES, strict=True):
        said = (family, b)
        assert b["spills"] == 0 and 32 <= b["registers"] <= 255, said
        assert 0 < b["shared"] <= 232448, said
        assert b["hgmma"] > 0, said
        assert b["tma"] == family[1].get("TMA", False), said
        total, skipped = b["masks"]
        assert total > 0 and skipped == (total if family[1].get("BRANCH_MASKS") else 0), said


# Lengths, batches and heads on both sides of what Triton specializes on, divisible by 16 or not, and 1; strides follow.
SIZES = [
    {"batch": 1}, {"batch": 1, "seqlen_q": 1, "seqlen_k": 1}, {"seqlen_q": 1, "seqlen_k": 4097},
    {"batch": 3, "seqlen_q": 17, "seqlen_k": 33}, {"heads_q": 8, "heads_kv": 1}, {"heads_q": 24, "heads_kv": 3},
    {"batch": 16, "seqlen_q": 100, "seqlen_k": 100, "heads_q": 128, "heads_kv": 16},
]


# Heads of a fused projection, of slices that keep all strides multiples of 16 bytes, and of slices that do not.
FUSED = """
from flash_sink_attn.compile_only import set_target
from flash_sink_attn.kernels import launch
from flash_sink_attn.layout import Sequences

def forward(width, offset, batch, seqlen):
    base = torch.empty(batch, seqlen, 80, width, dtype=torch.bfloat16, device="meta")[..., offset:offset + 64]
    q, k, v = base.split([64, 8, 8], dim=2)
    o = torch.empty(batch, seqlen, 64, 64, dtype=q.dtype, device="meta")
    lse = torch.empty(batch, 64, seqlen, dtype=torch.float32, device="meta")
    launch.forward(q, k, v, None, o, lse, sequences=Sequences(batch, seqlen, seqlen), window=None, scale=0.125,
                   config=TileConfig(64, 32, 4, 1))
    return len(cubins() - before)

before = cubins()
set_target(90)
print(json.dumps([forward(64, 0, 2, 512), forward(72, 0, 3, 511), forward(128, 64, 1, 1), forward(65, 0, 2, 512)]))
"""


def test_lengths_batches_heads_and_strides_share_one_binary(tmp_path: Path) -> None:
    """Also windows that leave the shape of the loops as it is, and totals of packed tokens.

    Strides that are no multiple of 16 bytes have a kernel of their own, as does a call without sinks: so a kernel that
    is new is seen.
    """
    code = f"""
from flash_sink_attn import compile_only
compile_only._inspect = lambda compiled, cached: compiled.hash  # which kernel it is, and not what it is like

for kernel in ("fwd", "bwd_dq", "bwd_dkdv"):
    for tile, fixed, sizes in [
        ({tile(32, 32, 4, 1)!r}, dict(window=256), {SIZES!r} + [dict(window=257), dict(window=4096)]),
        ({tile(32, 64, 4, 1, TMA=True)!r}, {{}}, {SIZES!r}),
        ({tile(32, 64, 4, 1)!r}, dict(varlen=True), {SIZES!r}),
    ]:
        before = cubins()
        base = build(kernel, tile, **fixed)
        own = cubins() - before
        same = [build(kernel, tile, **fixed | size) == base for size in sizes]
        print(json.dumps([kernel, tile, len(own), same, sorted(cubins() - before - own)]))
    other = build(kernel, tile, sinks=False, **fixed)
    print(json.dumps([kernel, "no sinks", len(cubins() - before - own), [other != base], []]))
"""
    *runs, fused = compiling(code + FUSED, tmp_path)
    assert len(runs) == 12
    for run in runs:
        *_, new, same, later = run
        assert new == 1 and all(same) and later == [], run
    assert fused == [1, 1, 1, 2]


# Counts what takes long: looks at the machine code, and stubs for launches.
COUNTED = """
from triton.backends.nvidia import driver
from flash_sink_attn import compile_only, machine_code

looks, stubs, works = [], [], {works}
look = machine_code.disassemble.__wrapped__

def disassemble(cubin):
    looks.append(cubin)
    return look(cubin)
compile_only.disassemble = disassemble

class Launcher:
    def __init__(self, src, metadata):
        stubs.append(metadata.name)
        assert works, "libcuda.so cannot found!"
driver.CudaLauncher = Launcher

tile = {tile!r}
built = [build("fwd", tile, window=w) for w in (128, 128, None)]
print(json.dumps([[vars(b) | {{"cached": None}} for b in built], len(looks), stubs]))
"""


def test_a_kernel_is_looked_at_once_and_its_launcher_built_where_it_can_be(tmp_path: Path) -> None:
    """A sweep meets the same kernel in many cases, and a warm one in all."""
    code = COUNTED.format(works=True, tile=tile(32, 32, 4, 1))
    ((cold, looks, stubs),) = compiling(code, tmp_path)
    assert looks == 2 and len(stubs) == 3
    assert cold[0] == cold[1] != cold[2] and cold[0]["registers"] > 16 and cold[0]["hgmma"] == 0
    ((warm, looks, stubs),) = compiling(code.replace("works = [], [], True", "works = [], [], False"), tmp_path)
    assert warm == cold and looks == 0
    assert len(stubs) == 1  # there is no driver to link with: not asked again


def test_it_refuses_without_the_environment_variable() -> None:
    with pytest.raises(RuntimeError, match="expected FLASH_SINK_ATTN_COMPILE_ONLY=1 in the environment before"):
        compile_kernel("fwd", TileConfig(64, 64), dtype=torch.float16, batch=1, seqlen_q=16, seqlen_k=16, heads_q=1,
                       heads_kv=1, head_dim=64, head_dim_v=64, window=None)
