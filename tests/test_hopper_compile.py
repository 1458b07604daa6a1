"""The Hopper forward compiled for sm_90 without one: what the assembler made of the loops that take all the time.

Needs a Triton with which the kernels are known to build; CI has one beside the newest, see .ci/run.
"""

from __future__ import annotations

from typing import Any

import pytest

from flash_sink_attn.hopper import support
from tests.compiling import bounds_of_before, built_in_halves
from tests.hopper_cases import FAMILIES, case

PROBLEM = support.gluon_problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"the Hopper kernels cannot be built: {PROBLEM}")

# By name: every family, and packed batches of some, which take more registers.
CASES = {name: case(of, seqlen_q=4096, window=window) for name, (of, window) in FAMILIES.items()}
CASES |= {f"{name}-varlen": case(FAMILIES[name][0], seqlens=(4096, 100), window=FAMILIES[name][1])
          for name in ("64", "64-window", "96", "128", "128-one-loop", "128-alone", "128-window-tokens", "192")}
# Where the assembler puts the exponentials behind the wait for O, so that one warpgroup overlaps nothing; where several
# programs or more warpgroups share a multiprocessor the others fill in. What gets better has to leave these lists.
WITHOUT_OVERLAP = {"64-four-two-tiles", "64-window", "128-window"}
# Where the source waits for both products before the exponentials.
ONE_AFTER_THE_OTHER = {"256"}

# In a process of its own: it must neither touch a GPU nor enter the interpreter.
CODE = """
import json, re, sys
from flash_sink_attn.compile_only import set_target
from flash_sink_attn.machine_code import disassemble, fault_of, shared_bytes
from flash_sink_attn.sass_loops import matrix_loops
from tests.compiling import bounds_of_before, build_and_listen
from tests.hopper_cases import Case, build

set_target(90)
SETTLED = r"\\[own_barriers \\+ 1020\\], (%\\w+); mov\\.f32 (%\\w+), (%\\w+); mov\\.f32 (%\\w+), (%\\w+);"
for line in sys.stdin:
    name, fields = json.loads(line)
    compiled, warnings = build_and_listen(lambda: build(Case(**fields)))
    sass = disassemble(compiled.asm["cubin"])
    print(json.dumps([name, dict(
        hgmma=len(re.findall(r"\\bHGMMA\\b", sass)), shared=shared_bytes(compiled), fault=fault_of(compiled),
        warnings=warnings, settled=re.findall(SETTLED, compiled.asm["ptx"]),
        bounds=bounds_of_before(compiled.asm["ttgir"]),
        loops=[dict(order=x.order, masks=x.masks, spills=x.spills, serialised=x.serialised, overlapped=x.overlapped,
                    overlap=x.overlap, exponentials=x.events.count("exp")) for x in matrix_loops(sass)])]))
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What was made of every family, with nothing in the cache."""
    return built_in_halves(CODE, CASES, tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("family", CASES)
def test_it_multiplies_on_the_tensor_cores_and_does_not_serialise(built: dict[str, Any], family: str) -> None:
    kernel = built[family]
    assert kernel["hgmma"] >= 16 and kernel["loops"] and kernel["fault"] is None, kernel
    assert kernel["warnings"] == [], kernel
    assert not any(loop["serialised"] for loop in kernel["loops"]), kernel
    assert 0 < kernel["shared"] <= 232448


@pytest.mark.parametrize("family", CASES)
def test_sums_that_settle_stay_what_they_are(built: dict[str, Any], family: str) -> None:
    """Both values leave the instruction as they came: the first move overwrites nothing that the second one reads."""
    of = CASES[family]
    assert bool(built[family]["settled"]) == (of.head_dim == 64 and of.window is None)
    for stored, to, source, to_second, second in built[family]["settled"]:
        assert stored == source and to not in (second, to_second), built[family]["settled"]


@pytest.mark.parametrize("family", CASES)
def test_no_tile_goes_by_the_bounds_of_the_first(built: dict[str, Any], family: str) -> None:
    stale, bounds = built[family]["bounds"]
    assert stale == [] and bounds > 0


@pytest.mark.parametrize("loop", [
    """\
      %tiles:2 = scf.for %tile = %c0_i32 to %n step %c1_i32 iter_args(%x = %c0_i32, %stop = %first) -> (i32, i32) {
        %more:2 = scf.if %some -> (i32, i32) {
        }
        %sum = scf.for %i = %more#1 to BOUND step %c1_i32 iter_args(%y = %x) -> (i32) {
        }
      }
""", """\
      %tiles:2 = scf.while (%x = %c0_i32, %stop = %first) : (i32, i32) -> (i32, i32) {
        scf.condition(%some) %x, %stop : i32, i32
      } do {
      ^bb0(%more: i32, %stop: i32):
        %sum = scf.for %i = %more to BOUND step %c1_i32 iter_args(%y = %more) -> (i32) {
        }
      }
"""])
def test_bounds_of_another_tile_are_found(loop: str) -> None:
    """As Triton 3.6 leaves a bound that is carried: by its first value."""
    after = "      %sum = scf.for %i = %edge to %first step %c1_i32 iter_args(%y = %x) -> (i32) {\n      }\n"
    assert bounds_of_before(loop.replace("BOUND", "%edge") + after) == (["%edge"], 2)
    assert bounds_of_before(loop.replace("BOUND", "%stop") + after) == ([], 2)
    assert bounds_of_before(loop.replace("BOUND", "%c4_i32") + after) == ([], 2)


@pytest.mark.parametrize("family", CASES)
def test_no_loop_that_multiplies_spills(built: dict[str, Any], family: str) -> None:
    """Stack that is used where a partition begins costs nothing; in the loops it would."""
    assert not any(loop["spills"] for loop in built[family]["loops"]), built[family]


@pytest.mark.parametrize("family", CASES)
def test_the_softmax_of_a_block_runs_beside_the_product_before_it(built: dict[str, Any], family: str) -> None:
    """QK of this block, PV of the one before, a wait for the first, the exponentials, a wait for the second; in every
    warpgroup's loop without masks, which is where a long row is."""
    loops = built[family]["loops"]
    free = [loop for loop in loops if loop["masks"] < loop["exponentials"] / 2] or loops
    if family in ONE_AFTER_THE_OTHER:
        assert {loop["order"] for loop in free} == {"exp, shared, registers, wait 0"}, free
    else:
        assert all(loop["overlapped"] for loop in free) == (family not in WITHOUT_OVERLAP), free
