"""The project this one is compatible with, from the user's copy, loaded under another name since it has ours."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from sweeps.baselines.common import (
    RETAINED_GRAPH,
    Peer,
    configured_path,
    hash_files,
    prepare_autograd,
    visible_window,
)
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared

_FIXED, _VARLEN, _CACHE = "flash_sink_attn_gpt_oss", "flash_sink_varlen_attn_gpt_oss", "sliding_cache"
_BLOCKS = (64, 128)


class Upstream(Peer):
    name = "upstream"
    known_options = ("path", "block", "disable_bf16_atomic_add")
    fewer_queries = False  # its loops end at the query's own block
    unequal_head_dims = False
    no_sinks = False
    max_head_dim = 128

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        block = options.get("block")
        if block is not None and block not in _BLOCKS:
            raise ValueError(f"upstream: option block: expected one of {_BLOCKS}, got {block!r}")
        self._blocks = _BLOCKS if block is None else (block,)

    def _package(self) -> Path:
        path = configured_path(self.name, self.options, "a checkout of upstream's repository")
        for folder in (path, path / "flash_sink_attn"):
            if (folder / f"{_FIXED}.py").is_file():
                return folder
        raise FileNotFoundError(f"upstream: path: expected a folder with flash_sink_attn/{_FIXED}.py, got {path}")

    def load(self, module: str) -> ModuleType:
        """A module of upstream's package. The package's own ``__init__``, which needs flash_attn, is not run."""
        folder = self._package()
        alias = f"_peer_upstream_{hash_files(folder.glob('*.py'))}"
        if alias not in sys.modules:
            package = ModuleType(alias)
            package.__path__ = [str(folder)]
            sys.modules[alias] = package
        return importlib.import_module(f"{alias}.{module}")

    def check_installed(self) -> None:
        for module in (_FIXED, _VARLEN, _CACHE):
            self.load(module)

    def unsupported(self, case: Case) -> str | None:
        if reason := super().unsupported(case):
            return reason
        if case.head_dim < 16 or case.head_dim & (case.head_dim - 1):
            return f"upstream loads whole powers of two of at least 16, got head dim {case.head_dim}"
        return None

    def versions(self) -> dict[str, str]:
        try:
            return {"upstream_source": hash_files(self._package().glob("*.py"))}
        except OSError:
            return {}

    def space(self, case: Case) -> Iterable[dict[str, Any]]:
        return [{"BLOCK_M": block, "BLOCK_N": block} for block in self._blocks]

    def rejected(self, case: Case, config: Mapping[str, Any], arch: int) -> str | None:
        unknown = sorted(set(config) - {"BLOCK_M", "BLOCK_N"})
        if unknown:
            return f"upstream's tunables are BLOCK_M and BLOCK_N, got {unknown[0]}"
        block_m = config.get("BLOCK_M", self._blocks[0])
        block_n = config.get("BLOCK_N", block_m)
        if block_m != block_n or block_m not in _BLOCKS:
            return f"upstream is right for equal blocks of {_BLOCKS} only, got {block_m}x{block_n}"
        return None

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        varlen = inputs.cu_seqlens is not None
        module = self.load(_VARLEN if varlen else _FIXED)
        function = module.FlashSinkVarlenAttention.apply if varlen else module.FlashSinkAttention.apply
        manager_class = self.load(_CACHE).SlidingCacheManager
        block = config.get("BLOCK_M", self._blocks[0])
        fp32_sums = bool(self.options.get("disable_bf16_atomic_add", False))
        before = (inputs.cu_seqlens,) if varlen else ()

        def select_blocks() -> None:
            module.BLOCK_M = module.BLOCK_N = block  # type: ignore[attr-defined]  # its only way to set them

        def attention(q: Any, k: Any, v: Any, sinks: Any) -> tuple[Any, None]:
            manager = manager_class(visible_window(case))
            manager.update(k, v)
            return function(q, k, v, sinks, *before, manager, fp32_sums), None

        notes = [] if case.pass_ == "fwd" else [
            "dK and dV summed by float32 atomics" if fp32_sums else f"dK and dV summed by {case.dtype} atomics"]
        if case.pass_ == "bwd":
            notes.append(RETAINED_GRAPH)
        select_blocks()
        prepared = prepare_autograd(case, inputs, attention, note="; ".join(notes), deterministic=False)
        with_any_blocks = prepared.run

        def run() -> None:
            select_blocks()  # another prepared case may have set others since
            with_any_blocks()

        prepared.run = run
        return prepared


def make(options: Mapping[str, Any]) -> Implementation:
    return Upstream(options)
