"""From a config to trials: which, in what order, and what the second round makes of the first one's rows."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from sweeps.candidates import candidates
from sweeps.cases import Case
from sweeps.ours import HOPPER, TRITON
from sweeps.plan import Plan, Trial, make_plan
from sweeps.registry import is_peer
from sweeps.specfile import load_spec, parse_spec

CONFIGS = Path(__file__).parent.parent / "configs"


class Kernel:
    """Stands in for a kernel of ours, made of parts, which rejects BLOCK_M 256."""

    name, is_flash = "triton", False

    def __init__(
        self, parts: bool = True, space: Iterable[Mapping[str, Any]] = ({"BLOCK_M": 1}, {"BLOCK_M": 2})
    ) -> None:
        self.parts, self.tiles = parts, space

    def unsupported(self, case: Case) -> str | None:
        if case.head_dim > 256:
            return "too wide"
        return None if self.parts or case.pass_ in ("fwd", "bwd") else "no parts"

    def space(self, case: Case) -> Iterable[Mapping[str, Any]]:
        return self.tiles

    def rejected(self, case: Case, config: Mapping[str, Any], arch: int) -> str | None:
        tiles = config.values() if "bwd_dq" in config else [config]
        return f"too large for sm_{arch}" if any(t.get("BLOCK_M") == 256 for t in tiles) else None


class Telling(Kernel):
    """Says what its untuned default is."""

    def default_config(self, case: Case, arch: int) -> dict[str, Any]:
        return {"bwd_dq": {"BLOCK_M": 1}, "bwd_dkdv": {"BLOCK_M": 1}} if case.pass_ == "bwd" else {"BLOCK_M": 2}


def plan(text: str, only: str | None = None, **loaded: Any) -> Plan:
    """The plan of a config, with ``triton`` a Kernel and everything else a peer unless ``loaded`` says otherwise."""
    peer = Kernel(parts=False, space=[{}])
    known = {"triton": Kernel()} | loaded
    return make_plan(parse_spec(text), 90, only=only, load=lambda name, options: known.get(name, peer))


def shape(**fields: Any) -> str:
    return "shapes: {heads: [[2, 1]], head_dim: 16, " + ", ".join(f"{k}: {v}" for k, v in fields.items()) + "}\n"


BASE = "name: x\nimplementations: [triton, eager, fa3]\n" + shape(seqlen="[8, 16]", window="null")


def row(trial: Trial, ms: float | None, status: str = "ok") -> dict[str, Any]:
    return {"case": trial.case.id, "impl": trial.impl, "status": status, "latency_ms": ms, "config": dict(trial.config)}


def test_the_first_round_of_a_shape() -> None:
    first = plan(BASE).first_round()
    of_8 = [t for t in first if t.case.seqlen_q == 8]
    assert Counter((t.case.pass_, t.impl) for t in of_8) == {
        ("fwd", "triton"): 3,
        ("fwd", "eager"): 1,
        ("fwd", "fa3"): 1,
        ("bwd_dq", "triton"): 3,
        ("bwd_dkdv", "triton"): 3,
    }
    assert len(first) == 2 * len(of_8)


def test_shapes_stand_together_and_passes_in_order() -> None:
    first = plan(BASE).first
    runs = [key for key, _ in itertools.groupby((t.case.seqlen_q, t.case.pass_) for t in first)]
    assert runs == [(n, p) for n in (8, 16) for p in ("fwd", "bwd_dq", "bwd_dkdv")]


def test_rivals_alternate() -> None:
    space = [{"BLOCK_M": n} for n in range(7)]
    first = plan(BASE, triton=Kernel(space=space)).first
    impls = [t.impl for t in first if t.case.id == first[0].case.id]
    assert impls == ["triton"] * 4 + ["eager", "fa3"] + ["triton"] * 4


def test_the_default_is_always_among_the_trials_and_only_of_kernels_to_be_tuned() -> None:
    made = plan(BASE)
    defaults = [t for t in made.first if t.is_default]
    assert {(t.case.pass_, t.impl) for t in defaults} == {(p, "triton") for p in ("fwd", "bwd_dq", "bwd_dkdv")}
    assert all(t.config == {} and t.id.endswith("/triton/default") for t in defaults)
    assert [t.is_default for t in made.second_round([]) if t.impl == "triton"] == [True, True]


def test_a_default_that_is_told_is_not_tried_twice() -> None:
    made = plan(BASE, triton=Telling())
    fwd = [t for t in made.first if t.case.pass_ == "fwd" and t.case.seqlen_q == 8 and t.impl == "triton"]
    assert [(t.config, t.is_default) for t in fwd] == [({"BLOCK_M": 2}, True), ({"BLOCK_M": 1}, False)]
    rows = [row(t, 1.0 + t.config["BLOCK_M"]) for t in made.first if t.impl == "triton"]
    bwd = [t for t in made.second_round(rows) if t.impl == "triton" and t.case.seqlen_q == 8]
    pairs = [(t.config["bwd_dq"]["BLOCK_M"], t.config["bwd_dkdv"]["BLOCK_M"], t.is_default) for t in bwd]
    assert pairs == [(1, 1, True), (1, 2, False), (2, 1, False), (2, 2, False)]


def test_yaml_tiles_replace_the_kernels_own_for_it_alone() -> None:
    made = plan(BASE + "tunables: {fwd: {BLOCK_M: [16, 256], BLOCK_N: 32}}")
    fwd = [t for t in made.first if t.case.pass_ == "fwd" and t.case.seqlen_q == 8]
    assert [(t.impl, t.config.get("BLOCK_M"), t.rejected) for t in fwd if t.impl == "triton"] == [
        ("triton", None, None),
        ("triton", 16, None),
        ("triton", 256, "too large for sm_90"),
    ]
    assert [t.config for t in fwd if t.impl != "triton"] == [{}, {}]
    assert [t.runs for t in fwd if t.impl == "triton"] == [True, True, False]


def test_an_implementation_can_have_tiles_of_its_own() -> None:
    text = BASE.replace(
        "[triton, eager, fa3]", "{mine: {use: 'a.b:C', tunables: {fwd: {NC: [2, 3], BN: 64}}}, fa3: {passes: [fwd]}}"
    )
    loaded: dict[str, Any] = {"a.b:C": Kernel(parts=False)}
    made = plan(text, **loaded)
    mine = [t for t in made.first if t.impl == "mine" and t.case.seqlen_q == 8]
    assert [t.config for t in mine if t.case.pass_ == "fwd"] == [{}, {"NC": 2, "BN": 64}, {"NC": 3, "BN": 64}]
    assert [t.config for t in mine if t.case.pass_ == "bwd"] == [{}, {"BLOCK_M": 1}, {"BLOCK_M": 2}]
    assert {t.case.pass_ for t in made.first if t.impl == "fa3"} == {"fwd"}
    assert made.wholes == ()  # a backward of one kernel needs no second round


def test_what_an_implementation_cannot_do_is_one_trial_with_the_reason() -> None:
    made = plan("name: x\nimplementations: [triton, fa3]\n" + shape(seqlen=8).replace("16", "264"))
    assert [(t.case.pass_, t.impl, t.unsupported, t.runs) for t in made.first] == [
        (p, i, "too wide", False) for p in ("fwd", "bwd") for i in ("triton", "fa3")
    ]


def test_parts_asked_for_by_name() -> None:
    made = plan(BASE + "passes: [bwd_dq]")
    assert Counter((t.case.pass_, t.impl, t.unsupported) for t in made.first if t.case.seqlen_q == 8) == {
        ("bwd_dq", "triton", None): 3,
        ("bwd_dq", "eager", "no parts"): 1,
        ("bwd_dq", "fa3", "no parts"): 1,
    }
    assert made.second_round([]) == []


def test_peers_need_not_wait_for_the_second_round(h100: Plan) -> None:
    opening, first, second = h100.opening(), h100.first_round(), h100.second_round([])
    assert opening[: len(first)] == first
    ahead = opening[len(first) :]
    assert ahead == [trial for trial in second if is_peer(trial.impl)] and {t.case.pass_ for t in ahead} == {"bwd"}


def test_the_second_round_combines_the_fastest_ok_tiles() -> None:
    made = plan(BASE, triton=Kernel(space=[{"BLOCK_M": n} for n in (1, 2, 3, 4)]))
    times = {1: 3.0, 2: 1.0, 3: 2.0, 4: 0.1}
    rows = [
        row(t, times.get(t.config.get("BLOCK_M", 0), 0.01), "incorrect" if t.config.get("BLOCK_M") == 4 else "ok")
        for t in made.first
        if t.impl == "triton"
    ]
    second = [t for t in made.second_round(rows) if t.case.seqlen_q == 16]
    ours = [
        (t.config["bwd_dq"]["BLOCK_M"], t.config["bwd_dkdv"]["BLOCK_M"])
        for t in second
        if t.impl == "triton" and t.config
    ]
    assert ours == [(2, 2), (2, 3), (3, 2), (3, 3)]
    assert [t.impl for t in second] == ["triton", "triton", "triton", "eager", "fa3", "triton", "triton"]
    assert {t.case.pass_ for t in second} == {"bwd"}
    assert made.second_round_size() == len(made.second_round(rows)) == 14


def test_the_second_round_follows_what_it_is_told_about_a_shape_only() -> None:
    made = plan(BASE)
    rows = [row(t, 1.0) for t in made.first if t.case.seqlen_q == 8]
    second = made.second_round(rows)
    assert Counter((t.case.seqlen_q, t.is_default) for t in second if t.impl == "triton") == {
        (8, True): 1,
        (8, False): 4,
        (16, True): 1,
    }


def test_a_combination_that_cannot_work_is_rejected() -> None:
    made = plan(BASE)
    rows = [
        {
            "case": Case("bwd_dq", "bfloat16", 1, 8, 8, 2, 1, 16, 16).with_pass(p).id,
            "impl": "triton",
            "status": "ok",
            "latency_ms": 1.0,
            "config": {"BLOCK_M": m},
        }
        for p, m in (("bwd_dq", 256), ("bwd_dkdv", 1))
    ]
    combined = [t for t in made.second_round(rows) if t.config]
    assert [t.rejected for t in combined] == ["too large for sm_90"]


def test_forward_and_backward_together_take_the_fastest_of_each() -> None:
    made = plan(BASE + "passes: [fwd_bwd]")
    assert {t.case.pass_ for t in made.first} == {"fwd", "bwd_dq", "bwd_dkdv"}
    rows = [row(t, 9.0 - t.config.get("BLOCK_M", 0)) for t in made.first]
    ours = [t.config for t in made.second_round(rows) if t.impl == "triton" and t.case.seqlen_q == 8]
    assert ours == [{}, {"fwd": {"BLOCK_M": 2}, "bwd_dq": {"BLOCK_M": 2}, "bwd_dkdv": {"BLOCK_M": 2}}]


@pytest.mark.parametrize(
    "only,first,second",
    [
        ("fwd-*", {("fwd", "triton"), ("fwd", "eager"), ("fwd", "fa3")}, set()),
        (
            "bwd-*-q8-*",
            {("bwd_dq", "triton"), ("bwd_dkdv", "triton")},
            {("bwd", "triton"), ("bwd", "eager"), ("bwd", "fa3")},
        ),
        ("fa3", {("fwd", "fa3"), ("bwd", "fa3")}, set()),
        ("eager/fwd-*-q16-*", {("fwd", "eager")}, set()),
        ("nothing", set(), set()),
    ],
)
def test_only(only: str, first: set[tuple[str, str]], second: set[tuple[str, str]]) -> None:
    made = plan(BASE, only)
    assert {(t.case.pass_, t.impl) for t in made.first} == first
    assert {(t.case.pass_, t.impl) for t in made.second_round([])} == second


def test_only_by_model() -> None:
    text = "name: x\nimplementations: [eager]\nshapes: {model: [gpt-oss, granite], seqlen: 8, window: null}\n"
    assert {t.case.model for t in plan(text, "granite").first} == {"granite"}


def test_groups_that_share_a_case_add_their_candidates() -> None:
    text = BASE + (
        "groups:\n  a: {tunables: {fwd: {BLOCK_M: [16, 32], BLOCK_N: 16}}, passes: fwd}\n"
        "  b: {tunables: {fwd: {BLOCK_M: [32, 64], BLOCK_N: 16}}, passes: fwd}\n"
    )
    ours = [t.config.get("BLOCK_M") for t in plan(text).first if t.impl == "triton" and t.case.seqlen_q == 8]
    assert ours == [None, 16, 32, 64]


def test_ids_are_stable_unique_and_know_what_matters() -> None:
    a = Case("fwd", "bfloat16", 1, 8, 8, 2, 1, 16, 16)
    assert Trial(a, "triton", {"x": 1, "y": 2}).id == Trial(a, "triton", {"y": 2, "x": 1}, is_default=True).id
    different = [
        Trial(a, "triton"),
        Trial(a, "triton", {"x": 1}),
        Trial(a, "eager"),
        Trial(a.with_pass("bwd"), "triton"),
        Trial(a, "triton", {}, {"block": 64}),
    ]
    assert len({t.id for t in different}) == len({hash(t) for t in different}) == 5
    assert Trial(a, "upstream", {}, {"path": "/here"}).id == Trial(a, "upstream", {}, {"path": "/there"}).id
    assert Trial(a, "triton", {"x": 1}).id == "fwd-bfloat16-b1-q8-k8-h2x1-d16x16-causal/triton/5041bf1f71"


def test_candidates_are_unique_and_in_order() -> None:
    case = Case("fwd", "bfloat16", 1, 8, 8, 2, 1, 16, 16)
    found = candidates(case, Kernel(), [{"BLOCK_M": 2}, {"BLOCK_M": 1}, {"BLOCK_M": 2}], 90, default=True)  # type: ignore[arg-type]
    assert [c.config for c in found] == [{}, {"BLOCK_M": 2}, {"BLOCK_M": 1}]
    assert [c.is_default for c in found] == [True, False, False]


def test_an_unknown_implementation_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="'eagr'; did you mean 'eager'"):
        make_plan(parse_spec("name: x\nimplementations: [eagr]\nshapes: {model: gpt-oss, seqlen: 8}"), 90)


def test_peers_are_the_built_in_ones_but_our_own() -> None:
    assert is_peer("fa3") and is_peer("eager") and not is_peer("triton") and not is_peer("a.b:C")


def test_a_variant_of_a_peer_is_a_peer() -> None:
    """It has no untuned default, is not tuned, and is not built ahead."""
    text = BASE.replace("[triton, eager, fa3]", "{triton: {}, cudnn: {}, cudnn_deterministic: "
                        "{use: 'sweeps.baselines.cudnn:make', options: {deterministic: true}}}")
    made = plan(text)
    fwd = [(t.impl, t.config, t.is_default) for t in made.first if t.case.pass_ == "fwd" and t.case.seqlen_q == 8]
    assert [t for t in fwd if t[0] != "triton"] == [("cudnn", {}, False), ("cudnn_deterministic", {}, False)]
    assert {t.impl for t in made.built_ahead()} == {"triton"}


@pytest.mark.parametrize(
    "name,use,message",
    [
        ("mine", "sweeps.baselines.fa3:make", "mine: expected a name that starts with the peer's, such as fa3_variant"),
        ("fa4_x", "sweeps.baselines.fa3:make", "fa4_x: expected a name that starts with the peer's, such as fa3_vari"),
        ("flex_own", "my.module:MAKE", "flex_own: expected a name that does not start with that of the peer flex"),
    ],
)
def test_a_name_does_not_mislead_about_what_it_is(name: str, use: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(BASE.replace("[triton, eager, fa3]", f"{{triton: {{}}, {name}: {{use: '{use}'}}}}"))


TWO = """
name: x
passes: [fwd, bwd, fwd_bwd]
implementations: [triton, hopper, eager]
shapes: {model: gpt-oss, seqlen: 1024, window: 128}
tunables:
  fwd: {BLOCK_M: 64, BLOCK_N: 32}
  hopper_fwd: {BLOCK_M: [64, 128], BLOCK_N: 64}
  hopper_bwd: {BLOCK_M: 64, BLOCK_N: [64, 128], FORM: [0, 1]}
"""


def test_the_hopper_kernels_are_swept_beside_the_portable_ones() -> None:
    """Their backward is one kernel, whose tiles go in the first round; a step out of both winners goes after it."""
    made = plan(TWO, triton=TRITON, hopper=HOPPER)
    first = [t for t in made.first if t.impl == "hopper"]
    asked = {(n, form) for n in (64, 128) for form in (0, 1)}
    assert asked <= {(t.config["BLOCK_N"], t.config["FORM"]) for t in first if t.case.pass_ == "bwd"}
    assert {t.case.pass_ for t in first} == {"fwd", "bwd"}
    assert {t.impl for t in made.built_ahead()} == {"triton", "hopper"}
    rows = [{"case": t.case.id, "impl": t.impl, "status": "ok", "latency_ms": 9.0 - i / 100, "config": t.config}
            for i, t in enumerate(first) if t.runs]
    second = made.second_round(rows)
    last = [t for t in reversed(first) if t.runs and t.config]
    best = {p: next(t.config for t in last if t.case.pass_ == p) for p in ("fwd", "bwd")}
    assert [t.config for t in second if t.impl == "hopper" and not t.is_default] == [
        {"hopper_fwd": best["fwd"], "hopper_bwd": best["bwd"]}]
    assert {t.case.pass_ for t in second if t.impl == "eager"} == {"bwd", "fwd_bwd"}


@pytest.fixture(scope="module")
def h100() -> Plan:
    return make_plan(load_spec(CONFIGS / "h100.yaml"), 90)


def test_h100_has_its_six_hundred_trials_and_no_more_than_fit(h100: Plan) -> None:
    """1,363 rows took 180 s on an H100 with 16 cores and an empty cache: 1,550 would take 205 s, of eight minutes."""
    running = sum(t.runs for t in h100.first) + sum(t.runs for whole in h100.wholes for t in whole)
    assert 600 <= running <= 1550
    assert len({t.id for t in h100.first}) == len(h100.first)


@pytest.mark.parametrize(
    "model,seqlen,window,dtype",
    [
        ("gpt-oss", 8192, 128, "bfloat16"),
        ("gpt-oss", 8192, None, "bfloat16"),
        ("llama-70b", 8192, None, "bfloat16"),
        ("qwen2.5-7b", 4224, 256, "float16"),
    ],
)
def test_h100_has_every_peer_on_the_board(h100: Plan, model: str, seqlen: int, window: int | None, dtype: str) -> None:
    trials = [
        t
        for t in (*h100.first, *h100.second_round([]))
        if (t.case.model, t.case.seqlen_q, t.case.window, t.case.dtype, t.case.batch)
        == (model, seqlen, window, dtype, 1)
    ]
    for pass_ in ("fwd", "bwd"):
        assert {t.impl for t in trials if t.case.pass_ == pass_} == set(h100.spec.implementations)
    blocks = {
        (t.config["BLOCK_M"], t.config["BLOCK_N"])
        for t in trials
        if t.case.pass_ == "fwd" and t.impl == "triton" and t.config and "BLOCK_M" in t.config and t.runs
    }
    assert {(m, n) for m in (64, 128) for n in (32, 64, 128)} <= blocks


def test_h100_sweeps_more_than_the_board(h100: Plan) -> None:
    cases = {t.case for t in h100.first}
    assert {c.model for c in cases} == {"gpt-oss", "qwen2.5-7b", "llama-70b", "granite", "mimo-v2-flash", ""}
    assert {c.head_dim for c in cases if not c.model} == {256}
    assert {1024, 2048, 4096, 8192, 16384} <= {c.seqlen_q for c in cases}
    assert {128, 256, 1024, None} <= {c.window for c in cases} and {c.dtype for c in cases} == {"bfloat16", "float16"}
    assert {c.varlen for c in cases} == {"", "upstream", "skewed"} and {1, 4} <= {c.batch for c in cases}


def test_the_board_has_its_rows_and_every_rival_in_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sweeps.baselines.fa3.build_flags", dict)  # a build with everything, whatever is installed
    made = make_plan(load_spec(CONFIGS / "board.yaml"), 90)
    trials = [*made.first, *(t for whole in made.wholes for t in whole)]
    rivals = {"fwd": {"triton", "hopper", "fa3", "fa4", "cudnn"}}
    rivals["bwd"] = rivals["fwd"] | {"cudnn_deterministic"}
    for pass_, wanted in rivals.items():
        by_case: dict[str, set[str]] = {}
        for t in trials:
            if t.case.pass_ == pass_ and t.runs:
                by_case.setdefault(t.case.id, set()).add(t.impl)
        assert len(by_case) >= 40
        # the Hopper backward has not all of the head dims
        assert all(wanted - {"hopper"} <= impls <= wanted for impls in by_case.values()), by_case
        assert sum("hopper" in impls for impls in by_case.values()) >= 40
    cases = {t.case for t in trials if t.case.pass_ == "fwd"}
    assert {2048, 4096, 8192, 16384, 32768} <= {c.seqlen_q for c in cases} <= set(range(2048, 32769))
    assert {None, 128, 256, 512, 1024, 2048, 4096} == {c.window for c in cases}
    assert {1, 2, 4, 8} == {c.batch for c in cases} and {"bfloat16", "float16"} == {c.dtype for c in cases}
    assert {(c.head_dim, c.head_dim_v) for c in cases} == {(64, 64), (96, 96), (128, 128), (192, 128), (256, 256)}
    # 1,110 rows took 283 s with 58% of the kernels in the cache, 979 237 s
    assert sum(t.runs for t in trials) <= 1120


def test_upstreams_benchmarks_are_its_own() -> None:
    made = make_plan(load_spec(CONFIGS / "upstream.yaml"), 90)
    shapes = {
        (c.varlen, c.seqlen_q, c.seqlens, c.heads_q, c.heads_kv, c.head_dim, c.window, c.dtype)
        for c in (t.case for t in made.first)
    }
    assert shapes == {
        ("", 4224, (), 28, 4, 128, 256, "float16"),
        ("upstream", 4212, (2271, 4212, 1152), 28, 4, 128, 177, "float16"),
    }
    assert not any(t.rejected for t in made.first)
    ours = Counter((t.impl, t.case.pass_, t.case.varlen) for t in made.first if not is_peer(t.impl))
    assert all(ours["hopper", pass_, varlen] >= 5 for pass_ in ("fwd", "bwd") for varlen in ("", "upstream"))
    assert sum(ours.values()) <= 200
