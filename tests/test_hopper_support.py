"""Whether the Hopper kernels can run here, said in words; and their place in the sweeps where they cannot."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flash_sink_attn import _mode, flash_sink_attn_func
from flash_sink_attn.config import HopperBwdConfig, HopperFwdConfig, TileConfig
from flash_sink_attn.hopper import support
from flash_sink_attn.kernel_code import kernel_code_hash
from sweeps import ours
from sweeps.cases import Case
from sweeps.ours import HOPPER, TRITON, kernel_of, num_warps
from tests import fake_kernels

FWD = Case("fwd", "bfloat16", 1, 1024, 1024, 64, 8, 64, 64, 128)


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    support.gluon_problem.cache_clear()
    support.device_problem.cache_clear()
    yield
    support.gluon_problem.cache_clear()
    support.device_problem.cache_clear()


def test_a_gluon_of_another_triton_is_no_gluon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "VERSIONS", ("2.0", "2.1"))
    assert "known to build with Triton 2.0 and 2.1, this is" in str(support.gluon_problem())


def test_a_name_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "VERSIONS", (".".join(_mode.triton.__version__.split(".")[:2]),))
    monkeypatch.setitem(support._NEEDED, "triton.experimental.gluon.language", ("warp_specialize", "no_such_thing"))
    assert str(support.gluon_problem()).endswith("has no language.no_such_thing")
    support.gluon_problem.cache_clear()
    monkeypatch.setitem(sys.modules, "triton.experimental.gluon", None)
    assert str(support.gluon_problem()).endswith("has no triton.experimental.gluon")


def test_the_installed_triton_is_measured_or_said_not_to_be() -> None:
    measured = _mode.triton.__version__.startswith(tuple(f"{v}." for v in support.VERSIONS))
    assert (support.gluon_problem() is None) is measured


@pytest.mark.parametrize(("interpreting", "capability", "words"), [
    (True, None, "interpreter has no Gluon"), (False, None, "need a CUDA device"),
    (False, (10, 0), "the device has 10.0"), (False, (9, 0), "of this Triton"),
])
def test_the_device(monkeypatch: pytest.MonkeyPatch, interpreting: bool, capability: Any, words: str) -> None:
    monkeypatch.setattr(support, "INTERPRETING", interpreting)
    monkeypatch.setattr(support, "gluon_problem", lambda: "of this Triton")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    device = torch.device("cpu") if capability is None else torch.device("cuda", 0)
    assert words in str(support.device_problem(device))


@pytest.mark.parametrize(("change", "readable"), [
    (lambda x: x, True), (lambda x: x.transpose(1, 2), True), (lambda x: x[:, 1:], True), (lambda x: x[..., :56], True),
    (lambda x: x[..., 8:], True), (lambda x: x[..., 4:], False), (lambda x: x.expand(3, -1, -1, -1), False),
    (lambda x: x.transpose(2, 3), False), (lambda x: x[:, :0], False),
    (lambda x: torch.empty(1, 6, 2, 68, dtype=x.dtype)[..., :64], False),
])
def test_what_the_copy_engine_can_read(change: Any, readable: bool) -> None:
    problem = support.tensors_problem(q=change(torch.empty(1, 6, 2, 64, dtype=torch.float16)))
    assert (problem is None) is readable and (readable or "cannot read q" in str(problem))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about a machine without a GPU")
def test_asked_for_without_a_gpu_is_an_error() -> None:
    fake_kernels.needs_no_gpu()
    q, k, v, sinks = fake_kernels.tensors()
    with pytest.raises(ValueError, match=r"impl: 'hopper' was asked for, and the Hopper kernels cannot do this call"):
        flash_sink_attn_func(q, k, v, sinks, impl="hopper")
    assert HOPPER.unavailable() is not None


def test_as_an_implementation_of_the_sweeps() -> None:
    assert HOPPER.unsupported(FWD) is None and "one" in str(HOPPER.unsupported(FWD.with_pass("bwd_dq")))
    odd = Case.from_dict(FWD.to_dict() | {"head_dim": 40, "head_dim_v": 40})
    assert "40/40" in str(HOPPER.unsupported(odd)) and TRITON.unsupported(odd) is None
    for pass_ in ("fwd", "bwd"):
        case = FWD.with_pass(pass_)
        configs = [*HOPPER.space(case), HOPPER.default_config(case, 90)]
        assert len(configs) > 4 and all(HOPPER.rejected(case, c, 90) is None for c in configs[-1:])
        assert "compute capability" in str(HOPPER.rejected(case, configs[0], 80))
        assert num_warps("hopper", pass_, configs[0]) == {"fwd": 8, "bwd": 12}[pass_]
    assert set(HOPPER.default_config(FWD.with_pass("fwd_bwd"), 90)) == {"hopper_fwd", "hopper_bwd"}
    assert "unknown field" in str(HOPPER.rejected(FWD, {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4}, 90))
    assert kernel_of("hopper", "bwd") == "hopper_bwd" and kernel_of("triton", "bwd") is None
    assert num_warps("triton", "fwd", {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8}) == 8
    assert num_warps("fa3", "fwd", {}) is None


def test_each_implementation_has_a_hash_of_its_own() -> None:
    assert kernel_code_hash("hopper") != kernel_code_hash("triton") == kernel_code_hash()


def test_what_the_main_kernels_code_does_not_show_tells_configurations_apart() -> None:
    """By that code duplicates are known, which are not measured."""
    beside = ours._beside_code
    assert beside(HopperFwdConfig(64, 64, PROGRAMS_PER_SM=1)) != beside(HopperFwdConfig(64, 64))
    assert beside(HopperBwdConfig(128, 64, FORM=1)) != beside(HopperBwdConfig(64, 64, FORM=1))
    assert beside(TileConfig(64, 64)) == ""
