"""Wrong machine code is found once, kept beside the kernel, and never launched."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any

import pytest
import torch

from flash_sink_attn import machine_code
from flash_sink_attn.config import TileConfig
from flash_sink_attn.kernels import launch

DATA = Path(__file__).parent / "data"


def compiled(cubin: bytes, arch: int = 90) -> Any:
    return types.SimpleNamespace(asm={"cubin": cubin},
                                 metadata=types.SimpleNamespace(target=types.SimpleNamespace(arch=arch)))


def test_a_verdict_is_kept_beside_the_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    looked: list[bytes] = []

    def disassemble(cubin: bytes) -> str:
        looked.append(cubin)
        return (DATA / f"ptxas-12.8-{cubin.decode()}.sass").read_text()

    monkeypatch.setattr(machine_code, "disassemble", disassemble)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for _ in range(2):
        assert "overwrites" in str(machine_code.fault_of(compiled(b"fault")))
        assert machine_code.fault_of(compiled(b"sound")) is None
    assert looked == [b"fault", b"sound"]
    assert machine_code.fault_of(compiled(b"fault", arch=80)) is None  # has no such instruction


def test_what_cannot_be_looked_at_counts_as_faulty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def disassemble(cubin: bytes) -> str:
        raise FileNotFoundError("cuobjdump: expected in Triton's package")

    monkeypatch.setattr(machine_code, "disassemble", disassemble)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert "cuobjdump" in str(machine_code.fault_of(compiled(b"any")))
    assert not list(tmp_path.iterdir())  # not kept: the tool may come


class Kernel:
    """As much of a Triton kernel as the launcher uses; notes what was built and what was launched."""

    __name__ = "kernel"
    arg_names = ("X", "REGISTER_A")

    def __init__(self) -> None:
        self.built: list[bool] = []
        self.launched: list[bool] = []

    def warmup(self, *, REGISTER_A: bool, **others: Any) -> str:
        self.built.append(REGISTER_A)
        return "compiled"

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *, REGISTER_A, **others: self.launched.append(REGISTER_A)


@pytest.mark.parametrize("fault", [None, "an operand is overwritten"])
def test_faulty_code_is_replaced_before_it_runs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
                                                fault: str | None) -> None:
    monkeypatch.setattr(launch, "INTERPRETING", False)
    monkeypatch.setattr(launch, "fault_of", lambda compiled: fault)
    kernel = Kernel()

    def once(config: TileConfig) -> Any:
        return launch._launch(kernel, 1, torch.device("cpu"), config, [None], {"REGISTER_A": config.REGISTER_A})

    with caplog.at_level("WARNING", logger="flash_sink_attn"):
        launch._soundly(once, TileConfig(64, 64, REGISTER_A=True))
    assert kernel.built == [True] and kernel.launched == [fault is None]
    assert [str(fault) in r.getMessage() for r in caplog.records] == ([] if fault is None else [True])
