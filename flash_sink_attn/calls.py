"""Calls of one kind: everything that is decided once for arguments of the same shapes, strides and dtypes.

A :class:`Call` is looked up by what can be seen of the arguments without reading a value. The first call of a kind
checks its arguments, chooses the implementation and the tiles and records its launches; the next ones allocate their
results and play the recording (flash_sink_attn.launcher, flash_sink_attn.replay). What cannot be recorded (Triton's
interpreter, inputs that have to be copied first, pointers that are not aligned) is done in full each time.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from flash_sink_attn import _checks, _mode, dispatch, launcher
from flash_sink_attn.config import TileConfig
from flash_sink_attn.hopper import support
from flash_sink_attn.kernels import launch
from flash_sink_attn.layout import Sequences
from flash_sink_attn.options import Options
from flash_sink_attn.replay import Tape
from flash_sink_attn.selection import Selection, select
from flash_sink_attn.tuned_table import ENV_VAR, ShapeKey

_DTYPE_NAMES = {torch.float16: "float16", torch.bfloat16: "bfloat16"}
# q, k, v, sinks
Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]

# Packed batches are of another kind whenever their total differs; beyond this many kinds all are forgotten.
_MOST = 4096
_calls: dict[tuple[Any, ...], Call] = {}


def call_for(
    q: Any, k: Any, v: Any, sinks: Any, varlen: bool, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, window: Any,
    scale: Any, config: Any, impl: Any, deterministic: Any,
) -> Call:
    """The call that these arguments are, in the public functions' terms; anything at all may come.

    Raises:
        ValueError, TypeError: an argument is wrong; the message names it, what was expected and what came.
    """
    key = None
    try:
        # 1, 1.0 and True are equal as keys, and not all of them are right: so the types are part of it
        key = (q.shape, q.stride(), q.dtype, q.device, k.shape, k.stride(), k.dtype, k.device, v.shape, v.stride(),
               v.dtype, v.device, window, type(window), scale, type(scale), config, impl, deterministic,
               None if sinks is None else (sinks.shape, sinks.stride(), sinks.dtype, sinks.device),
               varlen and (cu_q.shape, cu_q.dtype, cu_q.device, max_q, type(max_q), max_k, type(max_k),
                           None if cu_k is None else (cu_k.shape, cu_k.dtype, cu_k.device)),
               dispatch.generation(), os.environ.get(ENV_VAR))
        found = _calls.get(key)
        if found is not None:
            return found
    except (AttributeError, TypeError, RuntimeError):  # no tensors, or something without a hash
        key = None
    found = _new_call(q, k, v, sinks, varlen, cu_q, cu_k, max_q, max_k, window, scale, config, impl, deterministic)
    if key is not None:
        if len(_calls) >= _MOST:
            _calls.clear()
        _calls[key] = found
    return found


def check(
    q: Any, k: Any, v: Any, sinks: Any, varlen: bool, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, window: Any,
    scale: Any, config: Any, impl: Any, deterministic: Any,
) -> tuple[float, Options]:
    """The scale and the options of a call whose arguments belong together.

    Raises:
        ValueError, TypeError: an argument is wrong.
    """
    _checks.check_tensors(q, k, v, sinks, varlen=varlen)
    _checks.check_window(window)
    scale = _checks.check_scale(scale, q.shape[-1])
    if varlen:
        _checks.check_packed(q, k, cu_q, cu_k, max_q, max_k)
    _checks.check_impl(impl, deterministic)
    return scale, Options(_checks.as_attn_config(config), impl, deterministic)


def _new_call(
    q: Any, k: Any, v: Any, sinks: Any, varlen: bool, cu_q: Any, cu_k: Any, max_q: Any, max_k: Any, window: Any,
    scale: Any, config: Any, impl: Any, deterministic: Any,
) -> Call:
    scale, options = check(q, k, v, sinks, varlen, cu_q, cu_k, max_q, max_k, window, scale, config, impl, deterministic)
    if _mode.PROBLEM is not None:
        raise ImportError(_mode.PROBLEM)
    if options.config is not None:
        _checks.check_config(options.config, q, k, v)
    # A window that hides nothing is none: faster, and its arithmetic stays within 32 bits however large it was.
    window = None if window is not None and window >= k.shape[0 if varlen else 1] else window
    dims = (_DTYPE_NAMES[q.dtype], q.shape[-1], v.shape[-1], q.shape[-2], k.shape[-2], window)
    key = (ShapeKey.packed(*dims, q.shape[0], max_q or q.shape[0], max_k or k.shape[0]) if varlen
           else ShapeKey.fixed(*dims, q.shape[0], q.shape[1], k.shape[1]))
    kept = {name: _Kept(x.shape, x.dtype) for name, x in (("q", q), ("k", k), ("v", v), ("sinks", sinks))
            if x is not None}
    kept |= {"o": _Kept((*q.shape[:-1], v.shape[-1]), q.dtype), "lse": _Kept(lse_shape(q, varlen), torch.float32)}
    return Call(key, window, scale, options, kept, q.device)


def lse_shape(q: torch.Tensor, varlen: bool) -> tuple[int, ...]:
    """Of lse, for queries of this shape."""
    return (q.shape[1], q.shape[0]) if varlen else (q.shape[0], q.shape[2], q.shape[1])


def place(
    q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Both cu_seqlens where the kernels read them, with their values checked; the second None where it is the first."""
    if cu_q is None:
        return None, None
    on_q = _checks.cu_seqlens_on(q.device, "cu_seqlens", cu_q, q.shape[0])
    if cu_k is None or (cu_k is cu_q and q.shape[0] == k.shape[0]):
        return on_q, None
    return on_q, _checks.cu_seqlens_on(q.device, "cu_seqlens_k", cu_k, k.shape[0])


class _Kept(NamedTuple):
    """What the forward saves of a tensor besides its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Call:
    """What calls of one kind have in common.

    Attributes:
        key: of the tuned table.
        window: as the kernels take it, None for one that hides nothing.
        scale: of the scores.
        options: what the caller asks for.
    """

    def __init__(self, key: ShapeKey, window: int | None, scale: float, options: Options, kept: Mapping[str, _Kept],
                 device: torch.device) -> None:
        self.key, self.window, self.scale, self.options = key, window, scale, options
        self._kept, self._device = kept, device
        self._forward: Tape | None = None
        self._backward: dict[tuple[Any, ...], Tape] = {}

    def select(self, pass_: Any, tensors: Mapping[str, torch.Tensor]) -> Selection:
        """Implementation and tiles of a pass: see :func:`flash_sink_attn.selection.select`."""
        return select(pass_, self.key, self._device, self.options, dict(tensors))

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, cu_q: torch.Tensor | None,
        cu_k: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """o and lse."""
        o = torch.empty(self._kept["o"].shape, dtype=q.dtype, device=self._device)
        lse = torch.empty(self._kept["lse"].shape, dtype=torch.float32, device=self._device)
        tensors = (q, k, v, sinks, o, lse, cu_q, cu_k)
        if self._forward is None or not self._forward.play(tensors):
            with launcher.recording(tensors, self._device) as recorder:
                self._run_forward(q, k, v, sinks, o, lse, self._sequences(q, k, cu_q, cu_k))
            self._forward = recorder.tape() or self._forward
        return o, lse

    def backward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor,
        lse: torch.Tensor, do: torch.Tensor | None, dlse: torch.Tensor | None, cu_q: torch.Tensor | None,
        cu_k: torch.Tensor | None, needs: tuple[bool, ...],
    ) -> Grads:
        """Gradients of q, k, v and sinks, None where not needed.

        Between forward and backward all that was saved belongs to autograd's saved-tensor hooks (activation
        offloading, for one), and their strides need not be the same afterwards.

        Raises:
            ValueError: something else came back than was saved.
        """
        o, lse = o.contiguous(), lse.contiguous()  # as the kernels take them
        if do is None:
            do = torch.zeros_like(o)
        if dlse is not None:
            dlse = dlse.to(torch.float32).contiguous()
        dtype, device = q.dtype, self._device
        dq = torch.empty(q.shape, dtype=dtype, device=device) if needs[0] else None
        dk = torch.empty(k.shape, dtype=dtype, device=device) if needs[1] else None
        dv = torch.empty(v.shape, dtype=dtype, device=device) if needs[2] else None
        dsinks = None if sinks is None or not needs[3] else torch.empty(sinks.shape, dtype=sinks.dtype, device=device)
        tensors = (q, k, v, sinks, o, lse, do, dlse, dq, dk, dv, dsinks, cu_q, cu_k)
        kind = (needs, dlse is None, do.stride(), q.stride(), k.stride(), v.stride(), q.dtype, k.dtype, v.dtype,
                o.dtype, lse.dtype, q.device, k.device, v.device, o.device, lse.device,
                None if sinks is None else (sinks.stride(), sinks.dtype, sinks.device))
        tape = self._backward.get(kind)
        if tape is None:
            self._check_kept({"q": q, "k": k, "v": v, "sinks": sinks, "o": o, "lse": lse})
        if tape is None or not tape.play(tensors):
            with launcher.recording(tensors, device) as recorder:
                self._run_backward(q, k, v, sinks, o, lse, do, dlse, dq, dk, dv, dsinks,
                                   self._sequences(q, k, cu_q, cu_k))
            if (recorded := recorder.tape()) is not None:
                self._backward[kind] = recorded
        return dq, dk, dv, dsinks

    def _check_kept(self, tensors: Mapping[str, torch.Tensor | None]) -> None:
        for name, x in tensors.items():
            expected = self._kept.get(name)
            if x is not None and expected is not None and (
                    x.shape != expected.shape or x.dtype != expected.dtype or x.device != self._device):
                raise ValueError(
                    f"{name}: expected what was saved for the backward, {expected.dtype} {tuple(expected.shape)} on "
                    f"{self._device}, got {x.dtype} {tuple(x.shape)} on {x.device} (from a saved-tensor hook?)")

    def _sequences(
        self, q: torch.Tensor, k: torch.Tensor, cu_q: torch.Tensor | None, cu_k: torch.Tensor | None
    ) -> Sequences:
        if cu_q is None:
            return Sequences(q.shape[0], q.shape[1], k.shape[1])
        return Sequences(cu_q.shape[0] - 1, q.shape[0], k.shape[0], cu_q, cu_k)

    def _run_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor,
        lse: torch.Tensor, sequences: Sequences,
    ) -> None:
        selected = self.select("fwd", {"q": q, "k": k, "v": v})
        forward: Callable[..., Any] = launch.forward
        if selected.impl == "hopper":
            # Gluon is imported where it is used
            forward = importlib.import_module("flash_sink_attn.hopper.launch_forward").forward
        forward(q, k, v, None if sinks is None else sinks.contiguous(), o, lse, sequences=sequences,
                window=self.window, scale=self.scale, config=selected.decisions[0].config)

    def _run_backward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, o: torch.Tensor,
        lse: torch.Tensor, do: torch.Tensor, dlse: torch.Tensor | None, dq: torch.Tensor | None,
        dk: torch.Tensor | None, dv: torch.Tensor | None, dsinks: torch.Tensor | None, sequences: Sequences,
    ) -> None:
        selected = self.select("bwd", {"q": q, "k": k, "v": v})
        sinks = None if sinks is None else sinks.contiguous()
        given: dict[str, Any] = {"sequences": sequences, "window": self.window, "scale": self.scale}
        if selected.impl == "hopper":
            backward = importlib.import_module("flash_sink_attn.hopper.launch_backward").backward
            if support.tensors_problem(do=do) is not None:  # of a sum, for instance, where all rows are one
                do = do.clone(memory_format=torch.contiguous_format)
            backward(
                q, k, v, sinks, o, lse, do, dlse, dq, dk, dv, dsinks, config=selected.decisions[0].config,
                deterministic=bool(self.options.deterministic), **given)
            return
        dq_config, dkdv_config = (decision.config for decision in selected.decisions)
        assert isinstance(dq_config, TileConfig) and isinstance(dkdv_config, TileConfig)
        launch.backward(q, k, v, sinks, o, lse, do, dlse, dq, dk, dv, dsinks, dq_config=dq_config,
                        dkdv_config=dkdv_config, **given)
