"""A few tiny calls of every family of the Hopper kernels, for tools that slow a kernel down a thousandfold:

    python -m tests.hopper_tiny --compile
    compute-sanitizer --tool memcheck python -m tests.hopper_tiny --only 'backward-64*'

Results are not judged here, only made.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import sys
import time
from typing import Any

import torch

from tests import hopper_backward_cases, hopper_cases
from tests.random_calls import compile_kernels, kernels


def tiny() -> dict[str, list[hopper_cases.Case]]:
    """By family: fewer queries than keys, more than keys, and a packed batch; more tiles than one program."""
    found: dict[str, list[hopper_cases.Case]] = {}
    for name, (of, window) in hopper_cases.FAMILIES.items():
        common: dict[str, Any] = {"window": None if window is None else 37, "heads_kv": 1}
        found[f"forward-{name}"] = [hopper_cases.case(of, **common, **shape) for shape in (
            {"batch": 1, "seqlen_q": 70, "seqlen_k": 150}, {"batch": 2, "seqlen_q": 140, "seqlen_k": 90},
            {"seqlens": (65, 0, 40)})]
    for name, (head_dim, config, window) in hopper_backward_cases.FAMILIES.items():
        common = {"window": None if window is None else 37, "heads_kv": 1}
        # what slides needs as many queries as keys, and three tiles so that programs share blocks
        shapes: tuple[dict[str, Any], ...] = (
            ({"seqlen_q": 150}, {"batch": 2, "seqlen_q": 70}) if config.FORM == 2 else
            ({"seqlen_q": 70, "seqlen_k": 150}, {"batch": 2, "seqlen_q": 140, "seqlen_k": 90}))
        found[f"backward-{name}"] = [hopper_backward_cases.case((head_dim, config, window), **common, **shape)
                                     for shape in (*shapes, {"seqlens": (65, 0, 40), "dlse": True})]
    return found


def make(case: hopper_cases.Case) -> None:
    """Make a call, and wait for it."""
    module: Any = hopper_backward_cases if isinstance(case, hopper_backward_cases.Case) else hopper_cases
    module.call(case, case.inputs("cuda"))
    torch.cuda.synchronize()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true", help="the kernels alone, in parallel, without the GPU")
    parser.add_argument("--only", nargs="*", default=["*"], metavar="GLOB", help="families whose name is like one")
    parser.add_argument("--list", action="store_true", help="the families' names alone")
    parser.add_argument("--limit", type=float, default=540.0, help="seconds after which nothing is begun")
    given = parser.parse_args(arguments)
    until = time.monotonic() + given.limit
    chosen = {name: of for name, of in tiny().items() if any(fnmatch.fnmatch(name, glob) for glob in given.only)}
    if given.list:
        print(*chosen, sep="\n")
        return 0
    if given.compile:
        tasks = [task for kind, module in (("forward-", hopper_cases), ("backward-", hopper_backward_cases))
                 for task in kernels(module.__name__, (
                     case for name, of in chosen.items() if name.startswith(kind) for case in of))]
        broken, line = compile_kernels(tasks, os.cpu_count() or 1, until)
        print(*broken, line, sep="\n")
        return 1 if broken else 0
    made = 0
    for name, of in chosen.items():
        if time.monotonic() > until:
            break
        start = time.monotonic()
        for case in of:
            make(case)
        made += 1
        print(f"{name}: {len(of)} calls in {time.monotonic() - start:.1f} s", flush=True)
    print(f"{made} of {len(chosen)} families made")
    return 0 if made == len(chosen) > 0 else 1


if __name__ == "__main__":
    sys.exit(main())
