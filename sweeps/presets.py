"""Attention shapes of well-known models, and batches of unequal lengths, by name."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ModelShape:
    """The attention of one model.

    Attributes:
        heads_q: query heads of a layer.
        heads_kv: key and value heads of a layer.
        head_dim: dimension of a query and key head.
        head_dim_v: dimension of a value head.
        windows: windows of its layers, the query's own key counted; None = causal only.
        source: where the numbers come from.
    """

    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    windows: tuple[int | None, ...]
    source: str


MODELS: dict[str, ModelShape] = {
    "gpt-oss": ModelShape(64, 8, 64, 64, (128, None), "openai/gpt-oss-20b and -120b config.json: alternating layers"),
    "qwen2.5-7b": ModelShape(28, 4, 128, 128, (None,), "Qwen/Qwen2.5-7B config.json: hidden 3584 over 28 heads"),
    "llama-70b": ModelShape(64, 8, 128, 128, (None,), "meta-llama/Llama-3-70B config.json: hidden 8192 over 64 heads"),
    "granite": ModelShape(20, 4, 128, 128, (128, None),
                          "Transformers' GraniteSWAConfig, Granite with learned sinks: hidden 2560 over 20 heads, "
                          "every fourth layer full"),
    "mimo-v2-flash": ModelShape(64, 8, 192, 128, (128,),
                                "XiaomiMiMo/MiMo-V2-Flash config.json: its sliding layers, the ones with sinks"),
}


@dataclasses.dataclass(frozen=True)
class VarlenBatch:
    """A packed batch of sequences of unequal length, queries and keys alike.

    Attributes:
        name: the varlen column and part of the case's id.
        seqlens: tokens of each sequence.
        windows: windows it is usually run with; None here = the model's own.
    """

    name: str
    seqlens: tuple[int, ...]
    windows: tuple[int | None, ...] | None = None


VARLEN: dict[str, VarlenBatch] = {
    batch.name: batch for batch in (
        VarlenBatch("upstream", (2271, 4212, 1152), (177,)),     # upstream's benchmark_varlen.py
        VarlenBatch("skewed", (8192, 3, 1, 1024, 517, 2048, 65, 4096)),
        VarlenBatch("even", (2048, 2048, 2048, 2048)),
        VarlenBatch("one_long", (8192, *(128,) * 63)),
    )
}
