"""Configs: what they may say, what they inherit, and that every mistake is named with its place."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from flash_sink_attn.config import CONFIG_CLASS, KERNELS
from sweeps.cases import PASSES, Case
from sweeps.expand import expand
from sweeps.presets import MODELS, VARLEN
from sweeps.sampling import Sampling
from sweeps.spec import TILES, SweepSpec, Timing
from sweeps.specfile import SpecError, dump_spec, load_spec, parse_spec

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.yaml"))
MINIMAL = "name: x\nshapes: {model: gpt-oss, seqlen: 128}\n"


def spec(text: str = "", *overrides: str) -> SweepSpec:
    return parse_spec(MINIMAL + text, overrides)


def shapes_of(sweep: SweepSpec, group: str = "x") -> list[Case]:
    return expand(sweep.resolved_groups()[group].shapes, sweep.seed)


def grid(block_m: int, block_n: int, kernel: Any = "fwd") -> Any:
    return TILES[kernel].model_validate({"BLOCK_M": block_m, "BLOCK_N": block_n})


def error(text: str, *overrides: str) -> str:
    with pytest.raises(SpecError) as caught:
        parse_spec(text, overrides)
    return str(caught.value)


@pytest.mark.parametrize(
    "text,message",
    [
        ("shapse: {}", "config: unknown key 'shapse', did you mean 'shapes'?; known keys: name, description, device"),
        ("timing: {precison: 1}", "config: timing: unknown key 'precison', did you mean 'precision'?"),
        (
            "groups: {a: {tunables: {fwd: {BLOCK_M: 64, BLOCK_N: 64, num_warp: 4}}}}",
            "groups.a.tunables.fwd[0]: unknown key 'num_warp', did you mean 'num_warps'?",
        ),
        ("groups: {a: {shapes: {windows: 4}}}", "groups.a.shapes: unknown key 'windows', did you mean 'window'?"),
        ("gate: {zzz: 1}", "gate: unknown key 'zzz'; known keys: enabled"),
        ("implementations: {eager: {pth: /x}}", "implementations.eager: unknown key 'pth', did you mean 'path'?"),
    ],
)
def test_unknown_keys_name_their_place_and_the_nearest_known(text: str, message: str) -> None:
    assert message in error(MINIMAL + text)


@pytest.mark.parametrize(
    "text,message",
    [
        (
            "name: x\nshapes: {model: gptoss, seqlen: 1}",
            "shapes.model[0]: expected one of ['gpt-oss', 'granite', "
            "'llama-70b', 'mimo-v2-flash', 'qwen2.5-7b'], did you mean 'gpt-oss'?, got 'gptoss'",
        ),
        (
            "name: x\nshapes: {model: gpt-oss, seqlen: [128, 0]}",
            "shapes.seqlen[1]: expected a number of tokens >= 1 or [queries, keys], got 0",
        ),
        (
            "name: x\nshapes: {model: gpt-oss, seqlen: [[1, 2, 3]]}",
            "shapes.seqlen[0]: expected a number of tokens >= 1",
        ),
        (
            "name: x\nshapes: {heads: [[3, 2]], head_dim: 64, seqlen: 1}",
            "shapes.heads[0]: expected [query heads, key heads], the first a multiple of the second, got [3, 2]",
        ),
        (
            "name: x\nshapes: {model: gpt-oss, seqlen: 1, window: 0}",
            "shapes.window[0]: expected a number of keys >= 1, or null for causal only, got 0",
        ),
        (
            "name: x\nshapes: {model: gpt-oss, seqlen: 1, batch: true}",
            "shapes.batch[0]: Input should be a valid integer, got True",
        ),
        (
            "name: x\nshapes: {model: gpt-oss, seqlen: 1, dtype: fp16}",
            "shapes.dtype[0]: Input should be 'bfloat16' or 'float16', got 'fp16'",
        ),
        ("name: x\nshapes: {model: gpt-oss, varlen: upsteam}", "did you mean 'upstream'?, got 'upsteam'"),
        (
            "name: x\nshapes: {model: gpt-oss, varlen: {name: a b, seqlens: [1]}}",
            "shapes.varlen[0]: expected the name of a batch",
        ),
        ("name: x\nshapes: {model: gpt-oss, varlen: {name: a, seqlens: [0, 0]}}", "one of them at least 1"),
        (
            MINIMAL + "passes: [fwd, bwdd]",
            "passes[1]: Input should be 'fwd', 'bwd_dq', 'bwd_dkdv', 'bwd' or 'fwd_bwd', got 'bwdd'",
        ),
        (MINIMAL + "tunables: {fwd: {BLOCK_M: 64}}", "tunables.fwd[0].BLOCK_N: is missing"),
        (MINIMAL + "tunables: {fwd: best}", "tunables.fwd: Input should be a valid tuple, got 'best'"),
        (MINIMAL + "timing: {precision: 0}", "timing.precision: Input should be greater than 0, got 0"),
        (MINIMAL + "implementations: {mine: {use: nowhere}}", "implementations.mine.use: String should match pattern"),
        (MINIMAL + "seed: -1", "seed: Input should be greater than or equal to 0, got -1"),
        ("shapes: {model: gpt-oss, seqlen: 1}", "name: is missing"),
        ("name: a/b\nshapes: {model: gpt-oss, seqlen: 1}", "name: String should match pattern"),
        ("name: x\nshapes: {seqlen: 1}", "shapes: expected model, or heads and head_dim, got neither"),
        ("name: x\nshapes: {heads: [[2, 1]], seqlen: 1}", "shapes: expected model, or heads and head_dim, got neither"),
        ("name: x\nshapes: {model: gpt-oss}", "shapes: expected seqlen or varlen, got neither"),
        (
            MINIMAL + "groups: {a: {implementations: [tritn]}}",
            "groups.a.implementations: 'tritn' is not among the sweep's implementations (triton), did you mean 'tri",
        ),
        (MINIMAL + "name: y", "key 'name' is given twice"),
        (MINIMAL + "seed: 1\nsearch: {<<: {a: 1}, b: 1, b: 2}", "key 'b' is given twice"),
        ("name: [", "not valid YAML"),
        ("- 1", "expected keys and values, got list"),
        ("", "expected keys and values, got NoneType"),
    ],
)
def test_wrong_values_say_what_was_expected_and_what_came(text: str, message: str) -> None:
    assert message in error(text)


def test_a_mapping_takes_what_another_has_and_its_own_outranks_it() -> None:
    """YAML's merge key, also of a mapping that merges itself."""
    found = spec("groups:\n"
                 "  a: {tunables: &a {fwd: {BLOCK_M: 64, BLOCK_N: 32}, bwd_dq: {BLOCK_M: 64, BLOCK_N: 32}}}\n"
                 "  b: {tunables: &b {<<: *a, fwd: {BLOCK_M: 128, BLOCK_N: 32}}}\n"
                 "  c: {tunables: {<<: *b, bwd_dkdv: {BLOCK_M: 16, BLOCK_N: 16}}}\n")
    tunables = found.groups["c"].tunables
    assert [next(iter(grids[0].configs()))["BLOCK_M"]
            for grids in (tunables.fwd, tunables.bwd_dq, tunables.bwd_dkdv)] == [128, 64, 16]


def test_all_faults_are_named_at_once() -> None:
    text = error("name: x\nshapes: {model: gpt-oss, seqlen: 0, batch: 0}\nseed: no")
    assert len(text.splitlines()) == 3


def test_defaults() -> None:
    sweep = spec()
    assert (sweep.seed, sweep.passes, list(sweep.implementations)) == (0, ("fwd", "bwd"), ["triton"])
    assert sweep.device.name is None and sweep.device.compile_arch == 90 and sweep.gate.enabled
    assert sweep.tunables.fwd is None and sweep.tunables.combine == 2


def test_a_spec_is_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        spec().seed = 1


def test_timing_has_a_field_for_everything_the_sampler_can_be_told() -> None:
    timing = Timing()
    assert {f.name: getattr(timing, f.name) for f in dataclasses.fields(Sampling)} == dataclasses.asdict(Sampling())


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_grid_has_the_fields_and_defaults_of_its_kernels_configurations(kernel: Any) -> None:
    of = CONFIG_CLASS[kernel]
    tile = {f.name: f.default for f in dataclasses.fields(of)}
    fields = dict(TILES[kernel].model_fields)
    assert list(fields) == list(tile)
    for name, default in tile.items():
        assert fields[name].is_required() if default is dataclasses.MISSING else fields[name].default == (default,)
    assert [of.from_dict(c) for c in grid(64, 32, kernel).configs()] == [of(64, 32)]


def test_the_hopper_kernels_have_tunables_of_their_own() -> None:
    sweep = spec("tunables: {hopper_fwd: {BLOCK_M: [64, 128], BLOCK_N: 64, PROGRAMS_PER_SM: [0, 3]}, "
                 "hopper_bwd: {BLOCK_M: 64, BLOCK_N: 128}}")
    assert [len(list(grids[0].configs())) for grids in (sweep.tunables.hopper_fwd, sweep.tunables.hopper_bwd)] == [4, 1]
    assert "num_warps" in error(MINIMAL + "tunables: {hopper_fwd: {BLOCK_M: 64, BLOCK_N: 64, num_warps: 4}}")
    assert "SHARE_Q" in error(MINIMAL + "tunables: {hopper_fwd: {BLOCK_M: 64, BLOCK_N: 64, SHARE_QS: true}}")


def test_grids_multiply_and_lists_of_grids_add() -> None:
    sweep = spec(
        "tunables: {fwd: [{BLOCK_M: [64, 128], BLOCK_N: [32, 64], num_warps: [4, 8]}, {BLOCK_M: 16, BLOCK_N: 16}],"
        " bwd_dq: default}"
    )
    assert sweep.tunables.fwd is not None
    configs = [c for grid in sweep.tunables.fwd for c in grid.configs()]
    assert len(configs) == 9
    assert configs[1] == {
        "BLOCK_M": 64,
        "BLOCK_N": 32,
        "num_warps": 8,
        "num_stages": 2,
        "PACK_GQA": False,
        "SPLIT_LOOPS": True,
        "maxnreg": None,
        "TMA": False,
        "REGISTER_A": False,
        "TAIL_N": 0,
        "BRANCH_MASKS": False,
    }
    assert sweep.tunables.bwd_dq is None


def test_models_bring_their_own_windows() -> None:
    cases = shapes_of(parse_spec("name: x\nshapes: {model: [gpt-oss, mimo-v2-flash], seqlen: [512, [1, 256]]}"))
    assert [(c.model, c.window, c.seqlen_q, c.seqlen_k) for c in cases] == [
        ("gpt-oss", 128, 512, 512),
        ("gpt-oss", 128, 1, 256),
        ("gpt-oss", None, 512, 512),
        ("gpt-oss", None, 1, 256),
        ("mimo-v2-flash", 128, 512, 512),
        ("mimo-v2-flash", 128, 1, 256),
    ]
    assert (cases[-1].heads_q, cases[-1].heads_kv, cases[-1].head_dim, cases[-1].head_dim_v) == (64, 8, 192, 128)


def test_a_null_window_is_causal_only_and_not_the_models_own() -> None:
    assert [c.window for c in shapes_of(parse_spec("name: x\nshapes: {model: gpt-oss, seqlen: 8, window: null}"))] == [
        None
    ]


def test_heads_and_head_dims_multiply_beside_models() -> None:
    cases = shapes_of(
        parse_spec(
            "name: x\nseed: 7\nshapes: {model: granite, heads: [[4, 1], [2, 2]], "
            "head_dim: [16, [24, 8]], seqlen: 8, dtype: [float16, bfloat16], window: 3, sinks: false}"
        )
    )
    assert [(c.heads_q, c.head_dim, c.head_dim_v) for c in cases[::2]] == [
        (20, 128, 128),
        (4, 16, 16),
        (4, 24, 8),
        (2, 16, 16),
        (2, 24, 8),
    ]
    assert {c.dtype for c in cases} == {"float16", "bfloat16"} and {c.seed for c in cases} == {7}
    assert not any(c.sinks for c in cases)


def test_varlen_batches_bring_their_own_window_unless_one_is_given() -> None:
    base = "name: x\nshapes: {model: qwen2.5-7b, varlen: [upstream, {name: mine, seqlens: [5, 0, 9]}]}"
    upstream, mine = shapes_of(parse_spec(base))
    assert (upstream.window, upstream.seqlens, upstream.batch, upstream.seqlen_q) == (177, (2271, 4212, 1152), 3, 4212)
    assert (mine.window, mine.seqlens, mine.varlen, mine.seqlen_k) == (None, (5, 0, 9), "mine", 9)
    assert [c.window for c in shapes_of(parse_spec(base, ["shapes.window=[8, null]"]))] == [8, None, 8, None]


def test_one_workload_is_one_case_whichever_way_it_is_named() -> None:
    cases = shapes_of(
        parse_spec("name: x\nshapes: {model: llama-70b, heads: [[64, 8]], head_dim: 128, seqlen: [8, 8]}")
    )
    assert [c.model for c in cases] == ["llama-70b"]


def test_presets_hold_the_published_shapes() -> None:
    shapes = {name: (m.heads_q, m.heads_kv, m.head_dim, m.head_dim_v, m.windows) for name, m in MODELS.items()}
    assert shapes == {
        "gpt-oss": (64, 8, 64, 64, (128, None)),
        "qwen2.5-7b": (28, 4, 128, 128, (None,)),
        "llama-70b": (64, 8, 128, 128, (None,)),
        "granite": (20, 4, 128, 128, (128, None)),
        "mimo-v2-flash": (64, 8, 192, 128, (128,)),
    }
    assert VARLEN["upstream"].seqlens == (2271, 4212, 1152) and VARLEN["upstream"].windows == (177,)


GROUPED = """
name: x
passes: [fwd]
implementations: [triton, eager]
shapes: {model: gpt-oss, seqlen: 128, window: 16, dtype: float16}
tunables: {fwd: {BLOCK_M: 64, BLOCK_N: 64}, combine: 3}
groups:
  same:
  own: {passes: bwd, implementations: [eager], shapes: {seqlen: [64, 32], window: [4, null]},
        tunables: {fwd: default, bwd_dq: {BLOCK_M: 32, BLOCK_N: 32}}}
  packed: {shapes: {varlen: upstream}}
  heads: {shapes: {heads: [[2, 1]], head_dim: 8}}
"""


def test_groups_inherit_what_they_leave_out() -> None:
    groups = parse_spec(GROUPED).resolved_groups()
    assert groups["same"].passes == ("fwd",) and groups["same"].implementations == ("triton", "eager")
    assert groups["same"].tunables.fwd == (grid(64, 64),) and groups["same"].tunables.combine == 3
    own = groups["own"]
    assert own.passes == ("bwd",) and own.implementations == ("eager",)
    assert own.tunables.fwd is None and own.tunables.combine == 3
    assert own.tunables.bwd_dq == (grid(32, 32),)
    assert [(c.seqlen_q, c.window, c.dtype) for c in expand(own.shapes, 0)] == [
        (64, 4, "float16"),
        (32, 4, "float16"),
        (64, None, "float16"),
        (32, None, "float16"),
    ]


def test_varlen_replaces_lengths_and_heads_replace_models() -> None:
    sweep = parse_spec(GROUPED)
    assert [c.varlen for c in shapes_of(sweep, "packed")] == ["upstream"]
    assert [(c.model, c.heads_q, c.seqlen_q) for c in shapes_of(sweep, "heads")] == [("", 2, 128)]


def test_an_override_of_a_shape_holds_in_every_group() -> None:
    sweep = parse_spec(GROUPED, ["shapes.window=[256]", "tunables.fwd.BLOCK_N=[16, 32]", "passes=bwd_dq"])
    assert {c.window for name in sweep.groups for c in shapes_of(sweep, name)} == {256}
    assert {g.passes for g in sweep.resolved_groups().values()} == {("bwd_dq",)}
    grids = sweep.resolved_groups()["same"].tunables.fwd
    assert grids is not None and grids[0].BLOCK_N == (16, 32) and grids[0].BLOCK_M == (64,)


def test_an_override_of_one_group_leaves_the_others() -> None:
    sweep = parse_spec(GROUPED, ["groups.own.shapes.window=99"])
    assert {c.window for c in shapes_of(sweep, "own")} == {99} and {c.window for c in shapes_of(sweep, "same")} == {16}


def test_overrides_of_implementations() -> None:
    sweep = parse_spec(GROUPED, ["implementations.upstream.path=~/src"])
    assert list(sweep.implementations) == ["triton", "eager", "upstream"]
    assert sweep.implementations["upstream"].all_options() == {"path": "~/src"}
    only = parse_spec(GROUPED, ["implementations=[triton]"])
    assert {g.implementations for g in only.resolved_groups().values()} == {("triton",)}


@pytest.mark.parametrize(
    "override,message",
    [
        ("shapes.window", "--set: expected dotted.path=value such as shapes.window=[256], got 'shapes.window'"),
        ("=3", "--set: expected dotted.path=value"),
        ("shapes..window=3", "--set: expected dotted.path=value"),
        ("shapes.window=[", "--set shapes.window=[: the value is not valid YAML"),
        ("passes.fwd=1", "--set passes.fwd=1: passes is not a section"),
        ("shapes.widnow=3", "shapes: unknown key 'widnow', did you mean 'window'?"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    assert message in error(GROUPED, override)


def test_aliases_are_not_shared_with_what_an_override_changes() -> None:
    text = (
        "name: x\nshapes: {model: gpt-oss, seqlen: 8}\ngroups:\n  a: {tunables: &t {fwd: {BLOCK_M: 64, BLOCK_N: 64}}}\n"
        "  b: {tunables: *t}\n"
    )
    sweep = parse_spec(text, ["groups.a.tunables.fwd.BLOCK_M=16"])
    blocks = [g.tunables.fwd[0].BLOCK_M for g in sweep.groups.values() if g.tunables.fwd]
    assert blocks == [(16,), (64,)]


def test_a_file_can_extend_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(GROUPED)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "own.yaml").write_text(
        "extends: ../base.yaml\nname: y\nshapes: {window: 7}\ngroups: {own: {passes: [fwd]}}\n"
    )
    sweep = load_spec(tmp_path / "sub" / "own.yaml")
    assert sweep.name == "y" and {c.window for c in shapes_of(sweep, "same")} == {7}
    assert sweep.groups["own"].passes == ("fwd",) and {c.window for c in shapes_of(sweep, "own")} == {4, None}


def test_a_file_cannot_extend_itself_or_nothing(tmp_path: Path) -> None:
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("extends: b.yaml\n")
    b.write_text("extends: a.yaml\n")
    with pytest.raises(SpecError, match="extends itself"):
        load_spec(a)
    a.write_text("extends: gone.yaml\n")
    with pytest.raises(SpecError, match="gone.yaml: cannot be read"):
        load_spec(a)
    a.write_text("extends: [1]\n")
    with pytest.raises(SpecError, match="extends: expected a path"):
        load_spec(a)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_shipped_config_is_valid_and_survives_being_written_down(path: Path) -> None:
    sweep = load_spec(path)
    assert parse_spec(dump_spec(sweep)) == sweep
    assert sweep.description and sweep.name == path.stem
    for name, group in sweep.resolved_groups().items():
        cases = expand(group.shapes, sweep.seed)
        assert cases and set(group.passes or ()) <= set(PASSES), name


def test_shipped_configs_name_their_cards() -> None:
    devices = {path.stem: load_spec(path).device for path in CONFIGS}
    assert {name: d.name for name, d in devices.items()} == {
        "cpu": None,
        "quick": "cuda",
        "upstream": "cuda",
        "h100": "H100",
        "h200": "H200",
        "h20": "H20",
        "heldout": "H100",
        "heldout-h200": "H200",
        "repeat": "H100",
        "board": "H100",
        "packed": "cuda",
    }
    assert [name for name, d in devices.items() if not d.measured] == ["h20"]


@pytest.mark.parametrize(
    "device,gpu,refused",
    [
        ("null", "cpu", False),
        ("null", "NVIDIA H20", False),
        ("cuda", "cpu", True),
        ("cuda", "NVIDIA H20", False),
        ("H100", "NVIDIA H100 80GB HBM3", False),
        ("H100", "NVIDIA H100 PCIe", True),
        ("H100", "NVIDIA H200", True),
        ("H20", "NVIDIA H200", True),
        ("H200", "NVIDIA H20", True),
        ("H100", "cpu", True),
        ("NVIDIA B200", "NVIDIA B200", False),
        ("NVIDIA B200", "NVIDIA H200", True),
    ],
)
def test_a_config_refuses_another_card(device: str, gpu: str, refused: bool) -> None:
    reason = spec(f"device: {device}").device.refusal(gpu)
    assert (reason is not None) == refused
    if reason:
        assert reason.startswith("device.name: ") and (gpu in reason or "no CUDA device" in reason)


def test_the_architecture_to_compile_for() -> None:
    assert spec("device: {name: A100 SXM 80GB}").device.compile_arch == 80
    assert spec("device: {name: H100, arch: 100}").device.compile_arch == 100
