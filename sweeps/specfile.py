"""From a YAML file and ``--set`` overrides to a :class:`SweepSpec`, or to an error that says where and why."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from sweeps.spec import SweepSpec

# Sections that a group may repeat: an override outranks the file, so it replaces what the groups say, too.
_REPEATED = ("shapes", "passes", "tunables", "implementations")
_MERGE = "tag:yaml.org,2002:merge"


class SpecError(ValueError):
    """The config cannot be used; the message names every offending key by its path."""


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice, where YAML would silently keep the last."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True) if key_node.tag != _MERGE else _MERGE
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        super().flatten_mapping(node)
        # with what "<<" brought before the mapping's own keys, which outrank it
        node.value = list({self.construct_object(key, deep=True): (key, value) for key, value in node.value}.values())


def load_spec(path: Path, overrides: Sequence[str] = ()) -> SweepSpec:
    """Reads, overrides and validates a config.

    Besides the keys of :class:`SweepSpec` a file may have ``extends: other.yaml`` (a path relative to its own): it is
    then that file with its own values put in, key by key.

    Args:
        path: of the YAML file.
        overrides: ``dotted.path=YAML value``, applied in order before validation, for example ``shapes.window=[256]``.
            One that names a key of ``shapes``, ``passes`` or ``tunables`` holds in every group; the path
            ``groups.NAME.shapes.window`` means one group.

    Raises:
        SpecError: the file cannot be read, is not YAML, or does not describe a sweep.
    """
    return _validate(_read(path, ()), overrides, str(path))


def parse_spec(text: str, overrides: Sequence[str] = (), *, source: str = "config") -> SweepSpec:
    """:func:`load_spec` for the text of a file without ``extends``; ``source`` is what errors call it."""
    return _validate(_parse(text, source), overrides, source)


def _read(path: Path, extending: tuple[Path, ...]) -> dict[str, Any]:
    path = path.expanduser()
    if path.resolve() in extending:
        raise SpecError(f"{path}: extends itself")
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: cannot be read ({error})") from error
    data = _parse(text, str(path))
    base = data.pop("extends", None)
    if base is None:
        return data
    if not isinstance(base, str):
        raise SpecError(f"{path}: extends: expected a path, got {base!r}")
    return _merge(_read(path.parent / base, (*extending, path.resolve())), data)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        data = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise SpecError(f"{source}: expected keys and values, got {type(data).__name__}")
    return _unshared(data)


def _unshared(value: Any) -> Any:
    """A copy in which what YAML aliases (&x, *x) made one object is several, so that an override changes only one."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def _merge(base: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in own.items():
        below = merged.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def _validate(data: dict[str, Any], overrides: Sequence[str], source: str) -> SweepSpec:
    for override in overrides:
        _override(data, override)
    try:
        return SweepSpec.model_validate(data)
    except ValidationError as error:
        raise SpecError("\n".join(f"{source}: {line}" for line in explain(error))) from error


def dump_spec(spec: SweepSpec) -> str:
    """The config as YAML that :func:`parse_spec` reads back to an equal one."""
    return yaml.safe_dump(spec.model_dump(mode="json", exclude_unset=True), sort_keys=False, default_flow_style=None,
                          width=120)


def explain(error: ValidationError) -> list[str]:
    """One line per fault: the key's path, what was expected, what came."""
    lines = []
    for fault in error.errors():
        where = _path(fault["loc"])
        what = fault["msg"].removeprefix("Value error, ")
        if fault["type"] == "unknown_key":
            lines.append(f"{where}: {what}" if where else what)
        elif not where:
            lines.append(what)
        elif fault["type"] == "missing":
            lines.append(f"{where}: is missing")
        else:
            lines.append(f"{where}: {what}, got {fault['input']!r}")
    return lines


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _override(data: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    keys = path.strip().split(".")
    if not separator or not all(keys):
        raise SpecError(f"--set: expected dotted.path=value such as shapes.window=[256], got {override!r}")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise SpecError(f"--set {override}: the value is not valid YAML: {error}") from error
    if keys[0] == "implementations":
        names = data.get("implementations")
        if isinstance(names, list):
            data["implementations"] = {name: {} for name in names}
    parent = data
    for depth, key in enumerate(keys[:-1], 1):
        if parent.get(key) is None:
            parent[key] = {}
        parent = parent[key]
        if not isinstance(parent, dict):
            raise SpecError(f"--set {override}: {'.'.join(keys[:depth])} is not a section, it is {parent!r}")
    parent[keys[-1]] = value
    if keys[0] in _REPEATED and (keys[0] != "implementations" or len(keys) == 1):
        for group in (data.get("groups") or {}).values():
            _remove(group, keys)


def _remove(section: Any, keys: Sequence[str]) -> None:
    for key in keys[:-1]:
        section = section.get(key) if isinstance(section, dict) else None
    if isinstance(section, dict):
        section.pop(keys[-1], None)
