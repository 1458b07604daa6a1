"""What one process has compiled another finds, and where it does not, it is told why."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sweeps import carried_cache

ROOT = Path(__file__).resolve().parent.parent

BUILD = """
import json, torch
from flash_sink_attn import kernel_cache
from flash_sink_attn.compile_only import compile_kernel
from flash_sink_attn.config import TileConfig

shape = dict(dtype=torch.bfloat16, batch=1, seqlen_q=512, seqlen_k=512, heads_q=4, heads_kv=1, head_dim=64,
             head_dim_v=64, window=None)
with kernel_cache.watch() as all_of_them:
    with kernel_cache.watch() as found:
        built = compile_kernel("fwd", TileConfig(32, 32, 4, 1), **shape)
    again = compile_kernel("fwd", TileConfig(32, 32, 4, 1), **(shape | dict(seqlen_q=1024, seqlen_k=1024)))
print(json.dumps([found.hits, found.misses, built.cached, again.cached, built.binary, all_of_them.misses,
                  kernel_cache.key_facts(90)]))
"""


def build(cache: Path, **env: str) -> list[Any]:
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    clean |= {"PYTHONPATH": paths, "FLASH_SINK_ATTN_COMPILE_ONLY": "1", "TRITON_CACHE_DIR": str(cache),
              "TRITON_DEFAULT_FP_FUSION": "1"}
    done = subprocess.run([sys.executable, "-c", BUILD], env=clean | env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def files(cache: Path) -> dict[str, int]:
    return {str(path.relative_to(cache)): path.stat().st_mtime_ns for path in cache.rglob("*.cubin")}


def test_a_second_process_compiles_nothing_and_a_changed_one_says_why(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    hits, misses, cached, again, binary, misses_of_both, facts = build(cache)
    assert (hits, misses, cached) == (0, 1, False)
    assert again and misses_of_both == 1  # another length of the same kernel: in memory
    before = files(cache)
    assert len(before) == 1
    second = build(cache)
    assert second[:3] == [1, 0, True] and second[4] == binary
    assert files(cache) == before
    assert facts["target"] == "cuda:90:32" and facts["cache"] == str(cache.resolve())
    other = build(cache, TRITON_DEFAULT_FP_FUSION="0")
    assert other[:3] == [0, 1, False] and len(files(cache)) == 2
    changed = [name for name in facts if facts[name] != other[-1][name]]
    assert changed == ["environment"]


def test_a_carried_cache_tells_what_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    path = carried_cache.describe(90)
    assert path == tmp_path.resolve() / "flash_sink_attn.json"
    assert carried_cache.report(3, 1, 90) == ["kernel cache: 3 of 4 configurations found, 1 missing and built here"]
    found = json.loads(path.read_text())
    path.write_text(json.dumps(found | {"triton": "3.0.0"}))
    lines = carried_cache.report(0, 4, 90)
    assert lines[0].startswith("kernel cache: 0 of 4 configurations found, 4 missing")
    assert lines[1:] == [f"  triton: the cache was filled with '3.0.0', here it is {found['triton']!r}"]
    assert carried_cache.report(4, 0, 90) == ["kernel cache: 4 of 4 configurations found"]
    assert carried_cache.report(0, 0, 90) == []
    path.write_text("{")
    assert len(carried_cache.report(0, 4, 90)) == 1


@pytest.mark.skipif("not __import__('torch').cuda.is_available()", reason="needs a GPU, whose target is compared")
def test_the_card_itself_is_the_target_that_was_compiled_for() -> None:
    import torch
    import triton

    from flash_sink_attn.compile_only import _AbsentGpu

    major, minor = torch.cuda.get_device_capability()
    assert triton.runtime.driver.active.get_current_target() == _AbsentGpu(10 * major + minor).get_current_target()


KEYS = """
import importlib, json, sys
import torch
from flash_sink_attn import launcher
from flash_sink_attn.hopper import support

launcher._launch_new = lambda kernel, *arguments, **options: kernel.cache_key
kernels = []
names = ["kernels.forward", "kernels.backward_dq", "kernels.backward_dkdv"]
if support.gluon_problem() is None:
    names += [f"hopper.{n}" for n in ("forward", "window", "backward_walk", "backward_keys", "backward_queries",
                                      "backward_slide", "backward_wide", "backward_pair")]
for name in names:
    module = importlib.import_module(f"flash_sink_attn.{name}")
    kernels += [(f"{name}.{n}", f) for n, f in vars(module).items()
                if n.endswith("_kernel") and f.fn.__module__ == module.__name__]
kernels = kernels[::int(sys.argv[1])]
print(json.dumps({n: launcher.launch(f, 1, torch.device("meta"), [], {}, num_warps=4) for n, f in kernels}))
"""


@pytest.mark.parametrize("folder", ["kernels", "hopper"])
def test_no_two_modules_name_a_constant_alike(folder: str) -> None:
    """Triton sorts the constants that a kernel reads by name, and of one name by where their modules lie in memory,
    which is in another order in another process: the kernel's key is then another, too."""
    found: dict[str, list[str]] = {}
    for path in sorted((ROOT / "flash_sink_attn" / folder).glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.AnnAssign) and "constexpr" in ast.dump(node.annotation):
                found.setdefault(ast.unparse(node.target), []).append(path.name)
    assert found and {name: where for name, where in found.items() if len(where) > 1} == {}


def test_the_key_of_a_kernel_is_the_same_in_whatever_order_kernels_are_used() -> None:
    """What compilers build side by side, each its own kernels, the process that runs them finds."""
    def keys(step: int) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run([sys.executable, "-c", KEYS, str(step)], capture_output=True, text=True, timeout=300,
                              env=env | {"PYTHONPATH": paths, "FLASH_SINK_ATTN_COMPILE_ONLY": "1"})
        assert done.returncode == 0, done.stderr
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found

    forwards, backwards = keys(1), keys(-1)  # of any two kernels each comes first once
    assert len(forwards) >= 3 and len(set(forwards.values())) == len(forwards)
    assert forwards == backwards
