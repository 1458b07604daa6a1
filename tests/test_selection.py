"""Which implementation a call uses: what the caller says, what was measured, the heuristic; and what cannot be."""

from __future__ import annotations

import logging
import sys
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sink_attn import dispatch, explain, flash_sink_attn_func, heuristic, selection, tuned_table
from flash_sink_attn.config import AttnConfig, HopperBwdConfig, HopperFwdConfig, Pass, TileConfig
from flash_sink_attn.dispatch import DeviceInfo
from flash_sink_attn.hopper import support
from flash_sink_attn.options import Options
from flash_sink_attn.selection import Selection, select
from flash_sink_attn.tuned_table import ENV_VAR, Entry, ShapeKey, TunedTable
from tests import fake_kernels

KEY = ShapeKey.fixed("bfloat16", 64, 64, 64, 8, 128, 1, 8192, 8192)
NEAR, NEARER, FAR = (KEY._replace(seqlen_q=n, seqlen_k=n) for n in (10000, 8192 - 512, 512))
DEVICE = torch.device("cuda", 0)
FWD, HOPPER_FWD = TileConfig(64, 32), HopperFwdConfig(64, 64, PROGRAMS_PER_SM=3)
LOOSE, SAME_BITS = HopperBwdConfig(64, 128), HopperBwdConfig(64, 64, FORM=1)


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A machine with an H100 and a Gluon that builds the kernels."""
    monkeypatch.setattr(dispatch, "device_info", lambda device: DeviceInfo("h100", 90))
    monkeypatch.setattr(support, "device_problem", lambda device: None)
    monkeypatch.setattr(tuned_table, "_packaged_slugs", cache(lambda: ()))
    dispatch.forget()
    selection._log_fallback.cache_clear()
    yield
    dispatch.forget()


def entry(kernel: Any, config: Any, ms: float, key: ShapeKey = KEY, measured_as: str | None = None) -> Entry:
    return Entry(kernel, key, config, ms, measured_as or ("fwd" if "fwd" in kernel else "bwd"), None, "the-case", "r")


def tuned(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, *entries: Entry) -> None:
    path = tmp_path / "h100.json"
    TunedTable.build("h100", entries, {"r": {}}, arch=90).save(path)
    monkeypatch.setenv(ENV_VAR, str(path))
    dispatch.forget()


def chosen(
    pass_: Pass = "fwd", options: Options | None = None, key: ShapeKey = KEY, **tensors: torch.Tensor
) -> Selection:
    return select(pass_, key, DEVICE, options or Options(), tensors)


@pytest.mark.parametrize(("triton", "hopper", "impl"), [
    ((0.11, KEY), (0.09, KEY), "hopper"), ((0.08, KEY), (0.09, KEY), "triton"),
    # only one of the two was measured for exactly this shape
    ((0.08, KEY), (0.01, NEARER), "triton"), ((0.08, NEARER), (0.99, KEY), "hopper"),
    # at the nearer of two shapes, only one of them was measured there
    ((0.08, NEAR), (0.99, NEARER), "hopper"), ((0.08, NEARER), (0.01, NEAR), "triton"),
    ((0.08, KEY), None, "triton"), (None, (0.08, NEAR), "hopper"),
])
def test_what_is_measured_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, triton: Any, hopper: Any, impl: str
) -> None:
    entries = [entry(kernel, config, *what) for kernel, config, what in (
        ("fwd", FWD, triton), ("hopper_fwd", HOPPER_FWD, hopper)) if what is not None]
    tuned(monkeypatch, tmp_path, *entries)
    found = chosen()
    assert found.impl == impl and found.problem is None
    assert found.decisions[0].config == (HOPPER_FWD if impl == "hopper" else FWD)


def test_near_shapes_are_compared_where_both_were_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The times of two different shapes say nothing about each other."""
    tuned(monkeypatch, tmp_path, entry("fwd", FWD, 0.2, NEAR), entry("hopper_fwd", HOPPER_FWD, 0.1, NEAR),
          entry("fwd", FWD, 0.001, FAR), entry("hopper_fwd", HOPPER_FWD, 0.9, FAR))
    found = chosen()
    assert found.impl == "hopper" and "hopper 0.1 ms, triton 0.2 ms" in found.reason


def test_a_backward_of_two_kernels_is_their_pair_or_their_sum(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    dq, dkdv = TileConfig(64, 64), TileConfig(32, 64)
    hopper = entry("hopper_bwd", LOOSE, 0.25)
    for parts, impl in (
        ((entry("bwd_dq", dq, 0.3), entry("bwd_dkdv", dkdv, 0.3)), "hopper"),
        ((entry("bwd_dq", dq, 0.2), entry("bwd_dkdv", dkdv, 0.2)), "triton"),
        ((entry("bwd_dq", dq, 0.2, measured_as="bwd_dq"), entry("bwd_dkdv", dkdv, 0.2, measured_as="bwd_dkdv")),
         "hopper"),
        ((entry("bwd_dq", dq, 0.1, measured_as="bwd_dq"), entry("bwd_dkdv", dkdv, 0.2)), "triton"),
        ((entry("bwd_dq", dq, 0.1),), "hopper"),
    ):
        tuned(monkeypatch, tmp_path, hopper, *parts)
        assert chosen("bwd").impl == impl, parts


def test_the_same_bits_cost_what_they_cost(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned(monkeypatch, tmp_path, entry("hopper_bwd", LOOSE, 0.2), entry("hopper_bwd", SAME_BITS, 0.28),
          entry("bwd_dq", TileConfig(64, 64), 0.25), entry("bwd_dkdv", TileConfig(32, 64), 0.25))
    for deterministic in (None, False):
        assert chosen("bwd", Options(deterministic=deterministic)).decisions[0].config == LOOSE
    asked = chosen("bwd", Options(deterministic=True))
    assert asked.impl == "triton" and "hopper 0.28 ms, triton 0.25 ms" in asked.reason
    assert chosen("bwd", Options(deterministic=True, impl="hopper")).decisions[0].config == SAME_BITS
    assert chosen("fwd", Options(deterministic=True)).problem is None


def test_without_a_measurement_the_heuristic_decides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned(monkeypatch, tmp_path)
    assert chosen().impl == ("hopper" if ("fwd", 64, 64, True) in heuristic.PREFER_HOPPER else "triton")
    monkeypatch.setattr(heuristic, "PREFER_HOPPER", frozenset({("fwd", 64, 64, True)}))
    found = chosen()
    assert found.impl == "hopper" and found.decisions[0].source == "heuristic"
    assert [chosen("fwd", key=KEY._replace(**other)).impl for other in (
        {"window": None}, {"head_dim": 128, "head_dim_v": 128})] == ["triton"] * 2 and chosen("bwd").impl == "triton"
    monkeypatch.setattr(dispatch, "device_info", lambda device: DeviceInfo("b200", 100))
    assert chosen().impl == "triton"


@pytest.mark.parametrize(("dims", "block_n"), [((192, 128), 128), ((256, 256), 64)])
def test_wide_head_dims_have_the_same_bits_in_one_order(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dims: tuple[int, int], block_n: int
) -> None:
    tuned(monkeypatch, tmp_path)
    monkeypatch.setattr(heuristic, "PREFER_HOPPER", frozenset({("bwd", *dims, True)}))
    key = KEY._replace(head_dim=dims[0], head_dim_v=dims[1], window=1000)
    found = chosen("bwd", key=key)
    assert (found.impl, found.decisions[0].config) == ("hopper", HopperBwdConfig(64, block_n))
    for asked in (Options(deterministic=True), Options(deterministic=True, impl="hopper")):
        found = chosen("bwd", asked, key)
        assert (found.impl, found.decisions[0].config) == ("hopper", HopperBwdConfig(64, block_n, DETERMINISTIC=True))


def test_what_the_caller_says_goes_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tuned(monkeypatch, tmp_path, entry("fwd", FWD, 0.1), entry("hopper_fwd", HOPPER_FWD, 0.2))
    assert chosen("fwd", Options(impl="hopper")).decisions[0].config == HOPPER_FWD
    own = HopperFwdConfig(128, 64)
    found = chosen("fwd", Options(AttnConfig(hopper_fwd=own)))
    assert (found.impl, found.decisions[0].config, found.decisions[0].source) == ("hopper", own, "explicit")
    assert chosen("bwd", Options(AttnConfig(hopper_fwd=own))).reason.startswith("the heuristic")
    assert chosen("fwd", Options(AttnConfig.everywhere(FWD))).impl == "triton"
    both = AttnConfig(fwd=FWD, hopper_fwd=own)
    assert [chosen("fwd", Options(both, impl)).decisions[0].config for impl in ("triton", "hopper")] == [FWD, own]
    for options in (Options(AttnConfig(fwd=FWD), "hopper"), Options(AttnConfig(hopper_fwd=own), "triton")):
        with pytest.raises(ValueError, match="config: .*fwd is a kernel of impl="):
            chosen("fwd", options)


PROBLEMS: dict[str, Any] = {
    "the device": lambda patch: patch.setattr(support, "device_problem", lambda device: "they need another card"),
    "head dims": {"key": KEY._replace(head_dim=40, head_dim_v=40)},
    "strides": {"k": torch.empty(2, 9, 64, dtype=torch.float16)[..., 4:]},
    "nothing in it": {"k": torch.empty(1, 0, 2, 64)},
}


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_the_hopper_kernels_cannot_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    """Chosen by a measurement, they give way with one line in the log; asked for by name, that is an error."""
    given = PROBLEMS[name]
    if callable(given):
        given, _ = {}, given(monkeypatch)
    key = given.get("key", KEY)
    tuned(monkeypatch, tmp_path, entry("hopper_fwd", HOPPER_FWD, 0.1))
    monkeypatch.setattr(heuristic, "PREFER_HOPPER", frozenset({("fwd", key.head_dim, key.head_dim_v, True)}))
    with caplog.at_level(logging.WARNING, logger="flash_sink_attn"):
        found = [chosen("fwd", **given) for _ in range(2)]
    assert [f.impl for f in found] == ["triton"] * 2 and found[0].problem is not None
    assert [r.getMessage() for r in caplog.records if "cannot run" in r.getMessage()] == [
        f"the Hopper kernels would be faster in the forward pass, but cannot run: {found[0].problem}; the portable "
        "ones are used"]
    for options in (Options(impl="hopper"), Options(AttnConfig(hopper_fwd=HOPPER_FWD))):
        with pytest.raises(ValueError, match="was asked for, and the Hopper kernels cannot do this call: ") as error:
            chosen("fwd", options, **given)
        assert str(found[0].problem) in str(error.value)


def test_options_survive_text() -> None:
    for options in (Options(), Options(impl="hopper"), Options(deterministic=False),
                    Options(AttnConfig(fwd=FWD, hopper_bwd=SAME_BITS), "triton", True)):
        assert Options.decode(options.encode()) == options
    assert Options().encode() == ""


# ------------------------------------------------------------------------------------ through the public functions


@pytest.fixture
def host_sides(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[dict[str, Any]]]:
    """The Hopper launchers as functions that note what they are given and fill in their results."""
    seen: dict[str, list[dict[str, Any]]] = {"forward": [], "backward": []}

    def forward(q: Any, k: Any, v: Any, sinks: Any, o: Any, lse: Any, *, sequences: Any, window: Any, scale: float,
                config: Any) -> Any:
        seen["forward"].append(dict(locals()))
        o.fill_(1.0)
        lse.fill_(2.0)

    def backward(q: Any, k: Any, v: Any, sinks: Any, o: Any, lse: Any, do: Any, dlse: Any, dq: Any, dk: Any, dv: Any,
                 dsinks: Any, *, sequences: Any, window: Any, scale: float, config: Any, deterministic: bool) -> Any:
        seen["backward"].append(dict(locals()))
        for i, x in enumerate((dq, dk, dv, dsinks)):
            if x is not None:
                x.fill_(float(i))

    for name, function in (("launch_forward", forward), ("launch_backward", backward)):
        module = types.ModuleType(f"flash_sink_attn.hopper.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return seen


def test_a_call_reaches_the_hopper_kernels(host_sides: dict[str, list[dict[str, Any]]]) -> None:
    fake_kernels.needs_no_gpu()
    q, k, v, sinks = fake_kernels.tensors(seqlen=80)
    for x in (q, k, sinks):
        x.requires_grad_()
    o = flash_sink_attn_func(q, k, v, sinks, 16, impl="hopper", deterministic=True, config={
        "hopper_bwd": SAME_BITS.to_dict()})
    assert (o == 1).all()
    (call,) = host_sides["forward"]
    assert call["window"] == 16 and call["scale"] == 0.125 and isinstance(call["config"], HopperFwdConfig)
    assert call["q"] is q and call["sequences"].seqlen_k == 80
    o.sum().backward()
    (call,) = host_sides["backward"]
    assert call["config"] == SAME_BITS and call["deterministic"] is True and call["dv"] is None
    assert support.tensors_problem(do=call["do"]) is None       # of a sum all rows are one: a copy was made
    assert (q.grad == 0).all() and (k.grad == 1).all() and (sinks.grad == 3).all() and v.grad is None


def test_torch_compile_keeps_implementation_and_determinism(host_sides: dict[str, list[dict[str, Any]]]) -> None:
    fake_kernels.needs_no_gpu()
    q, k, v, sinks = fake_kernels.tensors(seqlen=80)
    q.requires_grad_()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(q: torch.Tensor) -> torch.Tensor:
        return flash_sink_attn_func(q, k, v, sinks, 16, impl="hopper", deterministic=True)

    step(q).float().square().sum().backward()
    assert len(host_sides["forward"]) == len(host_sides["backward"]) == 1
    assert host_sides["backward"][0]["deterministic"] is True and host_sides["backward"][0]["config"].reproducible


def test_it_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key = ShapeKey.fixed("bfloat16", 64, 64, 4, 2, 16, 1, 80, 80)
    tuned(monkeypatch, tmp_path, entry("fwd", FWD, 0.2, key), entry("hopper_fwd", HOPPER_FWD, 0.1, key))
    fake_kernels.needs_no_gpu()
    q, k, v, sinks = fake_kernels.tensors(seqlen=80)
    found = explain(q, k, v, sinks, 16)
    assert found["hopper_fwd"].config == HOPPER_FWD and found["hopper_bwd"].source == "heuristic"
    text = str(found)
    assert "fwd: impl=hopper: the faster one at the-case of h100's table: hopper 0.1 ms, triton 0.2 ms" in text
    assert "not fwd: exact: 64x32" in text and "bwd: impl=hopper: the heuristic" in text and "not bwd_dq" in text
    monkeypatch.setattr(support, "device_problem", lambda device: "they need another card")
    dispatch.forget()
    text = str(explain(q, k, v, sinks, 16, pass_="fwd"))
    assert "impl=triton" in text and "not hopper: they need another card" in text and "bwd" not in text
