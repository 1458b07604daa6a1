"""Three tiny calls of every family of the Hopper forward, for tools that slow a kernel down a thousandfold:

    python -m tests.hopper_tiny --compile && compute-sanitizer --tool memcheck python -m tests.hopper_tiny

Results are not judged here, only made.
"""

from __future__ import annotations

import argparse
import sys

import torch

from tests.hopper_cases import FAMILIES, Case, call, case
from tests.hopper_random import compile_all


def tiny() -> dict[str, list[Case]]:
    """By family: fewer queries than keys, more than keys, and a packed batch; more tiles than one program."""
    found = {}
    for name, (of, window) in FAMILIES.items():
        common = {"window": None if window is None else 37, "heads_kv": 1}
        found[name] = [case(of, batch=1, seqlen_q=70, seqlen_k=150, **common),
                       case(of, batch=2, seqlen_q=140, seqlen_k=90, **common),
                       case(of, seqlens=(65, 0, 40), **common)]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="the kernels alone, in parallel")
    parser.add_argument("--families", nargs="*", default=list(FAMILIES))
    given = parser.parse_args()
    cases = [of for name, own in tiny().items() if name in given.families for of in own]
    if given.compile:
        kernels, broken = compile_all(cases, 120)
        print(*broken, f"{kernels} kernels compiled", sep="\n")
        return 1 if broken else 0
    for of in cases:
        call(of, of.inputs("cuda"))
        torch.cuda.synchronize()
    print(f"{len(cases)} calls made")
    return 0


if __name__ == "__main__":
    sys.exit(main())
