"""Correct before timed: judges what an implementation computed for a case by the error rule of flash_sink_attn.testing.

Everything is checked for NaN and infinities. Errors are taken on a sample that float64 can afford: whole key heads
(with all query heads of their group) of every sequence where that is little work, else of the first and the last
sequence, and of very long ones only some rows and keys. dsinks, a sum over all rows of all sequences, is computed in
full for the heads it is checked on.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping

import torch

from flash_sink_attn._reference_blocks import WINDOW_CHUNK, Arithmetic, EagerArithmetic, ExactArithmetic, attend_group
from flash_sink_attn.testing import Budget, Expected, compare, error_budget, expected, make_inputs, verdict_message
from sweeps.cases import Case
from sweeps.implementation import Inputs

BIG_SINK, TINY_SINK = 6.0, -8.0

_Results = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]      # of attend_group: exact and eager


@dataclasses.dataclass(frozen=True)
class Sample:
    """How much of a case is checked against float64.

    Attributes:
        cells: entries of score matrices worked through, the sum over the query heads checked. The default is two groups
            of 64/8 heads at 8192 keys.
        units: key heads times sequences checked where more than the first and the last head fit in ``cells``.
        rows: query rows, and keys, checked of a sequence that does not fit.
    """

    cells: int = 600_000_000
    units: int = 16
    rows: int = 256


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Of one run: relative errors under their column names (rel_err_o ...), whether all is well, and what is not."""

    errors: dict[str, float]
    ok: bool
    message: str


@dataclasses.dataclass(frozen=True)
class _Part:
    """Expected values and where they are in an output: sequence, heads (of its own kind), positions in the sequence.

    ``positions`` None = all of them; ``sequence`` None = dsinks, which has no positions.
    """

    expected: Expected
    sequence: int | None
    heads: slice
    positions: torch.Tensor | None


class _Output:
    """All that is expected of one output, joined so that its check is few operations however many parts it has."""

    def __init__(self, parts: list[_Part], dtype: torch.dtype) -> None:
        self.parts = [(part.sequence, part.heads, part.positions) for part in parts]
        self.shapes = [part.expected.row_size.shape for part in parts]
        self.expected = Expected.joined([part.expected for part in parts])
        self.budget: Budget = error_budget(self.expected, dtype)


class Oracle:
    """Truth and yardstick of one shape, computed once, when first asked for, and shared by all passes on its inputs."""

    def __init__(self, case: Case, inputs: Inputs, *, sample: Sample | None = None) -> None:
        """Inputs without sinks are judged as plain attention, whatever the case says.

        They must stay as they are: gradients are computed when they are first checked.
        """
        self.case = case
        self.inputs = inputs
        self.sample = sample or Sample()
        self.group = case.heads_q // case.heads_kv
        if inputs.cu_seqlens is None:
            self.offsets = None
            self.lengths = [(case.seqlen_q, case.seqlen_k)] * case.batch
        else:
            self.offsets = inputs.cu_seqlens.tolist()
            self.lengths = [(b - a, b - a) for a, b in itertools.pairwise(self.offsets)]

    def check(self, outputs: Mapping[str, torch.Tensor], names: Iterable[str]) -> Verdict:
        """Judge one run.

        Args:
            outputs: results by name, in the layouts of ``Prepared.outputs``.
            names: which of them to judge; one the implementation does not have is left out (not each of them).
        """
        wanted = [name for name in names if name != "dsinks" or self.inputs.sinks is not None]
        present = [name for name in wanted if outputs.get(name) is not None]
        errors: dict[str, float] = {}
        problems = [] if present else [f"none of the outputs {', '.join(wanted)} was returned"]
        for name in present:
            problem = self._shape_or_nan(name, outputs[name])
            if problem:
                problems.append(problem)
                continue
            output = (self._forward if name in ("o", "lse") else self._gradients)[name]
            found = compare(output.expected, self._select(output, outputs[name]), self.inputs.q.dtype)
            errors[f"rel_err_{name}"] = found.rel
            where = self._where(output, found.at[0]) if found.at else "none"
            message = verdict_message(name, found, output.budget, where)
            if message:
                problems.append(message)
        return Verdict(errors, not problems, " | ".join(problems))

    # ---- what is expected

    @functools.cached_property
    def _forward(self) -> dict[str, _Output]:
        parts: dict[str, list[_Part]] = {"o": [], "lse": []}
        for sequence, g in self._units:
            rows = None if self._affordable(sequence) else self._positions(self.lengths[sequence][0], sequence)
            self._add(parts, sequence, g, ("o", "lse"), rows=rows)
        return {name: _Output(of_name, self.inputs.q.dtype) for name, of_name in parts.items()}

    @functools.cached_property
    def _gradients(self) -> dict[str, _Output]:
        parts: dict[str, list[_Part]] = {"dq": [], "dk": [], "dv": []}
        of_heads: dict[int, list[_Results]] = {}
        last = self._units[-1]
        for sequence, g in self._units:
            if self._affordable(sequence):
                of_heads.setdefault(g, []).append(self._add(parts, sequence, g, ("dq", "dk", "dv"), gradients=True))
                continue
            seqlen_q, seqlen_k = self.lengths[sequence]
            self._add(parts, sequence, g, ("dq",), rows=self._positions(seqlen_q, sequence), gradients=True)
            # dk and dv of any key need lse and delta of all rows that see it.
            if (sequence, g) == last or self._cells(sequence) <= 4 * self.sample.cells:
                keys = self._positions(seqlen_k, sequence)
                of_heads.setdefault(g, []).append(
                    self._add(parts, sequence, g, ("dk", "dv"), keys=keys, gradients=True))
        if self.inputs.sinks is not None:
            parts["dsinks"] = self._sink_parts(of_heads)
        return {name: _Output(of_name, self.inputs.q.dtype) for name, of_name in parts.items()}

    def _sink_parts(self, found: dict[int, list[_Results]]) -> list[_Part]:
        """dsinks of the heads whose rows are there for all sequences, else of the first and the last head."""
        complete = [
            (slice(g * self.group, (g + 1) * self.group), of_sequences)
            for g, of_sequences in found.items() if len(of_sequences) == len(self.lengths)
        ]
        if not complete:
            none = torch.empty(0, dtype=torch.int64)
            for head in sorted({0, self.case.heads_q - 1}):
                heads = slice(head, head + 1)
                every = [self._attend(n, heads, keys=none, gradients=True) for n in range(len(self.lengths))]
                complete.append((heads, every))
        parts = []
        for heads, of_sequences in complete:
            truth, eager = (
                {name: torch.cat([x[name] for x in side], dim=1) for name in side[0] if name.startswith("dsinks_rows")}
                for side in zip(*of_sequences, strict=True)
            )
            for arithmetic, side in zip(self._arithmetics, (truth, eager), strict=True):
                side["dsinks"] = arithmetic.sum_rows(side["dsinks_rows"], 1)
            parts.append(_Part(expected("dsinks", truth, eager), None, heads, None))
        return parts

    def _add(
        self, parts: dict[str, list[_Part]], sequence: int, g: int, names: tuple[str, ...], *,
        rows: torch.Tensor | None = None, keys: torch.Tensor | None = None, gradients: bool = False,
    ) -> _Results:
        """Append the named outputs of a key head of one sequence, and return all that was computed."""
        heads, key_head = slice(g * self.group, (g + 1) * self.group), slice(g, g + 1)
        exact, eager = self._attend(sequence, heads, rows=rows, keys=keys, gradients=gradients)
        for name in names:
            own_heads, positions = (key_head, keys) if name in ("dk", "dv") else (heads, rows)
            parts[name].append(_Part(expected(name, exact, eager), sequence, own_heads, positions))
        return exact, eager

    def _attend(
        self, sequence: int, heads: slice, *, rows: torch.Tensor | None = None, keys: torch.Tensor | None = None,
        gradients: bool = False,
    ) -> _Results:
        """Truth and eager of query heads that share a key head."""
        x, g = self.inputs, heads.start // self.group
        q, k, v, do = (self._sequence(t, sequence) for t in (x.q, x.k, x.v, x.do))
        q, do, k, v = q[:, heads].transpose(0, 1), do[:, heads].transpose(0, 1), k[:, g], v[:, g]
        sinks = None if x.sinks is None else x.sinks[heads]
        exact, eager = (
            attend_group(arithmetic, q, k, v, sinks, do if gradients else None, window=x.window, scale=x.softmax_scale,
                         rows=rows, keys=keys)
            for arithmetic in self._arithmetics
        )
        return exact, eager

    @functools.cached_property
    def _arithmetics(self) -> tuple[Arithmetic, Arithmetic]:
        return ExactArithmetic(), EagerArithmetic(self.inputs.q.dtype)

    # ---- what is sampled

    @functools.cached_property
    def _units(self) -> list[tuple[int, int]]:
        """(sequence, key head) pairs, first and last head always, in ascending order."""
        ends = self._end_heads
        per_head = sum(self._cells(sequence) for sequence in range(len(self.lengths)))
        units = max(len(ends), self.sample.units // len(self.lengths))
        count = min(units, self.case.heads_kv, self.sample.cells // max(1, per_head))
        if count < len(ends):
            return sorted({(0, ends[0]), (len(self.lengths) - 1, ends[-1])})
        between = (torch.randperm(max(0, self.case.heads_kv - 2), generator=self._generator(0)) + 1).tolist()
        chosen = sorted(ends + between[: count - len(ends)])
        return [(sequence, g) for g in chosen for sequence in range(len(self.lengths))]

    @property
    def _end_heads(self) -> list[int]:
        return sorted({0, self.case.heads_kv - 1})

    def _cells(self, sequence: int) -> int:
        """Score-matrix entries of one group of one sequence, as ``attend_group`` works through them."""
        seqlen_q, seqlen_k = self.lengths[sequence]
        band = seqlen_k if self.inputs.window is None else min(seqlen_k, self.inputs.window + WINDOW_CHUNK)
        below_diagonal = max(0, seqlen_k - seqlen_q) + min(seqlen_q, seqlen_k) // 2
        return self.group * seqlen_q * min(band, below_diagonal + 1)

    def _affordable(self, sequence: int) -> bool:
        return len(self._end_heads) * self._cells(sequence) <= self.sample.cells

    def _positions(self, length: int, sequence: int) -> torch.Tensor:
        """Ascending: both ends, the window's edges, tile edges and random ones."""
        generator = self._generator(1 + sequence)
        window = self.inputs.window or length
        fixed = [0, 1, window - 1, window, window + 1, length - window - 1, length - window, length - 2, length - 1]
        edges = torch.randint(0, max(1, length // 64) + 1, (self.sample.rows // 4,), generator=generator) * 64
        anywhere = torch.randint(0, length, (self.sample.rows // 2,), generator=generator)
        chosen = {*fixed, *edges.tolist(), *(edges - 1).tolist(), *anywhere.tolist()}
        return torch.tensor(sorted(position for position in chosen if 0 <= position < length))

    def _generator(self, offset: int) -> torch.Generator:
        return torch.Generator().manual_seed(1000 * self.case.seed + offset)

    # ---- finding it in an output

    def _sequence(self, x: torch.Tensor, sequence: int) -> torch.Tensor:
        """(seqlen, heads, dim) of a batch or of packed tokens."""
        return x[sequence] if self.offsets is None else x[self.offsets[sequence] : self.offsets[sequence + 1]]

    def _select(self, output: _Output, x: torch.Tensor) -> torch.Tensor:
        """The values of an output that are checked, laid out as its ``expected``."""
        pieces = []
        for sequence, heads, positions in output.parts:
            if sequence is None:
                pieces.append(x[heads])
                continue
            if output.expected.name != "lse":
                own = self._sequence(x, sequence)[:, heads].transpose(0, 1)
            elif self.offsets is None:
                own = x[sequence, heads]
            else:
                own = x[heads, self.offsets[sequence] : self.offsets[sequence + 1]]
            own = own if positions is None else own[:, positions.to(x.device)]
            pieces.append(own.flatten(0, 1))
        return torch.cat(pieces)

    def _where(self, output: _Output, row: int) -> str:
        of_keys = output.expected.name in ("dk", "dv")
        part = 0
        while row >= output.shapes[part].numel():
            row -= output.shapes[part].numel()
            part += 1
        sequence, heads, positions = output.parts[part]
        head, position = (row, 0) if sequence is None else divmod(row, output.shapes[part][1])
        named = f"{'key head' if of_keys else 'head'} {heads.start + head}"
        if sequence is None:
            return named
        position = position if positions is None else int(positions[position])
        return f"batch {sequence}, {named}, {'key' if of_keys else 'row'} {position}"

    def _shape_or_nan(self, name: str, x: torch.Tensor) -> str | None:
        """A wrong shape, or a value that is not finite although the truth is, anywhere."""
        case, of = self.case, self.inputs
        rows = (case.heads_q, of.q.shape[0]) if self.offsets else (case.batch, case.heads_q, case.seqlen_q)
        shape = {"o": of.do.shape, "lse": rows, "dq": of.q.shape, "dk": of.k.shape, "dv": of.v.shape,
                 "dsinks": (case.heads_q,)}[name]
        if x.shape != torch.Size(shape):
            return f"{name}: expected shape {tuple(shape)}, got {tuple(x.shape)}"
        bad = ~torch.isfinite(x)
        if name == "lse" and self.offsets is None and case.seqlen_q > case.seqlen_k:
            # Rows before the first key have no lse on a head without a sink.
            blind = bad[..., : case.seqlen_q - case.seqlen_k]
            no_sink = True if of.sinks is None else (of.sinks == -math.inf)[:, None]
            blind &= ~((x[..., : case.seqlen_q - case.seqlen_k] == -math.inf) & no_sink)
        count = int(bad.sum())
        if not count:
            return None
        one = torch.unravel_index(bad.flatten().to(torch.uint8).argmax().cpu(), bad.shape)
        at = tuple(int(i) for i in one)
        return f"{name}: {count} of {x.numel()} values are NaN or infinite, such as {float(x[at])} at index {at}"


def gate_inputs(case: Case, device: torch.device | str) -> Inputs:
    """The inputs every implementation is run on for ``case``: drawn from its seed, the same for all its passes.

    Sinks are standard normal, but around 6 on every eighth head, where they take most of the weight of short rows, and
    around -8 on another eighth, where they take none: a sink left out or applied twice shows in every case.
    """
    drawn = make_inputs(
        batch=case.batch, seqlen_q=case.seqlen_q, seqlen_k=case.seqlen_k, heads_q=case.heads_q, heads_kv=case.heads_kv,
        head_dim=case.head_dim, head_dim_v=case.head_dim_v, dtype=getattr(torch, case.dtype), device=device,
        seed=case.seed, seqlens=case.seqlens if case.varlen else None, sinks=case.sinks)
    if drawn.sinks is not None:
        drawn.sinks[0::8] += BIG_SINK
        drawn.sinks[7::8] += TINY_SINK
        # Some peers take bfloat16 sinks only; with these they compute the same thing as the others.
        drawn.sinks.copy_(drawn.sinks.bfloat16())
    return Inputs(
        q=drawn.q, k=drawn.k, v=drawn.v, sinks=drawn.sinks, do=drawn.do, cu_seqlens=drawn.cu_seqlens_q,
        max_seqlen=drawn.max_seqlen_q, window=case.window, softmax_scale=case.head_dim**-0.5)
