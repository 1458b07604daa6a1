"""The Hopper backward compiled for sm_90 without one: what the assembler made of every form.

Needs a Triton with which the kernels are known to build; CI has one beside the newest, see .ci/run.
"""

from __future__ import annotations

from typing import Any

import pytest

from flash_sink_attn.hopper import support
from tests.compiling import built_in_halves
from tests.hopper_backward_cases import FAMILIES, case

PROBLEM = support.gluon_problem()
pytestmark = pytest.mark.skipif(PROBLEM is not None, reason=f"the Hopper kernels cannot be built: {PROBLEM}")

# How many programs share a group is a number in the map from programs to tiles, so that one family of a kind stands for
# the others. Their values are compared on a card.
LIKE_ANOTHER = {"64-ordered-split", "64-split-four-window", "128-split-four", "128-recompute-split-four"}
# By name: every family, and of some what takes more registers or another way through the code.
CASES = {name: case(of, seqlen_q=4096, group=8) for name, of in FAMILIES.items() if name not in LIKE_ANOTHER}
for _name in ("64", "96", "128", "64-recompute", "128-recompute", "64-slide", "192", "192-pair", "256"):
    CASES[f"{_name}-varlen"] = case(FAMILIES[_name], seqlens=(4096, 100), group=8)
for _name in ("128", "128-recompute", "192", "192-pair-window"):
    CASES[f"{_name}-own-keys"] = case(FAMILIES[_name], seqlens=(4096, 100), seqlens_k=(4000, 300), group=7, dlse=True)
# (where dq is added in one order the other families walk abreast)
for _name in ("96-ordered", "128-ordered", "64-ordered-split-four"):
    CASES[f"{_name}-varlen"] = case(FAMILIES[_name], seqlens=(4096, 100), group=8 if "split" in _name else 2)
for _name in ("192-ordered", "256-ordered"):
    CASES[f"{_name}-varlen"] = case(FAMILIES[_name], seqlens=(4096, 100), group=1)
for _name in ("64", "128-recompute", "256", "256-ordered"):
    CASES[f"{_name}-heads"] = case(FAMILIES[_name], seqlen_q=1000, seqlen_k=2000, group=1, dtype="float16", dlse=True)
CASES["64-slide-no-sinks"] = case(FAMILIES["64-slide"], seqlen_q=4096, sinks="none", group=7, dtype="float16")
# Kernels with a loop that multiplies and loads or stores what did not fit in registers at head dim 128: addresses, and
# under windows some of the masks' operands. What gets better has to leave this list.
SPILLING = {"128-own-keys": {"keys"}, "128-window": {"keys"}, "128-ordered-window": {"keys"},
            "128-ordered-split": {"keys"}}

# In a process of its own: it must neither touch a GPU nor enter the interpreter.
CODE = """
import json, re, sys
from flash_sink_attn.compile_only import set_target
from flash_sink_attn.hopper import launch_backward, launch_forward
from flash_sink_attn.machine_code import disassemble, shared_bytes
from flash_sink_attn.sass_check import register_fault
from flash_sink_attn.sass_loops import matrix_loops
from tests.compiling import allocated, build_and_listen
from tests.hopper_backward_cases import Case, build

set_target(90)
real, kernels, looked_at = launch_backward.launch, {}, {}

def look_at(compiled, warnings):
    sass = disassemble(compiled.asm["cubin"])
    loops = matrix_loops(sass)
    return dict(
        hgmma=len(re.findall(r"\\bHGMMA\\b", sass)), shared=shared_bytes(compiled), warnings=warnings,
        serialised=sum(x.serialised for x in loops), spills=sum(x.spills for x in loops), fault=register_fault(sass),
        sent=allocated(compiled.asm["ttgir"], "6x64x64") if "pair" in compiled.metadata.name else None)

def launch(kernel, *of, **how):
    compiled, warnings = build_and_listen(lambda: real(kernel, *of, **how))
    if compiled.hash not in looked_at:  # the disassembler takes most of a second, and is for what multiplies
        looked_at[compiled.hash] = look_at(compiled, warnings) if "wgmma" in compiled.asm["ptx"] else {}
    kernels[kernel.__name__] = looked_at[compiled.hash]
    return compiled

launch_backward.launch, launch_forward.launch = launch, lambda *of, **how: None
for line in sys.stdin:
    name, fields = json.loads(line)
    kernels = {}
    build(Case(**fields))
    print(json.dumps([name, kernels]))
"""
WIDE = {64: {"hopper_bwd_wide_kernel"}, 128: {"hopper_bwd_pair_kernel"}}  # by BLOCK_N
MATRIX = {0: {"hopper_bwd_keys_kernel"}, 1: {"hopper_bwd_keys_kernel", "hopper_bwd_queries_kernel"},
          2: {"hopper_bwd_slide_kernel"}}
BESIDE = {0: {"hopper_bwd_rows_kernel", "hopper_bwd_finish_kernel"}, 1: set(), 2: {"hopper_bwd_join_kernel"}}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What was made of every case, with nothing in the cache."""
    return built_in_halves(CODE, CASES, tmp_path_factory.mktemp("cache"))


def matrix(name: str) -> set[str]:
    """The kernels of a case that multiply."""
    config = CASES[name].config
    return WIDE[config["BLOCK_N"]] if CASES[name].head_dim > 128 else MATRIX[config["FORM"]]


@pytest.mark.parametrize("name", CASES)
def test_it_multiplies_on_the_tensor_cores_and_does_not_serialise(built: dict[str, Any], name: str) -> None:
    beside = BESIDE[CASES[name].config["FORM"]]
    if CASES[name].config["SPLIT_GROUP"] > 1:
        beside = beside | {"hopper_bwd_finish_kernel"}
    if CASES[name].config["DETERMINISTIC"] and CASES[name].seqlens:
        beside = beside | {"hopper_bwd_offsets_kernel"}
    assert set(built[name]) == matrix(name) | beside
    for kernel in matrix(name):
        found = built[name][kernel]
        assert found["hgmma"] >= 12 and found["warnings"] == [], (kernel, found)
        assert not found["serialised"] and 0 < found["shared"] <= 232448, (kernel, found)


@pytest.mark.parametrize("name", CASES)
def test_operands_that_stay_in_registers_are_not_overwritten(built: dict[str, Any], name: str) -> None:
    """K at head dim 64, q and do at 128: what the launcher would have to do without, see launch_backward."""
    assert {kernel: built[name][kernel]["fault"] for kernel in matrix(name)} == dict.fromkeys(matrix(name))


@pytest.mark.parametrize("name", CASES)
def test_which_loops_spill(built: dict[str, Any], name: str) -> None:
    spilling = {kernel.split("_")[2] for kernel in matrix(name) if built[name][kernel]["spills"]}
    assert spilling == SPILLING.get(name, set()), built[name]


@pytest.mark.parametrize("name", [name for name in CASES if "pair" in name])
def test_what_a_program_sends_the_other_lies_first(built: dict[str, Any], name: str) -> None:
    """hopper.cluster knows no other address."""
    assert built[name]["hopper_bwd_pair_kernel"]["sent"] == [0]


def test_two_programs_that_make_dq_fit_a_multiprocessor(built: dict[str, Any]) -> None:
    """Each takes 1 KiB more than it asks for; a multiprocessor has 228 KiB."""
    assert 2 * (built["128-recompute"]["hopper_bwd_queries_kernel"]["shared"] + 1024) <= 228 * 1024
