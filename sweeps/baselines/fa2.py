"""FlashAttention 2 (package flash_attn). It has no sink, so one goes on top: flash_sink_attn.flash_attn_with_sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import Peer, prepare_flash
from sweeps.cases import Case
from sweeps.implementation import Implementation, Inputs, Prepared


class Fa2(Peer):
    name = "fa2"
    is_flash = True
    distributions = ("flash-attn",)
    known_options = ("deterministic",)
    unequal_head_dims = False

    def check_installed(self) -> None:
        from flash_sink_attn.flash_attn_with_sink import FlashAttention2

        FlashAttention2()

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        from flash_sink_attn.flash_attn_with_sink import FlashAttention2

        return prepare_flash(FlashAttention2(), case, inputs, bool(self.options.get("deterministic", False)))


def make(options: Mapping[str, Any]) -> Implementation:
    return Fa2(options)
