"""Kernels built in processes of their own, which neither touch a GPU nor enter the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def built_in_halves(code: str, cases: Mapping[str, Any], cache: Path) -> dict[str, Any]:
    """What ``code`` says of every case, by name, with nothing in the cache; two processes do half of them each.

    Args:
        code: reads lines ``[name, case.to_dict()]`` as JSON and prints one line ``[name, what was made]`` for each.
        cases: by name.
        cache: an empty directory for Triton's cache.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "FLASH_SINK_ATTN_COMPILE_ONLY": "1", "TRITON_CACHE_DIR": str(cache)}
    lines = [json.dumps([name, of.to_dict()]) for name, of in cases.items()]
    halves = [subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for i, half in enumerate(halves):
        assert half.stdin is not None
        half.stdin.write("\n".join(lines[i::2]))
        half.stdin.close()
        half.stdin = None
    found: dict[str, Any] = {}
    for half in halves:
        out, error = half.communicate(timeout=400)
        assert half.returncode == 0, error[-2000:]
        found |= dict(json.loads(line) for line in out.splitlines())
    return found
