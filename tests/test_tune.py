"""From a model's config to the sweep it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import sweeps.cli
from sweeps.models import Attention, ModelError, model_of, read_model
from sweeps.plan import make_plan
from sweeps.presets import MODELS
from sweeps.specfile import dump_spec, parse_spec
from sweeps.tune import read_numbers, tune_spec
from tests import synthetic
from tests.synthetic import case, row, tile

GPT_OSS = {"model_type": "gpt_oss", "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
           "hidden_size": 2880, "sliding_window": 128, "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
           "layer_types": ["sliding_attention", "full_attention"] * 2}


def attention(**fields: Any) -> tuple[Attention, ...]:
    return model_of(fields, "config.json").attentions


def test_the_fields_of_a_config() -> None:
    model = model_of(GPT_OSS, "config.json")
    assert (model.name, model.dtype, model.max_seqlen) == ("gpt_oss", "bfloat16", 131072)
    assert model.attentions == (Attention(64, 8, 64, 64, (128, None)),)
    qwen = {"num_attention_heads": 28, "num_key_value_heads": 4, "hidden_size": 3584, "sliding_window": 131072,
            "use_sliding_window": False}
    assert attention(**qwen) == (Attention(28, 4, 128, 128, (None,)),)
    assert attention(**qwen | {"use_sliding_window": True})[0].windows == (131072,)
    latent = {"num_attention_heads": 128, "num_key_value_heads": 128, "head_dim": 64, "qk_nope_head_dim": 128,
              "qk_rope_head_dim": 64, "v_head_dim": 128, "hidden_size": 7168}
    assert attention(**latent) == (Attention(128, 128, 192, 128, (None,)),)
    assert attention(num_attention_heads=12, head_dim=64) == (Attention(12, 12, 64, 64, (None,)),)
    assert attention(**GPT_OSS | {"layer_types": ["full_attention"]})[0].windows == (None,)
    assert model_of({"text_config": GPT_OSS, "dtype": "float16"}, "c").dtype == "bfloat16"    # the part's own
    assert model_of({"text_config": {k: v for k, v in GPT_OSS.items() if k != "torch_dtype"}, "dtype": "float16"},
                    "c").dtype == "float16"
    assert model_of(GPT_OSS | {"torch_dtype": "float32"}, "c").dtype == "bfloat16"


def test_sliding_layers_with_heads_of_their_own() -> None:
    mixed = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128,
             "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8, "sliding_window": 128}
    assert attention(**mixed) == (Attention(64, 4, 192, 128, (None,)), Attention(64, 8, 192, 128, (128,)))


@pytest.mark.parametrize(("fields", "message"), [
    ({"num_attention_heads": None}, "num_attention_heads: expected a number of at least 1, got None"),
    ({"num_key_value_heads": 7}, "num_key_value_heads: expected a divisor of num_attention_heads 64, got 7"),
    ({"head_dim": "64"}, "head_dim: expected a number of at least 1, got '64'"),
    ({"head_dim": None, "hidden_size": 100}, "hidden_size 100 is no multiple of the 64 heads"),
    ({"sliding_window": None}, "sliding_window: expected a number, since layer_types has 'sliding_attention'"),
    ({"layer_types": ["linear_attention"]}, "layer_types: expected 'full_attention' or 'sliding_attention'"),
])
def test_what_a_config_lacks_is_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match="the-file") as error:
        model_of(GPT_OSS | fields, "the-file")
    assert message in str(error.value)


def test_models_by_file_directory_and_preset(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    assert read_model(str(tmp_path)) == read_model(str(tmp_path / "config.json"))
    for name in MODELS:
        assert read_model(name).name == name
    with pytest.raises(ModelError, match="did you mean 'gpt-oss'"):
        read_model("gpt-os")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="expected an object, got list"):
        read_model(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="config.json: cannot be read"):
        read_model(str(tmp_path))


def test_the_sweep_of_a_model() -> None:
    spec = tune_spec(read_model("gpt-oss"))
    assert parse_spec(dump_spec(spec)) == spec
    plan = make_plan(spec, 90)
    cases = {t.case for t in plan.first}
    assert {(c.window, c.seqlen_q) for c in cases} == {(w, n) for w in (128, None) for n in (1024, 2048, 4096, 8192)}
    assert {(c.heads_q, c.heads_kv, c.head_dim, c.head_dim_v, c.dtype) for c in cases} == {(64, 8, 64, 64, "bfloat16")}
    assert {(t.impl, t.case.pass_) for t in plan.first} == {
        ("triton", "fwd"), ("triton", "bwd_dq"), ("triton", "bwd_dkdv"), ("hopper", "fwd"), ("hopper", "bwd")}
    assert {(t.impl, t.case.pass_) for whole in plan.wholes for t in whole} == {("triton", "bwd")}
    assert len(plan.first) < 220                      # minutes, not hours
    assert all(any(t.case == c and t.is_default for t in plan.first) for c in cases)


@pytest.mark.parametrize("name", MODELS)
def test_every_case_of_every_preset_has_tiles_that_can_work(name: str) -> None:
    plan = make_plan(tune_spec(read_model(name)), 90)
    for impl, c in {(t.impl, t.case) for t in plan.first}:
        runs = sum(t.runs for t in plan.first if (t.impl, t.case) == (impl, c))
        if impl == "triton":
            assert runs >= 3, c.id
        elif c.pass_ == "fwd":
            assert runs >= 2, c.id
        else:
            assert runs >= 1, c.id


def test_lengths_and_windows_that_are_asked_for() -> None:
    def workloads(model: dict[str, Any], *asked: Any) -> set[tuple[int | None, int]]:
        return {(t.case.window, t.case.seqlen_q)
                for t in make_plan(tune_spec(model_of(model, "c"), *asked), 90).first}

    assert workloads(GPT_OSS, (512, 3000), (256, None)) == {(256, 512), (256, 3000), (None, 512), (None, 3000)}
    short = GPT_OSS | {"max_position_embeddings": 2048}
    assert {n for _, n in workloads(short)} == {1024, 2048}
    assert {n for _, n in workloads(GPT_OSS | {"max_position_embeddings": 300})} == {300}
    # a window that hides nothing at a length is none there
    assert workloads(GPT_OSS, (64, 1024), (128,)) == {(128, 1024)}
    assert workloads(GPT_OSS, (64,), (128,)) == {(None, 64)}
    assert read_numbers("--windows", "128, none 256") == (128, None, 256) and read_numbers("--seqlens", "") == ()
    for wrong in ("1k", "0", "-5", "1.5"):
        with pytest.raises(ModelError, match="--seqlens: expected numbers"):
            read_numbers("--seqlens", wrong)
    with pytest.raises(ModelError, match="multiple of 8, at most 256, got 320"):
        tune_spec(model_of(GPT_OSS | {"head_dim": 320}, "c"))


def test_the_command_from_the_config_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the measuring, which is replaced by a run directory with rows."""
    monkeypatch.chdir(tmp_path)
    here = synthetic.ENV | {"gpu": synthetic.GPU}
    monkeypatch.setattr(sweeps.cli, "environment", lambda: here)
    seen: dict[str, Any] = {}

    def run(console: Any, spec: Any, plan: Any, run_dir: Path, limit: float | None, *rest: Any) -> None:
        seen.update(spec=spec, limit=limit)
        rows = [row(case("gpt-oss", "fwd", 1024, 128), config=tile(64, 32), ms=0.1)]
        synthetic.write_run(run_dir, rows)

    monkeypatch.setattr(sweeps.cli, "_run_trials", run)
    monkeypatch.setattr(sweeps.cli, "_finish", lambda *a: None)
    (tmp_path / "config.json").write_text(json.dumps(GPT_OSS))
    out = tmp_path / "mine.json"
    arguments = ["tune", "--model", "config.json", "--seqlens", "1024", "--minutes", "3", "--out", str(out)]
    result = CliRunner().invoke(sweeps.cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert seen["limit"] == 3 and seen["spec"].name == "tune-gpt_oss"
    assert json.loads(out.read_text())["gpu"] == "h100"
    assert "1 entries of this run" in result.output and f"FLASH_SINK_ATTN_TUNED={out}" in result.output
    dry = CliRunner().invoke(sweeps.cli.app, [*arguments, "--dry-run"])
    assert dry.exit_code == 0 and "trials" in dry.output


def test_the_command_refuses_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweeps.cli, "environment", lambda: synthetic.ENV | {"gpu": "cpu", "arch": None})
    assert CliRunner().invoke(sweeps.cli.app, ["tune", "--model", "gpt-oss"]).exit_code == sweeps.cli.WRONG_CARD
    assert CliRunner().invoke(sweeps.cli.app, ["tune", "--model", "gone.json"]).exit_code == sweeps.cli.BAD_CONFIG
