"""Kernels built in processes of their own, which neither touch a GPU nor enter the interpreter."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_warnings_of: dict[str, list[str]] = {}


def build_and_listen(build: Callable[[], Any]) -> tuple[Any, list[str]]:
    """A compiled kernel and ptxas's warnings that matrix instructions wait for each other (C7510 to C7519).

    In a process of :func:`built_in_halves`, where Triton prints what ptxas said of what it builds.
    """
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compiled = build()
    text = said.getvalue()
    if compiled.hash not in _warnings_of:
        assert "registers" in text, f"ptxas was not heard: {text[-500:]!r}"
        _warnings_of[compiled.hash] = sorted(set(re.findall(r"C75\d\d", text)))
    return compiled, _warnings_of[compiled.hash]


def built_in_halves(code: str, cases: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """What ``code`` says of every case, by name, with nothing in the cache; two processes do half of them each.

    Args:
        code: reads lines ``[name, case.to_dict()]`` as JSON and prints one line ``[name, what was made]`` for each.
        cases: by name.
        cache: an empty directory for Triton's cache.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "FLASH_SINK_ATTN_COMPILE_ONLY": "1", "TRITON_DUMP_PTXAS_LOG": "1"}
    lines = [json.dumps([name, of.to_dict()]) for name, of in cases.items()]
    halves = [subprocess.Popen([sys.executable, "-c", code], env=env | {"TRITON_CACHE_DIR": str(cache / half)},
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
              for half in ("first", "second")]  # ptxas is heard by who builds, so none may find the other's
    for i, half in enumerate(halves):
        assert half.stdin is not None
        half.stdin.write("\n".join(lines[i::2]))
        half.stdin.close()
        half.stdin = None
    found: dict[str, Any] = {}
    for half in halves:
        out, error = half.communicate(timeout=900)
        assert half.returncode == 0, error[-2000:]
        found |= dict(json.loads(line) for line in out.splitlines())
    return found


def allocated(ttgir: str, shape: str) -> list[int]:
    """Where Triton lays the allocations of a shape, such as ``6x64x64``, among a kernel's shared memory, in bytes.

    The kernel's own ``ttgir`` does not say so yet: the passes that decide it are run on it again.
    """
    from triton._C.libtriton import ir, nvidia, passes

    context = ir.context()
    ir.load_dialects(context)
    nvidia.load_dialects(context)
    with tempfile.NamedTemporaryFile("w", suffix=".ttgir") as file:
        file.write(ttgir)
        file.flush()
        module = ir.parse_mlir_module(file.name, context)
    module.context = context
    manager = ir.pass_manager(context)
    passes.ttgpuir.add_combine_tensor_select_and_if(manager)
    passes.ttgpuir.add_allocate_warp_groups(manager)
    passes.convert.add_scf_to_cf(manager)
    passes.gluon.add_inliner(manager)
    nvidia.passes.ttgpuir.add_allocate_shared_memory_nv(manager, 90, 86)
    manager.run(module, "allocated")
    lines = (line for line in str(module).splitlines() if "local_alloc" in line and f"memdesc<{shape}x" in line)
    return [int(re.search(r"allocation.offset = (\d+)", line)[1]) for line in lines]  # type: ignore[index]


def bounds_of_before(ttgir: str) -> tuple[list[str], int]:
    """(Bounds of the loops inside a loop over tiles that were computed before that one, and are neither constants nor
    what it carries; how many bounds there are): what such a loop carries and uses as bounds alone Triton 3.6 takes for
    the first tile's. It does not see one that is a constant, or computed inside from such a value."""
    lines, found, seen, end = ttgir.splitlines(), [], 0, -1
    for i, line in enumerate(lines):
        loop = re.match(r"( +)%\S+ = scf\.(?:for|while) ", line)
        if i <= end or not loop:
            continue  # of the outermost loops
        end = next(j for j in range(i + 1, len(lines)) if re.match(rf" {{{len(loop[1])}}}\}}(?! do)", lines[j]))
        body = lines[i + 1:end]
        inside = set(re.findall(r"(%\w+)(?::\d+)? = ", "\n".join([line, *body])))
        inside |= set(re.findall(r"(%\w+): ", " ".join(x for x in body if "^bb" in x)))
        for inner in body:
            if bounds := re.search(r"scf\.for %\w+ = (%\w+)(?:#\d+)? to (%\w+)", inner):
                seen += 2
                found += [x for x in bounds.groups() if x not in inside and not re.match(r"%c\d", x)]
    return found, seen
