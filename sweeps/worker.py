"""``python -m sweeps.worker``: one process on one device that prepares, checks and times trials, and may die.

It says which stage of a trial it is in (import, inputs, prepare, run, gate, measure, check), so that the parent can
hold each to a limit of its own, and then the row::

    parent -> worker   {"trial", "implementation", "options", "case", "config", "sampling", "gate"}
    worker -> parent   {"event": "ready", ...}   {"event": "stage", "stage": ...}   {"event": "row", "row": {...}}
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sweeps.cases import Case
from sweeps.child import Connection, connect
from sweeps.columns import OUTPUTS
from sweeps.failures import classify, message, shorten
from sweeps.gate import Oracle, gate_inputs
from sweeps.implementation import Implementation, Inputs, Prepared
from sweeps.measure import Sampling, timer_for
from sweeps.registry import load
from sweeps.walltime import find_wall_time, measure_wall

_KEPT_SHAPES = 4
_KEPT_MEMORY = 0.35  # of the device: above it the oldest shapes are forgotten


class Worker:
    """Runs trials one after the other; what they share (modules, inputs, references) is kept between them.

    Attributes:
        exhausted: the process must end after the row it has just made, since its CUDA context may be unusable.
    """

    def __init__(self, say: Callable[[Mapping[str, Any]], None]) -> None:
        self._say = say
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._timer = timer_for(self._device)
        self._implementations: dict[str, tuple[Implementation, str | None]] = {}
        self._shapes: OrderedDict[str, tuple[Inputs, dict[bool, Oracle]]] = OrderedDict()
        self._stage = ""
        self._stage_start = 0.0
        self._seconds: dict[str, float] = {}
        self.exhausted = False

    def trial(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of the trial's row that are known only here: status, message, errors, times, stage seconds."""
        self._seconds = {}
        row = self._attempt(request)
        if row["status"] == "oom" and len(self._shapes) > 1:  # the other shapes' references may be what is in the way
            self._forget(keep=1)
            row = self._attempt(request)
        if row["status"] == "incorrect":
            self._forget(keep=0)  # what writes wrong values may have written them anywhere
        self._enter("")
        return row | {"seconds": {stage: round(s, 4) for stage, s in self._seconds.items()}}

    def _attempt(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self._run(request)
        except Exception as error:
            status, text = classify(error), f"{self._stage}: {message(error)}"
        if not self._healthy():
            self.exhausted = True
            status = "runtime_error"
        elif status == "oom":
            self._release()
        return {"status": status, "message": text}

    def _run(self, request: Mapping[str, Any]) -> dict[str, Any]:
        case = Case.from_dict(request["case"])
        self._enter("import")
        implementation, missing = self._implementation(request["implementation"], request["options"])
        if missing:
            return {"status": "unavailable", "message": shorten(missing)}
        if reason := implementation.unsupported(case):
            return {"status": "unsupported", "message": shorten(reason)}
        self._enter("inputs")
        inputs, oracles = self._shape(case)
        self._enter("prepare")
        before = self._timer.allocated()
        prepared = implementation.prepare(case, request["config"], inputs)
        held = None if before is None else (self._timer.allocated() or 0) - before
        oracle = oracles[prepared.applies_sink]
        self._enter("run")
        if prepared.poison is not None:
            prepared.poison()
        prepared.run()
        self._synchronize()
        row: dict[str, Any] = {
            "note": prepared.note, "applies_sink": prepared.applies_sink, "deterministic": prepared.deterministic,
            **{name: prepared.resources.get(name) for name in ("registers", "spills", "shared_bytes")}}
        if request["gate"]:
            self._enter("gate")
            row |= self._check(case, prepared, oracle)
            if row["status"] == "incorrect":
                return row
        self._enter("measure")
        row |= self._measure(prepared, Sampling(**request["sampling"]), held)
        if request["gate"]:
            self._enter("check")
            again = self._check(case, prepared, oracle)
            if again["status"] == "incorrect":
                return row | again | {"message": f"after timing: {again['message']}"}
        return row | {"status": "ok", "message": ""}

    def _measure(self, prepared: Prepared, sampling: Sampling, held: int | None) -> dict[str, Any]:
        fields: dict[str, Any] = {"peak_memory_bytes": self._timer.peak_memory(prepared.run, held)}
        timing = self._timer.measure(prepared.run, sampling)
        self.exhausted |= timing.tainted
        fields |= timing.row_fields()
        fields["note"] = "; ".join(note for note in (prepared.note, timing.note) if note)
        if sampling.wall_ms > 0:
            on_gpu = self._device.type == "cuda"
            wall = measure_wall(prepared.run, cuda=on_gpu, budget_ms=sampling.wall_ms, min_calls=3 if on_gpu else 1)
            fields |= {"wall_ms": wall.wall_ms, "wall_calls": wall.calls, "wall_source": wall.source}
        return fields

    def _check(self, case: Case, prepared: Prepared, oracle: Oracle) -> dict[str, Any]:
        with torch.no_grad():
            verdict = oracle.check(prepared.outputs(), OUTPUTS[case.pass_])
        return {**verdict.errors, "status": "ok" if verdict.ok else "incorrect", "message": shorten(verdict.message)}

    def _implementation(self, name: str, options: Mapping[str, Any]) -> tuple[Implementation, str | None]:
        key = json.dumps([name, options], sort_keys=True)
        if key not in self._implementations:
            implementation = load(name, options)
            self._implementations[key] = implementation, implementation.unavailable()
        return self._implementations[key]

    def _shape(self, case: Case) -> tuple[Inputs, dict[bool, Oracle]]:
        """Inputs of a shape and its references (by whether they apply the sink), shared by its configs and passes."""
        if case.shape_id not in self._shapes:
            self._forget(keep=_KEPT_SHAPES - 1)
            while self._shapes and self._memory_used() > _KEPT_MEMORY:
                self._forget(keep=len(self._shapes) - 1)
            inputs = gate_inputs(case, self._device)
            plain = dataclasses.replace(inputs, sinks=None)
            self._shapes[case.shape_id] = inputs, {True: Oracle(case, inputs), False: Oracle(case, plain)}
        self._shapes.move_to_end(case.shape_id)
        return self._shapes[case.shape_id]

    def _forget(self, keep: int) -> None:
        if len(self._shapes) > keep:
            while len(self._shapes) > keep:
                self._shapes.popitem(last=False)
            self._release()

    def _release(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _memory_used(self) -> float:
        if self._device.type != "cuda":
            return 0.0
        return torch.cuda.memory_allocated(self._device) / torch.cuda.get_device_properties(self._device).total_memory

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _healthy(self) -> bool:
        """Whether the CUDA context still works; an illegal access leaves one that fails every call from then on."""
        try:
            self._synchronize()
        except Exception:
            return False
        return True

    def _enter(self, stage: str) -> None:
        now = time.perf_counter()
        if self._stage:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._stage_start
        self._stage, self._stage_start = stage, now
        if stage:
            self._say({"event": "stage", "stage": stage})


def _serve(connection: Connection) -> None:
    worker = Worker(connection.send)
    connection.send({"event": "ready", "note": find_wall_time()[1]})
    gc.freeze()  # the modules loaded so far never become garbage: later collections need not look at them
    for request in connection:
        row = worker.trial(request)
        connection.send({"event": "row", "row": row, "leaving": worker.exhausted})
        if worker.exhausted:
            return


if __name__ == "__main__":
    _serve(connect())
    os._exit(0)  # a broken context can hang in its own destructors
