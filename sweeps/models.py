"""The attention of a model, out of its Transformers ``config.json`` or out of a preset."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sweeps.fields import nearest
from sweeps.presets import MODELS

_DTYPES = ("bfloat16", "float16")


class ModelError(ValueError):
    """The file or name describes no attention that can be tuned; the message names the file and the field."""


@dataclasses.dataclass(frozen=True)
class Attention:
    """One kind of attention layer of a model.

    Attributes:
        heads_q, heads_kv: query and key heads.
        head_dim, head_dim_v: dimension of a query and key head, and of a value head.
        windows: windows of these layers, the query's own key counted; None = causal only.
    """

    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    windows: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Model:
    """What the tuning of a model needs to know.

    Attributes:
        name: for file names and reports.
        attentions: its kinds of attention layers.
        dtype: "bfloat16" or "float16".
        max_seqlen: the longest context in tokens, None where the config does not say.
    """

    name: str
    attentions: tuple[Attention, ...]
    dtype: str
    max_seqlen: int | None


def read_model(which: str) -> Model:
    """A model by the path of its ``config.json`` (or of the directory that holds it), or by a preset's name.

    Raises:
        ModelError: neither; not a config; or a field is missing or wrong.
    """
    path = Path(which).expanduser()
    if which in MODELS:
        m = MODELS[which]
        return Model(which, (Attention(m.heads_q, m.heads_kv, m.head_dim, m.head_dim_v, m.windows),), "bfloat16", None)
    if path.is_dir():
        path = path / "config.json"
    if not path.is_file():
        raise ModelError(f"--model: expected a Transformers config.json or one of {', '.join(sorted(MODELS))}, got "
                         f"{which!r}{nearest(which, list(MODELS))}")
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: expected an object, got {type(config).__name__}")
    return model_of(config, str(path))


def model_of(config: Mapping[str, Any], source: str) -> Model:
    """The model that a Transformers config describes.

    Read are ``num_attention_heads``, ``num_key_value_heads`` (default: as many), ``head_dim`` (default: hidden_size
    over the heads), ``v_head_dim``; for latent attention ``qk_nope_head_dim`` + ``qk_rope_head_dim``;
    ``sliding_window`` with ``use_sliding_window`` and ``layer_types``; the same of sliding layers that have their own,
    under names with ``swa_``; ``max_position_embeddings``; ``dtype`` or ``torch_dtype``. Of a config of several parts
    ``text_config`` is the one.

    Args:
        config: the parsed file.
        source: what errors call it.
    """
    outer = config
    if isinstance(config.get("text_config"), dict):
        config = config["text_config"]
    fields = _Fields(config, source)
    windows = _windows(fields)
    full = [w for w in windows if w is None]
    sliding = [w for w in windows if w is not None]
    own = any(name.startswith("swa_") for name in config) and bool(sliding)
    kinds = [("", tuple(full)), ("swa_", tuple(sliding))] if own else [("", windows)]
    named = (part.get(name) for part in (config, outer) for name in ("dtype", "torch_dtype"))
    dtype = str(next(filter(None, named), "bfloat16")).removeprefix("torch.")
    # a model kept in float32 is run in half precision where this kernel is used
    return Model(str(config.get("model_type") or Path(source).stem),
                 tuple(_attention(fields, prefix, w) for prefix, w in kinds if w),
                 dtype if dtype in _DTYPES else "bfloat16", fields.number("max_position_embeddings", optional=True))


class _Fields:
    def __init__(self, config: Mapping[str, Any], source: str) -> None:
        self.config, self.source = config, source

    def number(self, name: str, *, prefix: str = "", optional: bool = False) -> int | None:
        """A positive number, of ``prefix + name`` where that is there."""
        name = prefix + name if self.config.get(prefix + name) is not None else name
        value = self.config.get(name)
        if value is None and optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.source}: {name}: expected a number of at least 1, got {value!r}")
        return value


def _attention(fields: _Fields, prefix: str, windows: tuple[int | None, ...]) -> Attention:
    heads = fields.number("num_attention_heads", prefix=prefix)
    assert heads is not None
    heads_kv = fields.number("num_key_value_heads", prefix=prefix, optional=True) or heads
    if heads % heads_kv:
        raise ModelError(f"{fields.source}: num_key_value_heads: expected a divisor of num_attention_heads {heads}, "
                         f"got {heads_kv}")
    nope, rope = (fields.number(f"qk_{part}_head_dim", optional=True) for part in ("nope", "rope"))
    if nope and rope:
        head_dim = nope + rope
    else:
        found = fields.number("head_dim", prefix=prefix, optional=True)
        hidden = None if found else fields.number("hidden_size")
        if hidden and hidden % heads:
            raise ModelError(f"{fields.source}: head_dim: is missing, and hidden_size {hidden} is no multiple of the "
                             f"{heads} heads")
        head_dim = found or (hidden or 0) // heads
    head_dim_v = fields.number("v_head_dim", prefix=prefix, optional=True) or head_dim
    return Attention(heads, heads_kv, head_dim, head_dim_v, windows)


def _windows(fields: _Fields) -> tuple[int | None, ...]:
    """The windows of a config's layers, a sliding one first."""
    config = fields.config
    window = fields.number("sliding_window", optional=True)
    kinds = config.get("layer_types")
    if config.get("use_sliding_window") is False:
        window, kinds = None, None
    if kinds is None:
        # without a list per layer: all layers slide, unless the config says that only every n-th one does, or not
        alternate = config.get("sliding_window_pattern") or any(name.startswith("swa_") for name in config)
        return (None,) if window is None else (window, None) if alternate else (window,)
    if not isinstance(kinds, list) or not kinds:
        raise ModelError(f"{fields.source}: layer_types: expected a list of names, got {kinds!r}")
    found: list[int | None] = []
    if "sliding_attention" in kinds:
        if window is None:
            raise ModelError(f"{fields.source}: sliding_window: expected a number, since layer_types has "
                             "'sliding_attention'")
        found.append(window)
    if "full_attention" in kinds:
        found.append(None)
    if not found:
        raise ModelError(f"{fields.source}: layer_types: expected 'full_attention' or 'sliding_attention' among them, "
                         f"got {sorted(set(map(str, kinds)))}")
    return tuple(found)
