"""From the name in a YAML to an implementation: our kernels, the peers of ``sweeps/baselines``, or a dotted path."""

from __future__ import annotations

import difflib
import functools
import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

import sweeps.baselines
from sweeps.implementation import Implementation

OURS = {"triton": "sweeps.ours:TRITON", "hopper": "sweeps.ours:HOPPER"}
# Every other name in the impl column is a kernel under test: ours, or one a user added. A config can list a peer twice
# with different options under names of its own, which then start with the peer's: upstream_64, cudnn-deterministic.
PEERS = ("eager", "sdpa_flash", "sdpa_cudnn", "flex", "fa2", "fa3", "fa4", "cudnn", "tilelang", "gptoss_triton",
         "upstream")

_REQUIRED = ("unavailable", "unsupported", "versions", "space", "rejected", "compile", "prepare")


@functools.lru_cache(maxsize=1)
def built_in() -> dict[str, str]:
    """Every built-in name and the dotted path behind it; a peer's is ``sweeps.baselines.<name>:make``."""
    peers = (m.name for m in pkgutil.iter_modules(sweeps.baselines.__path__))
    return OURS | {name: f"sweeps.baselines.{name}:make" for name in sorted(peers)
                   if not name.startswith("_") and name != "common"}


def peer_of(impl: str) -> str | None:
    """The peer that a name of the impl column is, or is a variant of; None for a kernel under test."""
    return next((p for p in PEERS if impl == p or impl.startswith((f"{p}_", f"{p}-"))), None)


def is_peer(impl: str) -> bool:
    """Whether a name of the impl column is a peer to compare with, and not a kernel under test."""
    return peer_of(impl) is not None


def check_name(impl: str, use: str | None) -> None:
    """The name says what a row is to whoever reads it later, so a peer goes by its own name and nothing else does.

    Args:
        impl: the name an implementation is given in a config.
        use: the dotted path it is loaded from, None = the built-in one of that name.

    Raises:
        ValueError: ``use`` is a peer's and ``impl`` is not, or the other way round.
    """
    loaded = next((p for p in PEERS if use is not None and use.partition(":")[0] == built_in()[p].partition(":")[0]),
                  None)
    if loaded is not None and peer_of(impl) != loaded:
        raise ValueError(f"{impl}: expected a name that starts with the peer's, such as {loaded}_variant, "
                         f"since it uses {use}")
    if loaded is None and use is not None and is_peer(impl):
        raise ValueError(f"{impl}: expected a name that does not start with that of the peer {peer_of(impl)}, "
                         f"since it uses {use}")


def load(name: str, options: Mapping[str, Any] | None = None) -> Implementation:
    """The implementation called ``name``.

    Args:
        name: a built-in name (``triton``, ``eager``, ``fa3`` ...) or ``package.module:NAME``, where NAME is an
            implementation or a callable that takes the options and returns one.
        options: what the YAML gives this implementation, such as ``path``; default none.

    Raises:
        ValueError: no such name, or options for an implementation that takes none.
        ImportError: the module of a dotted path cannot be imported or does not have NAME.
        TypeError: what was found is not an implementation.
    """
    options = dict(options or {})
    known = built_in()
    path = known.get(name, name)
    module_name, separator, attribute = path.partition(":")
    if not separator or not module_name or not attribute:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"implementation: expected one of {', '.join(known)} or a dotted path package.module:NAME, "
                         f"got {name!r}{hint}")
    module = importlib.import_module(module_name)
    if not hasattr(module, attribute):
        raise ImportError(f"implementation {name!r}: module {module_name} has no {attribute!r}")
    found = getattr(module, attribute)
    if isinstance(found, type) or (callable(found) and not hasattr(found, "prepare")):
        found = found(options)
    elif options:
        raise ValueError(f"implementation {name!r}: it takes no options, got {options}")
    missing = [m for m in _REQUIRED if not callable(getattr(found, m, None))]
    missing += [a for a in ("name", "is_flash") if not hasattr(found, a)]
    if missing:
        raise TypeError(f"implementation {name!r}: expected what sweeps.implementation.Implementation asks for, "
                        f"got {type(found).__name__} without {', '.join(missing)}")
    return found
