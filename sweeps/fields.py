"""Building blocks of the config's sections: a strict base class, and values that say what was expected of them."""

from __future__ import annotations

import difflib
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, model_validator
from pydantic_core import PydanticCustomError

from sweeps.presets import MODELS, VARLEN, VarlenBatch


class Section(BaseModel):
    """Base of all sections: frozen, and an unknown key is an error that names the nearest known one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if isinstance(data, dict):
            known = list(cls.model_fields)
            for key in data:
                if key not in known:
                    raise PydanticCustomError("unknown_key", "unknown key {key}{hint}; known keys: {known}", {
                        "key": repr(key), "hint": nearest(str(key), known), "known": ", ".join(known)})
        return data


def nearest(key: str, known: list[str]) -> str:
    """", did you mean 'x'?" for a misspelt key, "" when nothing is near."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return f", did you mean {near[0]!r}?" if near else ""


def _many(value: Any) -> Any:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _positive(value: Any, expected: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {expected}")
    return value


def same_or_pair(expected: str) -> BeforeValidator:
    """A validator for one positive number, which stands for two equal ones, or a pair of them."""
    def validate(value: Any) -> tuple[int, int]:
        pair = value if isinstance(value, (list, tuple)) else (value, value)
        if len(pair) != 2:
            raise ValueError(f"expected {expected}")
        return _positive(pair[0], expected), _positive(pair[1], expected)
    return BeforeValidator(validate)


def _heads(value: Any) -> tuple[int, int]:
    expected = "[query heads, key heads], the first a multiple of the second"
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"expected {expected}")
    query, key = _positive(value[0], expected), _positive(value[1], expected)
    if query % key:
        raise ValueError(f"expected {expected}")
    return query, key


def _window(value: Any) -> int | None:
    return None if value is None else _positive(value, "a number of keys >= 1, or null for causal only")


def _varlen(value: Any) -> VarlenBatch:
    if isinstance(value, VarlenBatch):
        return value
    if isinstance(value, str):
        if value not in VARLEN:
            raise ValueError(f"expected one of {sorted(VARLEN)} or {{name: ..., seqlens: [...]}}"
                             f"{nearest(value, list(VARLEN))}")
        return VARLEN[value]
    expected = "the name of a batch, or {name: letters and digits, seqlens: [tokens >= 0, ...]}"
    if not isinstance(value, dict) or not {"name", "seqlens"} <= set(value) <= {"name", "seqlens", "windows"}:
        raise ValueError(f"expected {expected}")
    name, lengths, windows = value["name"], value["seqlens"], value.get("windows")
    if not isinstance(name, str) or not name.replace("_", "").isalnum():
        raise ValueError(f"expected {expected}")
    if not isinstance(lengths, (list, tuple)) or not lengths:
        raise ValueError(f"expected {expected}")
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in lengths) or max(lengths) < 1:
        raise ValueError(f"expected {expected}, one of them at least 1")
    return VarlenBatch(name, tuple(lengths), None if windows is None else tuple(_window(w) for w in _many(windows)))


def _model_name(value: Any) -> str:
    if value not in MODELS:
        raise ValueError(f"expected one of {sorted(MODELS)}{nearest(str(value), list(MODELS))}")
    return str(value)


Many = BeforeValidator(_many)       # a single value stands for a list of one
Integers = Annotated[tuple[Annotated[int, Field(strict=True)], ...], Many]
Booleans = Annotated[tuple[StrictBool, ...], Many]
Heads = Annotated[tuple[int, int], BeforeValidator(_heads)]
ModelName = Annotated[str, BeforeValidator(_model_name)]
Window = Annotated[int | None, BeforeValidator(_window)]
Varlen = Annotated[Any, BeforeValidator(_varlen)]
