"""The key/value holder that the attention functions accept in place of a window."""

from __future__ import annotations

import operator

import torch


class SlidingCacheManager:
    """A window together with the keys and values it applies to.

    Passed as the ``window`` of :func:`flash_sink_attn_func` or :func:`flash_sink_attn_varlen_func`, its ``key`` and
    ``val`` replace the call's k and v, and its ``sliding_window`` is the window. It holds exactly what the last
    :meth:`update` gave it: nothing is copied, appended or dropped, and gradients flow through.

    Args:
        sliding_window: keys a query sees, its own included; None for causal attention without a window. Default 256.

    Attributes:
        sliding_window: as given.
        key: (batch, seqlen, heads_kv, head_dim) or (total_tokens, heads_kv, head_dim), None before the first update.
        val: as ``key``, its last dimension may differ.
        num_kv: keys held: seqlen, or total_tokens for the three-dimensional layout; 0 before the first update.

    Raises:
        TypeError: ``sliding_window`` is neither an integer nor None.
        ValueError: ``sliding_window`` is below 1.
    """

    def __init__(self, sliding_window: int | None = 256) -> None:
        self.sliding_window = _checked_window(sliding_window)
        self.reset()

    def __repr__(self) -> str:
        return f"SlidingCacheManager(sliding_window={self.sliding_window}, num_kv={self.num_kv})"

    def reset(self) -> None:
        """Forget keys and values; the window stays."""
        self.key: torch.Tensor | None = None
        self.val: torch.Tensor | None = None
        self.num_kv = 0

    def update(self, key: torch.Tensor, val: torch.Tensor) -> None:
        """Hold ``key`` and ``val`` from now on, in place of what was held before.

        Args:
            key: (batch, seqlen, heads_kv, head_dim) or (total_tokens, heads_kv, head_dim).
            val: the same but for the last dimension, of the same dtype and on the same device.

        Raises:
            TypeError: not tensors, or of two dtypes.
            ValueError: another rank, two shapes that disagree before the last dimension, or two devices.
        """
        for name, tensor in (("key", key), ("val", val)):
            if not isinstance(tensor, torch.Tensor):
                raise TypeError(f"{name}: expected a torch.Tensor, got {type(tensor).__name__}")
        if key.dim() not in (3, 4):
            raise ValueError("key: expected (batch, seqlen, heads_kv, head_dim) or (total_tokens, heads_kv, head_dim), "
                             f"got shape {tuple(key.shape)}")
        if val.dim() != key.dim() or val.shape[:-1] != key.shape[:-1]:
            raise ValueError(f"val: expected key's shape {tuple(key.shape)} up to the last dimension, "
                             f"got {tuple(val.shape)}")
        if val.dtype != key.dtype:
            raise TypeError(f"val: expected key's dtype {key.dtype}, got {val.dtype}")
        if val.device != key.device:
            raise ValueError(f"val: expected key's device {key.device}, got {val.device}")
        self.key = key
        self.val = val
        self.num_kv = key.shape[-3]


def _checked_window(window: object) -> int | None:
    if window is None:
        return None
    if isinstance(window, bool):
        raise TypeError("sliding_window: expected an integer >= 1 or None, got a bool")
    try:
        value = operator.index(window)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"sliding_window: expected an integer >= 1 or None, got {type(window).__name__}") from None
    if value < 1:
        raise ValueError(f"sliding_window: expected an integer >= 1 or None, got {value}")
    return value


SinkCacheManager = SlidingCacheManager
