"""Many random calls of the Hopper backward on one card: ``python -m tests.hopper_backward_random --count 1000``.

As tests.hopper_random: the kernels are compiled first, by as many processes as there are cores; then one process makes
the calls. One that hangs is killed, and its seed named. The last line sums up; the exit status is 1 where anything was
wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.hopper_backward_cases import Case, build, draw, kernels_of
from tests.hopper_worker import ROOT, Worker

ANSWERS = (sys.executable, "-m", "tests.hopper_backward_cases")


def _compile_here() -> None:
    """The kernels of the cases that come on stdin, into Triton's cache."""
    from flash_sink_attn.compile_only import set_target

    set_target(90)
    for line in sys.stdin:
        with contextlib.redirect_stdout(io.StringIO()):  # Triton prints all of a kernel that the assembler refuses
            build(Case(**json.loads(line)))


def compile_all(cases: Iterable[Case], limit_s: float) -> tuple[int, list[str]]:
    """Compile every kernel of the cases, in parallel: how many there are, and what went wrong."""
    new: list[Case] = []
    seen: set[str] = set()
    for case in cases:
        if not seen.issuperset(kernels := kernels_of(case)):
            seen.update(kernels)
            new.append(case)
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # what a machine without a GPU sets
    env |= {"FLASH_SINK_ATTN_COMPILE_ONLY": "1", "PYTHONPATH": os.pathsep.join(
        filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    processes = max(1, min(len(new), os.cpu_count() or 1))

    def share(own: list[Case]) -> str:
        try:
            done = subprocess.run([sys.executable, "-m", "tests.hopper_backward_random", "--compile"], env=env,
                                  cwd=ROOT, input="\n".join(json.dumps(c.to_dict()) for c in own),
                                  capture_output=True, text=True, timeout=limit_s)
        except subprocess.TimeoutExpired:
            return f"compiling {[c.seed for c in own]}: no end after {limit_s:.0f} s"
        return "" if done.returncode == 0 else f"compiling {[c.seed for c in own]}: {done.stderr.strip()[-500:]}"

    with ThreadPoolExecutor(processes) as pool:
        return len(seen), [m for m in pool.map(share, (new[i::processes] for i in range(processes))) if m]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--first", type=int, default=0, help="seed of the first call")
    parser.add_argument("--kinds", type=int, default=24, help="how many kinds of calls share kernels")
    parser.add_argument("--only", type=int, nargs="*", help="these seeds alone")
    parser.add_argument("--limit", type=float, default=85.0, help="seconds after which no call is begun")
    parser.add_argument("--stall", type=float, default=20.0, help="seconds after which a call hangs")
    parser.add_argument("--out", type=Path, help="a file for what was wrong, in full, as JSON lines")
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.compile:
        _compile_here()
        return 0
    start = time.monotonic()
    seeds = list(range(given.first, given.first + given.count)) if given.only is None else given.only
    cases = {seed: draw(seed, given.kinds) for seed in seeds}
    kernels, broken = compile_all(cases.values(), given.limit)
    compiled = time.monotonic() - start
    for message in broken:
        print(message)
    worker, wrong, made, hung = Worker(ANSWERS), {}, 0, 0
    for seed in seeds:
        if time.monotonic() - start > given.limit or hung >= 3:
            break
        # the first one waits for the process to start
        found = worker.ask(cases[seed].to_dict(), given.stall + (60 if made == 0 else 0))
        made += 1
        if found:
            hung += any("it hangs" in message for message in found)
            wrong[seed] = found
            print(f"seed {seed}: {'; '.join(found)[:240]}", flush=True)
            if given.out:
                with given.out.open("a") as file:
                    print(json.dumps({"seed": seed, "case": cases[seed].to_dict(), "wrong": found}), file=file)
    worker.close()
    print(f"{made} of {len(seeds)} random backward calls in {time.monotonic() - start:.0f} s ({kernels} kernels "
          f"compiled in {compiled:.0f} s): {len(wrong)} wrong, {hung} of them hangs"
          + (f"; seeds {' '.join(map(str, wrong))}" if wrong else ""))
    return 1 if wrong or broken or made < len(seeds) else 0


if __name__ == "__main__":
    sys.exit(main())
