"""Case -> the configurations to try on it, each kept or rejected with a reason by the launcher's own rule."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from sweeps.cases import Case
from sweeps.implementation import Implementation


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One configuration of one implementation on one case.

    Attributes:
        config: tunables by name; {} = whatever the implementation does untuned.
        reason: why it cannot work, None = it may.
        is_default: whether it is the implementation's untuned choice.
    """

    config: Mapping[str, Any]
    reason: str | None = None
    is_default: bool = False


def canonical(config: Mapping[str, Any]) -> str:
    """One text for equal configurations."""
    return json.dumps(config, sort_keys=True, separators=(",", ":"))


def default_config(case: Case, implementation: Implementation, arch: int) -> dict[str, Any]:
    """What the implementation does untuned: its ``default_config(case, arch)`` where it can tell, else {}.

    A default that is told has its tiles in its row, and is not measured again as a candidate.
    """
    tell = getattr(implementation, "default_config", None)
    return dict(tell(case, arch)) if callable(tell) else {}


def candidates(case: Case, implementation: Implementation, configs: Iterable[Mapping[str, Any]] | None, arch: int, *,
               default: bool) -> list[Candidate]:
    """The configurations of ``implementation`` to try on ``case``, each once.

    Args:
        configs: those of the YAML; None = the implementation's own ``space``.
        arch: compute capability they are to run on, 90 for Hopper.
        default: put the untuned default first.
    """
    untuned = [default_config(case, implementation, arch)] if default else []
    wanted = [*untuned, *(implementation.space(case) if configs is None else configs)]
    unique = {canonical(config): config for config in wanted}
    return [Candidate(config, implementation.rejected(case, config, arch) if config else None, config in untuned)
            for config in unique.values()]
