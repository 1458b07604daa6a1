"""Runs the attention of a Transformers gpt-oss model through the kernel.

Transformers (4.55 and later) looks attention up by name, in one registry for the attention itself and one for the
masks made once per forward. Both are filled here under one name, and the model's config is pointed at it; no module
is patched, so gradient checkpointing, compiled layers and wrappers around the model go on working.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from flash_sink_attn.api import flash_sink_attn_func, flash_sink_attn_varlen_func

# Without "flash" in it: Transformers takes any such name for FlashAttention and, for gpt-oss, silently puts a kernel
# from its hub in its place.
ATTN_IMPLEMENTATION = "sink_attention"

_PREVIOUS = "_attn_implementation_before_sink_attention"


def replace_gpt_oss_with_flash_sink_attn(model: torch.nn.Module) -> torch.nn.Module:
    """Make a gpt-oss model attend through the kernel, forward and backward, in place.

    Right for training, with or without gradient checkpointing, and for generation with the default (dynamic) cache:

    - A padded batch (2-D ``attention_mask``, padding on either side) runs unpadded; rows of padding yield 0.
    - Packed sequences run as the sequences they are, each blind to the others: either ``position_ids`` that restart
      at 0 without an ``attention_mask``, or ``cu_seq_lens_q`` and its kin as DataCollatorWithFlattening makes them.
      The latter costs no look at the positions and works under torch.compile.
    - What the kernel cannot do raises when it is called: attention dropout, ``output_attentions``, 4-D masks,
      bidirectional attention, float32 outside autocast, static and paged caches.

    Args:
        model: a ``transformers`` gpt-oss model of any head, or a module that holds one (a PEFT wrapper, for instance),
            in float16 or bfloat16 or run under autocast.

    Returns:
        The same model.

    Raises:
        ImportError: no transformers with gpt-oss (4.55 or later).
        TypeError: ``model`` holds no Transformers gpt-oss model.
    """
    base = _gpt_oss_model(model)
    _register()
    previous = base.config._attn_implementation
    if previous != ATTN_IMPLEMENTATION:
        base.set_attn_implementation(ATTN_IMPLEMENTATION)
        if base.config._attn_implementation != ATTN_IMPLEMENTATION:
            raise RuntimeError(f"transformers did not accept the attention implementation {ATTN_IMPLEMENTATION!r}, "
                               f"the model still uses {base.config._attn_implementation!r}")
        setattr(base, _PREVIOUS, previous)
    return model


def restore_gpt_oss_attention(model: torch.nn.Module) -> torch.nn.Module:
    """Undo :func:`replace_gpt_oss_with_flash_sink_attn`: the model attends as it did before. Returns the same model.

    Raises:
        TypeError: ``model`` holds no Transformers gpt-oss model.
        ValueError: its attention was not replaced.
    """
    base = _gpt_oss_model(model)
    if not hasattr(base, _PREVIOUS):
        raise ValueError("model: expected one that went through replace_gpt_oss_with_flash_sink_attn, "
                         f"got one whose attention is {base.config._attn_implementation!r}")
    base.set_attn_implementation(getattr(base, _PREVIOUS))
    delattr(base, _PREVIOUS)
    return model


def _gpt_oss_model(model: torch.nn.Module) -> Any:
    try:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssPreTrainedModel
    except ImportError as error:
        raise ImportError("gpt-oss needs transformers 4.55 or later: pip install 'transformers>=4.55'") from error
    modules = model.modules() if isinstance(model, torch.nn.Module) else iter(())
    for module in modules:
        if isinstance(module, GptOssPreTrainedModel):
            return module
    raise TypeError("model: expected a Transformers gpt-oss model or a module that holds one, "
                    f"got {type(model).__name__}")


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTN_IMPLEMENTATION, sink_attention_forward)
    AttentionMaskInterface.register(ATTN_IMPLEMENTATION, sink_attention_mask)


def sink_attention_mask(
    *,
    kv_length: int,
    q_length: int | None = None,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    cache_position: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    use_vmap: bool = False,
    **_: Any,
) -> torch.Tensor | None:
    """The mask function of the registry: causality and window are the kernel's, so only padding remains.

    Args:
        kv_length: keys the layer will attend to.
        q_length: queries of this forward (Transformers 5); Transformers 4 gives ``cache_position`` instead.
        q_offset: position of the first query.
        kv_offset: position of the first key; above 0 once a sliding cache has dropped keys.
        cache_position: (q_length,) positions of the queries.
        attention_mask: bool (batch, tokens seen so far), False for padding.
        use_vmap: set by Transformers when a caller adds a mask function of its own.

    Returns:
        bool (batch, kv_length), or None where nothing is padded.

    Raises:
        NotImplementedError: the last query is not at the last key, as with a static cache; or a custom mask function.
        ValueError: ``attention_mask`` does not cover all tokens.
    """
    if use_vmap:
        raise NotImplementedError(f"{ATTN_IMPLEMENTATION}: only causal and sliding-window masks are supported, "
                                  "got a custom mask function")
    if cache_position is not None:
        q_length, q_offset = cache_position.shape[0], cache_position[0]
    if q_length is None:
        raise TypeError(f"{ATTN_IMPLEMENTATION}: this transformers gives masks neither q_length nor cache_position")
    # As many keys as queries, from position 0 on: nothing to compare, and no tensor to wait for on the way.
    from_start = isinstance(kv_offset, int) and kv_offset == 0 and kv_length == q_length
    if not from_start and int(kv_offset) + kv_length != int(q_offset) + q_length:
        raise NotImplementedError(
            f"{ATTN_IMPLEMENTATION}: the last query must be at the last key, got queries up to position "
            f"{int(q_offset) + q_length - 1} and keys up to {int(kv_offset) + kv_length - 1}; static caches and prefix "
            "tuning have more keys: use a DynamicCache, or restore_gpt_oss_attention")
    if attention_mask is None:
        return None
    expected = int(kv_offset) + kv_length
    if attention_mask.dim() != 2 or attention_mask.shape[1] != expected:
        raise ValueError(f"attention_mask: expected (batch, {expected}), one column for each token seen so far, "
                         f"got {tuple(attention_mask.shape)}")
    mask = attention_mask[:, expected - kv_length:].to(torch.bool)
    return None if bool(mask.all()) else mask


def sink_attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function of the registry.

    Args:
        module: the attention layer.
        query: (batch, heads_q, seqlen_q, head_dim), float16 or bfloat16; under autocast it is cast, with key and value.
        key: (batch, heads_kv, seqlen_k, head_dim), seqlen_k >= seqlen_q; the last query is at the last key.
        value: (batch, heads_kv, seqlen_k, head_dim_v).
        attention_mask: what :func:`sink_attention_mask` returned.
        dropout: must be 0.
        scaling: of the scores, default head_dim ** -0.5.
        sliding_window: keys a query sees, its own included; None for all before it.
        s_aux: (heads_q,) sinks, None for attention without them.
        kwargs: ``position_ids`` and ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k`` for
            packed sequences; anything that does not change the result is ignored.

    Returns:
        (batch, seqlen_q, heads_q, head_dim_v), and None for the attention weights.

    Raises:
        NotImplementedError: an option the kernel does not have.
        ValueError: a mask or positions without one right answer.
        TypeError: neither float16 nor bfloat16.
    """
    _refuse_unsupported(module, dropout, kwargs)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    layout = _layout(attention_mask, q.shape[0], q.shape[1], k.shape[1], kwargs)
    if layout is None:
        return flash_sink_attn_func(q, k, v, s_aux, sliding_window, softmax_scale=scaling), None
    if sliding_window is not None and not layout.contiguous:
        raise ValueError("attention_mask: expected padding before or after the tokens of a sequence, got padding "
                         f"between them, where a window of {sliding_window} has no one meaning")
    out = flash_sink_attn_varlen_func(
        _take_rows(q, layout.rows_q), _take_rows(k, layout.rows_k), _take_rows(v, layout.rows_k), s_aux,
        layout.cu_seqlens_q, sliding_window, cu_seqlens_k=layout.cu_seqlens_k, max_seqlen_q=layout.max_seqlen_q,
        max_seqlen_k=layout.max_seqlen_k, softmax_scale=scaling)
    if layout.rows_q is not None:
        out = out.new_zeros(q.shape[0] * q.shape[1], *out.shape[1:]).index_copy(0, layout.rows_q, out)
    return out.view(*q.shape[:3], v.shape[-1]), None


def _refuse_unsupported(module: torch.nn.Module, dropout: float, kwargs: dict[str, Any]) -> None:
    is_causal = kwargs.get("is_causal")
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(module.config, "is_causal", True)
    refused = {
        "attention dropout": dropout != 0.0,
        "output_attentions": bool(kwargs.get("output_attentions")),
        "softcap": kwargs.get("softcap") is not None,
        "bidirectional attention (is_causal=False)": not is_causal,
        "a paged cache": kwargs.get("cache") is not None,
    }
    for what, asked in refused.items():
        if asked:
            raise NotImplementedError(f"{ATTN_IMPLEMENTATION}: {what} is not supported; restore_gpt_oss_attention "
                                      "gives the model's own attention back")


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where the sequences of a batch lie once it is flattened to (batch * seqlen) rows.

    ``rows_q`` and ``rows_k`` are the int64 indices of the rows that are no padding, None = all of them;
    ``contiguous``: no sequence has padding between its tokens.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    rows_q: torch.Tensor | None = None
    rows_k: torch.Tensor | None = None
    contiguous: bool = True


def _take_rows(x: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
    flat = x.flatten(0, 1)
    return flat if rows is None else flat.index_select(0, rows)


def _layout(
    mask: torch.Tensor | None, batch: int, seqlen_q: int, seqlen_k: int, kwargs: dict[str, Any]
) -> _Layout | None:
    """None where every row of the batch is one sequence that fills it."""
    cu_seqlens = kwargs.get("cu_seq_lens_q")
    if mask is not None:
        if mask.dim() != 2 or mask.dtype != torch.bool or tuple(mask.shape) != (batch, seqlen_k):
            raise ValueError(f"attention_mask: expected a 2-D padding mask, ({batch}, {seqlen_k}) here, "
                             f"got {mask.dtype} {tuple(mask.shape)}")
        if cu_seqlens is not None:
            raise ValueError("cu_seq_lens_q: packed sequences take no attention_mask with padding, got both")
        return _padded_layout(mask, seqlen_q)
    if cu_seqlens is not None:
        return _Layout(cu_seqlens, kwargs.get("cu_seq_lens_k"), kwargs.get("max_length_q"), kwargs.get("max_length_k"))
    positions = kwargs.get("position_ids")
    if positions is None or seqlen_q == 1:
        return None
    if positions.dim() != 2 or positions.shape[1] != seqlen_q or positions.shape[0] not in (1, batch):
        raise ValueError(f"position_ids: expected (1 or {batch}, {seqlen_q}), got {tuple(positions.shape)}")
    if torch.compiler.is_compiling():
        # Looking at the values would break the graph; a device-side assertion does not.
        torch._assert_async((positions.diff(dim=-1) == 1).all(),
                            "position_ids restart: under torch.compile, pass packed sequences by cu_seq_lens_q")
        return None
    layout = _packed_layout(positions, batch)
    if layout is not None and seqlen_q != seqlen_k:
        raise NotImplementedError(f"{ATTN_IMPLEMENTATION}: packed sequences together with cached keys "
                                  f"({seqlen_q} queries, {seqlen_k} keys) are not supported")
    return layout


# Every layer of a forward gets the same mask and positions: what they say is read (a wait for the device) only once.
_layouts = WeakIdKeyDictionary()


def _once_per_tensor(build: Any) -> Any:
    """Cache ``build(tensor, n)`` for as long as the tensor lives and stays unchanged."""

    @torch.compiler.disable
    def cached(tensor: torch.Tensor, n: int) -> _Layout | None:
        if tensor.is_inference():  # keeps no version that would tell of a change
            return build(tensor, n)
        state = (build, n, tensor._version)
        entry = _layouts.get(tensor)
        if entry is None or entry[0] != state:
            entry = _layouts[tensor] = (state, build(tensor, n))
        return entry[1]

    return cached


@_once_per_tensor
def _padded_layout(mask: torch.Tensor, seqlen_q: int) -> _Layout:
    """``mask`` is bool (batch, seqlen_k); the queries are its last seqlen_q columns."""
    mask_q = mask[:, mask.shape[1] - seqlen_q:]
    lengths = torch.stack([mask_q.sum(1), mask.sum(1)])
    first_tokens = (mask[:, 1:] & ~mask[:, :-1]).sum(1) + mask[:, 0]
    max_q, max_k, runs = torch.cat([lengths.amax(1), first_tokens.amax()[None]]).tolist()
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(1), (1, 0)).to(torch.int32)
    return _Layout(cu_seqlens[0], cu_seqlens[1], max_q, max_k, mask_q.flatten().nonzero().flatten(),
                   mask.flatten().nonzero().flatten(), contiguous=runs <= 1)


@_once_per_tensor
def _packed_layout(positions: torch.Tensor, batch: int) -> _Layout | None:
    """``positions`` is (1 or batch, seqlen); None where no row holds more than one sequence."""
    steps = positions.diff(dim=-1)
    restarts = steps != 1
    if not bool(restarts.any()):
        return None
    if bool((restarts & (positions[:, 1:] != 0)).any()):
        raise ValueError("position_ids: expected steps of 1, or a restart at 0 where a packed sequence begins, got "
                         f"a step of {int(steps[restarts & (positions[:, 1:] != 0)][0])}")
    starts = torch.nn.functional.pad(restarts, (1, 0), value=True).expand(batch, -1).flatten().nonzero().flatten()
    total = batch * positions.shape[1]
    cu_seqlens = torch.nn.functional.pad(starts, (0, 1), value=total).to(torch.int32)
    longest = int(cu_seqlens.diff().max())
    return _Layout(cu_seqlens, cu_seqlens, longest, longest)
