"""``python -m sweeps.worker [WORKERS]``: one process on one device that prepares, checks and times, and may die.

It says which stage of a trial it is in (import, waiting, inputs, prepare, run, gate, measure, placements, check), so
that the parent can hold each to a limit of its own, and then the row. Where it shares the device with other workers
(WORKERS in all, default 1), it asks for it and waits before it uses it for long, and gives it back while it prepares
what may have to be compiled::

    parent -> worker   {"trial", "implementation", "options", "case", "config", "sampling", "gate", "built"}
                       {"final", "entrants": [{"implementation", "options", "config"}], "case", "sampling", "gate",
                        "seed"}
                       {"grant": true}, the answer to the stage "waiting"
    worker -> parent   {"event": "ready", ...}   {"event": "stage", "stage", "at", "holding"}
                       {"event": "row", "row": {...}, "leaving"}
"""

from __future__ import annotations

import dataclasses
import gc
import json
import math
import os
import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from sweeps.cases import Case
from sweeps.child import Connection, connect
from sweeps.columns import OUTPUTS
from sweeps.contest import time_finalists
from sweeps.failures import classify, message, shorten
from sweeps.gate import Oracle, gate_inputs
from sweeps.implementation import Implementation, Inputs, Prepared
from sweeps.measure import Call, timer_for
from sweeps.placements import PLACING, moved, nbytes
from sweeps.registry import load
from sweeps.sampling import FinalSampling, Sampling
from sweeps.walltime import find_wall_time, measure_wall

_KEPT_SHAPES = 4
_KEPT_MEMORY = 0.35   # of the device, by all workers together: above it the oldest shapes are forgotten
_PLACED_MEMORY = 0.1  # of the device, by all placements of a final's inputs and outputs beyond the first
_SPARE_MEMORY = 0.06  # of the device: what Torch may keep between trials without using it

Fields = dict[str, Any]


class Worker:
    """Runs trials one after the other; what they share (modules, inputs, references) is kept between them.

    Args:
        say: tells the parent.
        ask: returns once the parent has granted the device; None = nobody else is there.
        workers: how many share the device.

    Attributes:
        exhausted: the process must end after the row it has just made, since its CUDA context may be unusable.
    """

    def __init__(self, say: Callable[[Mapping[str, Any]], None], ask: Callable[[], None] | None = None,
                 workers: int = 1) -> None:
        self._say, self._ask = say, ask
        self._kept_memory = _KEPT_MEMORY / workers
        self._device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        self._timer = timer_for(self._device)
        self._implementations: dict[str, tuple[Implementation, str | None]] = {}
        self._shapes: OrderedDict[str, tuple[Inputs, dict[bool, Oracle]]] = OrderedDict()
        self._stage = ""
        self._stage_start = 0.0
        self._holding = ask is None
        self._seconds: dict[str, float] = {}
        self.exhausted = False

    def trial(self, request: Mapping[str, Any]) -> Fields:
        """The fields of the trial's row that are known only here: status, message, errors, times, stage seconds."""
        return self._timed(self._trial, request)

    def final(self, request: Mapping[str, Any]) -> Fields:
        """The fields of the final's record: status, message, what time_finalists found, ``entrants`` in the order
        asked, each with a status, message and errors of its own, stage seconds.

        Also ``lost_placing``, true where all had gone well until other placements were made: with one it would go on.
        """
        return self._timed(self._final, request)

    def _timed(self, work: Callable[[Mapping[str, Any]], Fields], request: Mapping[str, Any]) -> Fields:
        self._seconds = {}
        fields = work(request)
        if not self.exhausted:
            self._give_back_memory()
        self._enter("")
        self._holding = self._ask is None
        return fields | {"seconds": {stage: round(s, 4) for stage, s in self._seconds.items()}}

    # ---- one trial

    def _trial(self, request: Mapping[str, Any]) -> Fields:
        row = self._attempt(self._run, request)
        if row["status"] == "oom" and len(self._shapes) > 1:  # the other shapes' references may be what is in the way
            self._forget(keep=1)
            row = self._attempt(self._run, request)
        if row["status"] == "incorrect":
            self._forget(keep=0)  # what writes wrong values may have written them anywhere
        return row

    def _attempt(self, work: Callable[..., Fields], *arguments: Any) -> Fields:
        """What ``work`` returns, or the status and message of what it raises."""
        try:
            return work(*arguments)
        except Exception as error:
            status, text = classify(error), f"{self._stage}: {message(error)}"
        if not self._healthy():
            self.exhausted = True
            status = "runtime_error"
        elif status == "oom":
            self._release()
        return {"status": status, "message": text}

    def _run(self, request: Mapping[str, Any]) -> Fields:
        case = Case.from_dict(request["case"])
        self._enter("import")
        implementation, missing = self._implementation(request["implementation"], request["options"])
        if missing:
            return {"status": "unavailable", "message": shorten(missing)}
        if reason := implementation.unsupported(case):
            return {"status": "unsupported", "message": shorten(reason)}
        if request["built"] or case.shape_id not in self._shapes:
            self._take()
            self._enter("inputs")
        inputs, oracles = self._shape(case)
        if not request["built"]:
            self._leave()
        self._enter("prepare")
        before = self._timer.allocated()
        prepared = implementation.prepare(case, request["config"], inputs)
        held = None if before is None else (self._timer.allocated() or 0) - before
        oracle = oracles[prepared.applies_sink]
        self._take()
        self._enter("run")
        self._first_run(prepared)
        row: Fields = {
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

    def _first_run(self, prepared: Prepared) -> None:
        if prepared.poison is not None:
            prepared.poison()
        prepared.run()
        self._synchronize()

    def _measure(self, prepared: Prepared, sampling: Sampling, held: int | None) -> Fields:
        fields: Fields = {"peak_memory_bytes": self._timer.peak_memory(prepared.run, held)}
        timing = self._timer.measure(prepared.run, sampling)
        self.exhausted |= timing.tainted
        fields |= timing.row_fields()
        fields["note"] = "; ".join(note for note in (prepared.note, timing.note) if note)
        if sampling.wall_ms > 0:
            on_gpu = self._device.type == "cuda"
            wall = measure_wall(prepared.run, cuda=on_gpu, budget_ms=sampling.wall_ms, min_calls=3 if on_gpu else 1)
            fields |= {"wall_ms": wall.wall_ms, "wall_calls": wall.calls, "wall_source": wall.source}
        return fields

    def _check(self, case: Case, prepared: Prepared, oracle: Oracle) -> Fields:
        with torch.no_grad():
            verdict = oracle.check(prepared.outputs(), OUTPUTS[case.pass_])
        return {**verdict.errors, "status": "ok" if verdict.ok else "incorrect", "message": shorten(verdict.message)}

    # ---- a final

    def _final(self, request: Mapping[str, Any]) -> Fields:
        """An entrant that fails is out, and the others go on; but none can once the device's context is broken."""
        entrants: list[Fields] = [{} for _ in request["entrants"]]
        timed = self._attempt(self._run_final, request, entrants)
        if self.exhausted and self._stage == PLACING:
            timed["lost_placing"] = True
        broken = {name: timed[name] for name in ("status", "message")} if "status" in timed else {}
        for fields in entrants:
            if fields.get("status", "ok") == "ok":
                fields |= broken or {"status": "ok", "message": fields.get("message", "")}
        failed = next((fields for fields in entrants if fields["status"] != "ok"), broken)
        if any(fields["status"] == "ok" for fields in entrants):
            failed = {"status": "ok", "message": ""}
        if any(fields["status"] == "incorrect" for fields in entrants) and not self.exhausted:
            self._forget(keep=0)
        return timed | {"status": failed["status"], "message": failed["message"], "entrants": entrants}

    def _run_final(self, request: Mapping[str, Any], entrants: list[Fields]) -> Fields:
        case = Case.from_dict(request["case"])
        self._enter("import")
        self._take()
        self._enter("inputs")
        inputs, oracles = self._shape(case)
        self._enter("prepare")
        before = self._timer.allocated() or 0
        ready: dict[int, Prepared] = {}
        for n, entrant in enumerate(request["entrants"]):
            if (prepared := self._step(entrants[n], self._prepare_entrant, case, entrant, inputs)) is not None:
                ready[n] = prepared
        each = nbytes(inputs) + (self._timer.allocated() or 0) - before
        for n, prepared in list(ready.items()):
            self._enter("run")
            self._step(entrants[n], self._first_run, prepared)
            if request["gate"] and not entrants[n]:
                self._enter("gate")
                self._step(entrants[n], self._judge, entrants[n], case, prepared, oracles[prepared.applies_sink])
            if entrants[n].get("status", "ok") != "ok":
                del ready[n]
        if not ready:
            return {}
        self._enter("measure")
        timing = time_finalists(
            self._timer, [prepared.run for prepared in ready.values()], FinalSampling(**request["sampling"]),
            request["seed"], lambda wanted: self._elsewhere(case, [request["entrants"][n] for n in ready], inputs,
                                                            wanted, each))
        if timing.incomplete and not self._healthy():
            raise RuntimeError(f"the device's context broke: {timing.incomplete}")
        fields = timing.row_fields()
        for n, own in zip(ready, fields.pop("entrants"), strict=True):
            entrants[n] |= own
        for n, prepared in ready.items():
            if request["gate"]:
                self._enter("check")
                self._step(entrants[n], self._judge, entrants[n], case, prepared, oracles[prepared.applies_sink],
                           "after timing: ")
        self.exhausted |= timing.tainted
        return fields

    def _elsewhere(self, case: Case, entrants: Sequence[Mapping[str, Any]], inputs: Inputs, wanted: int,
                   each: int) -> tuple[list[list[Call]], str]:
        """The entrants' calls on further placements of the inputs, and why there are not as many as wanted.

        Args:
            wanted: placements in all, the first included.
            each: bytes that a placement takes, about.

        Raises:
            RuntimeError: the device's context is broken.
        """
        self._enter(PLACING)
        made: list[list[Call]] = []
        problem = ""
        before = self._timer.allocated() or 0
        for number in range(1, wanted):
            if (self._timer.allocated() or 0) - before + each > _PLACED_MEMORY * self._total_memory():
                problem = (f"one more would take {each / 2**20:.0f} MiB, all but the first may take "
                           f"{_PLACED_MEMORY:.0%} of the device's memory")
                break
            try:
                made.append(self._place(case, entrants, moved(inputs, number)))
            except Exception as error:
                problem = message(error)
                break
        if problem:
            if not self._healthy():
                raise RuntimeError(f"the device's context broke: {problem}")
            self._release()
            problem = f"{len(made) + 1}: {problem}"
        self._enter("measure")
        return made, problem

    def _place(self, case: Case, entrants: Sequence[Mapping[str, Any]], inputs: Inputs) -> list[Call]:
        """The entrants' calls on these inputs, all of which have run; what they compute was checked on the others."""
        calls = []
        for entrant in entrants:
            prepared = self._prepare_entrant(case, entrant, inputs)
            prepared.run()
            calls.append(prepared.run)
        self._synchronize()
        return calls

    def _step(self, fields: Fields, work: Callable[..., Any], *arguments: Any) -> Any:
        """What ``work`` returns, or None with the failure written into the entrant's fields.

        Raises:
            RuntimeError: the device's context is broken, and with it everybody's.
        """
        result: Any = None

        def step() -> Fields:
            nonlocal result
            result = work(*arguments)
            return {}

        fields |= self._attempt(step)
        if self.exhausted:
            raise RuntimeError(f"an entrant broke the device's context: {fields['message']}")
        return result

    def _prepare_entrant(self, case: Case, entrant: Mapping[str, Any], inputs: Inputs) -> Prepared:
        implementation, missing = self._implementation(entrant["implementation"], entrant["options"])
        if missing:
            raise RuntimeError(missing)
        return implementation.prepare(case, entrant["config"], inputs)

    def _judge(self, fields: Fields, case: Case, prepared: Prepared, oracle: Oracle, when: str = "") -> None:
        verdict = self._check(case, prepared, oracle)
        fields |= verdict | ({"message": when + verdict["message"]} if verdict["message"] else {})

    # ---- what is shared

    def _implementation(self, name: str, options: Mapping[str, Any]) -> tuple[Implementation, str | None]:
        key = json.dumps([name, options], sort_keys=True)
        if key not in self._implementations:
            implementation = load(name, options)
            self._implementations[key] = implementation, implementation.unavailable()
        return self._implementations[key]

    def _shape(self, case: Case) -> tuple[Inputs, dict[bool, Oracle]]:
        """Inputs of a shape and its references (by whether they apply the sink), shared by its configs and passes."""
        if case.shape_id not in self._shapes:
            self._make_room()
            inputs = gate_inputs(case, self._device)
            plain = dataclasses.replace(inputs, sinks=None)
            self._shapes[case.shape_id] = inputs, {True: Oracle(case, inputs), False: Oracle(case, plain)}
        self._shapes.move_to_end(case.shape_id)
        return self._shapes[case.shape_id]

    def _make_room(self) -> None:
        """Forgets the oldest shapes. Looking for garbage takes longer than drawing inputs: only where it must be."""
        while len(self._shapes) >= _KEPT_SHAPES:
            self._shapes.popitem(last=False)
        if self._memory_used() > self._kept_memory:
            gc.collect()
        while self._shapes and self._memory_used() > self._kept_memory:
            self._shapes.popitem(last=False)

    def _forget(self, keep: int) -> None:
        while len(self._shapes) > keep:
            self._shapes.popitem(last=False)
        self._release()

    def _release(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _give_back_memory(self) -> None:
        """What Torch keeps for later is missing in every other process on the device."""
        if self._device.type == "cuda":
            spare = torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device)
            if spare > _SPARE_MEMORY * self._total_memory():
                torch.cuda.empty_cache()

    def _memory_used(self) -> float:
        if self._device.type != "cuda":
            return 0.0
        return torch.cuda.memory_allocated(self._device) / self._total_memory()

    def _total_memory(self) -> float:
        if self._device.type != "cuda":
            return math.inf
        return torch.cuda.get_device_properties(self._device).total_memory

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

    # ---- stages

    def _take(self) -> None:
        """Returns with the device granted."""
        if not self._holding and self._ask is not None:
            self._enter("waiting")
            self._ask()
            self._holding = True

    def _leave(self) -> None:
        self._holding = self._ask is None

    def _enter(self, stage: str) -> None:
        now = time.monotonic()
        if self._stage:
            self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + now - self._stage_start
        self._stage, self._stage_start = stage, now
        if stage:
            self._say({"event": "stage", "stage": stage, "at": now, "holding": self._holding})


def _serve(connection: Connection, workers: int) -> None:
    def ask() -> None:
        if connection.receive() is None:  # the parent is gone, and with it everybody who wants the row
            os._exit(0)

    worker = Worker(connection.send, ask if workers > 1 else None, workers)
    connection.send({"event": "ready", "note": find_wall_time()[1]})
    gc.freeze()  # the modules loaded so far never become garbage: later collections need not look at them
    for request in connection:
        row = worker.final(request) if "final" in request else worker.trial(request)
        connection.send({"event": "row", "row": row, "leaving": worker.exhausted})
        if worker.exhausted:
            return


if __name__ == "__main__":
    _serve(connect(), int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    os._exit(0)  # a broken context can hang in its own destructors
