"""Exact attention with learned sink logits, in Triton kernels that use the block sizes a sweep found best."""

from typing import TYPE_CHECKING, Any

from flash_sink_attn import _mode  # noqa: F401  isort: skip  (decides about the interpreter before any kernel exists)

from flash_sink_attn.api import flash_sink_attn_func, flash_sink_attn_varlen_func
from flash_sink_attn.config import AttnConfig, TileConfig
from flash_sink_attn.explanation import explain
from flash_sink_attn.flash_attn_with_sink import flash_attn_with_sink_func
from flash_sink_attn.sliding_cache import SinkCacheManager, SlidingCacheManager

if TYPE_CHECKING:
    from flash_sink_attn.gpt_oss import replace_gpt_oss_with_flash_sink_attn, restore_gpt_oss_attention

__version__ = "0.1.0"

__all__ = [
    "AttnConfig",
    "SinkCacheManager",
    "SlidingCacheManager",
    "TileConfig",
    "explain",
    "flash_attn_with_sink_func",
    "flash_sink_attn_func",
    "flash_sink_attn_varlen_func",
    "replace_gpt_oss_with_flash_sink_attn",
    "restore_gpt_oss_attention",
]


def __getattr__(name: str) -> Any:
    """What is for Transformers' models: imported when it is used, since it brings torch._dynamo, two seconds' worth."""
    if name not in ("replace_gpt_oss_with_flash_sink_attn", "restore_gpt_oss_attention"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from flash_sink_attn import gpt_oss

    return getattr(gpt_oss, name)
