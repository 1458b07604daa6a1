"""What the runner hands to a worker: trials and finals that have no row yet, with what is known of them beforehand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from sweeps.compile_pool import CompileResult
from sweeps.environment import fingerprint, row_key
from sweeps.failures import message
from sweeps.finals import Final
from sweeps.implementation import Implementation
from sweeps.occupancy import REGISTERS
from sweeps.plan import Trial
from sweeps.registry import is_peer, load
from sweeps.spec import SweepSpec

_WARP = 32


@dataclasses.dataclass(eq=False)
class PendingTrial:
    """A trial that still has to become a row.

    Attributes:
        use: what its implementation is loaded by.
        source: which implementation, with which options.
        key: of its row.
        peer: whether it is to compare with, and not under test.
        compiled: what the compilers made of it, None = nothing yet.
        must_compile: whether it has to wait for them.
        beside: its row's status, message and fields from beside other workers, when that was no verdict since they took
            memory or time from it; it runs again alone.
        needs_room: whether others had the memory that it lacked; it runs again once they have ended.
    """

    trial: Trial
    use: str
    source: str
    key: str
    peer: bool
    compiled: CompileResult | None = None
    must_compile: bool = False
    beside: tuple[str, str, dict[str, Any]] | None = None
    needs_room: bool = False

    @property
    def id(self) -> str:
        return self.trial.id

    @property
    def ready(self) -> bool:
        return self.compiled is not None or not self.must_compile

    def request(self, *, sampling: Mapping[str, Any], gate: bool) -> dict[str, Any]:
        """For the worker."""
        return {"trial": self.id, "implementation": self.use, "options": dict(self.trial.options),
                "case": self.trial.case.to_dict(), "config": dict(self.trial.config), "gate": gate,
                "sampling": dict(sampling), "built": bool(self.compiled and self.compiled.resources)}


@dataclasses.dataclass(eq=False)
class PendingFinal:
    """A final that still has to become a record.

    Attributes:
        entrants: as in the final, with their rows' keys.
        key: of its record.
        unplaced: how its worker ended while it made further placements of the inputs; it is held once more without
            them. "" = it did not.
    """

    final: Final
    entrants: list[PendingTrial]
    key: str
    unplaced: str = ""

    @property
    def id(self) -> str:
        return self.final.id

    def request(self, *, sampling: Mapping[str, Any], gate: bool) -> dict[str, Any]:
        """For the worker."""
        sampling = {**sampling, "placements": 1} if self.unplaced else dict(sampling)
        return {"final": self.id, "case": self.final.case.to_dict(), "gate": gate, "sampling": sampling,
                "seed": self.final.seed, "entrants": [
                    {"implementation": p.use, "options": dict(p.trial.options), "config": dict(p.trial.config)}
                    for p in self.entrants]}

    def record(self, env: Mapping[str, Any], outcome: Mapping[str, Any]) -> dict[str, Any]:
        """The line of the finals' log.

        Args:
            outcome: status and message; from the worker also ``entrants``, in their order, and what was measured.

        Returns:
            key, final (its id), case, case_fields, gpu, environment (its fingerprint), all of ``outcome``, and as
            ``entrants`` what each is (trial, key of its row, impl, options, config) with its status, message and
            measurements. Where the worker did not live to tell, they share the final's status.
        """
        outcome = {**outcome, "placements_note": f"1: {self.unplaced}"} if self.unplaced else outcome
        lost = {"status": outcome["status"], "message": outcome["message"]}
        found = outcome.get("entrants") or [lost] * len(self.entrants)
        return {"key": self.key, "final": self.id, "case": self.final.case.id,
                "case_fields": self.final.case.to_dict(), "gpu": env["gpu"], "environment": fingerprint(env),
                "against_peers": self.final.against_peers, **outcome, "entrants": [
                    {"trial": p.id, "key": p.key, "impl": p.trial.impl, "options": dict(p.trial.options),
                     "config": dict(p.trial.config), "is_default": p.trial.is_default, **own}
                    for p, own in zip(self.entrants, found, strict=True)]}


Job = TypeVar("Job", PendingTrial, PendingFinal)


class Catalogue:
    """The implementations of a sweep, each loaded once, with the versions that belong to the keys of its rows."""

    def __init__(self, spec: SweepSpec, env: Mapping[str, Any]) -> None:
        self._spec, self._env = spec, env
        self._found: dict[str, tuple[Implementation, dict[str, str]] | str] = {}

    def pending(self, trial: Trial) -> PendingTrial:
        use = self._spec.implementations[trial.impl].use or trial.impl
        found = self._get(use, trial.options)
        key = row_key(trial.id, {} if isinstance(found, str) else found[1], self._env)
        return PendingTrial(trial, use, _source(use, trial.options), key, is_peer(trial.impl))

    def pending_final(self, final: Final) -> PendingFinal:
        """Its key follows from its entrants' keys, so it holds what theirs hold."""
        entrants = [self.pending(trial) for trial in final.entrants]
        text = json.dumps(["duel" if final.against_peers else "final", final.case.id, sorted(p.key for p in entrants)])
        return PendingFinal(final, entrants, hashlib.sha256(text.encode()).hexdigest()[:16])

    def get(self, p: PendingTrial) -> tuple[Implementation, dict[str, str]] | str:
        """The loaded implementation and its versions, or why it cannot be loaded."""
        return self._get(p.use, p.trial.options)

    def _get(self, use: str, options: Mapping[str, Any]) -> tuple[Implementation, dict[str, str]] | str:
        source = _source(use, options)
        if source not in self._found:
            try:
                implementation = load(use, options)
                self._found[source] = implementation, dict(implementation.versions())
            except Exception as error:  # a user's module can raise anything
                self._found[source] = message(error)
        return self._found[source]


def launch_problem(resources: Mapping[str, Any], config: Mapping[str, Any], shared_limit: int | None) -> str:
    """Why a kernel that was built can never be launched, "" = it may be.

    Args:
        resources: what Implementation.compile returned: shared_bytes, registers (of a thread), and threads (of a
            block) where it is not 32 times the config's num_warps.
        shared_limit: shared memory a block may use, bytes; None = not known.
    """
    shared = resources.get("shared_bytes") or 0
    if shared_limit and shared > shared_limit:
        return f"shared memory: needs {shared} bytes, a block has {shared_limit}"
    registers, warps = resources.get("registers") or 0, config.get("num_warps")
    threads = resources.get("threads") or (warps * _WARP if isinstance(warps, int) else 0)
    # Registers are given to a warp in units of 256, 8 for each of its threads.
    needed = -(-registers // 8) * 8 * -(-threads // _WARP) * _WARP
    if needed > REGISTERS:
        return f"registers: {threads} threads of {registers} need {needed}, an SM has {REGISTERS}"
    return ""


def outstanding(pending: Sequence[Job], done: Iterable[Mapping[str, Any]], retry: Collection[str]) -> list[Job]:
    """Those without a row among ``done``, or with one of a status to be tried again, each once."""
    statuses = {row["key"]: row["status"] for row in done}
    wanted: dict[str, Job] = {}
    for job in pending:
        if job.key not in statuses or statuses[job.key] in retry:
            wanted.setdefault(job.key, job)
    return list(wanted.values())


def trials_among(jobs: Iterable[Trial | Final]) -> list[Trial]:
    return [job for job in jobs if isinstance(job, Trial)]


def finals_among(jobs: Iterable[Trial | Final]) -> list[Final]:
    return [job for job in jobs if isinstance(job, Final)]


def _source(use: str, options: Mapping[str, Any]) -> str:
    return json.dumps([use, dict(options)], sort_keys=True)
