"""cuDNN attention through its Python frontend, which knows sinks: ``sink_token`` and ``dSink_token``.

Graphs and plans are built in ``prepare``; a run only executes them. cuDNN's dimensions are (batch, heads, seqlen,
head_dim) with any strides; a varlen batch is padded dimensions with ragged offsets into the packed tensors.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Mapping
from typing import Any

from sweeps.baselines.common import Peer, Unsupported, fused, visible_window
from sweeps.cases import Case
from sweeps.columns import OUTPUTS
from sweeps.implementation import Implementation, Inputs, Prepared

_SINK_VERSION = 91300         # the first cuDNN with a sink
_RAGGED_SINK_VERSION = 92600  # the first whose backward takes a sink and ragged offsets together


class Uid(enum.IntEnum):
    """Our names for the tensors of both graphs."""

    q = 1
    k = 2
    v = 3
    o = 4
    lse = 5
    sinks = 6
    do = 7
    dq = 8
    dk = 9
    dv = 10
    dsinks = 11
    lengths_q = 12
    lengths_k = 13
    offsets_q = 14
    offsets_k = 15
    offsets_v = 16
    offsets_o = 17
    offsets_lse = 18


_SMALL = frozenset((Uid.sinks, Uid.dsinks)) | {u for u in Uid if u >= Uid.lengths_q}


class _Attention:
    """The tensors of one case and the graphs over them.

    Args:
        module: the imported ``cudnn``.
        own_dsinks: whether the backward graph computes dsinks; otherwise the caller does.
    """

    def __init__(self, module: Any, case: Case, inputs: Inputs, deterministic: bool, own_dsinks: bool) -> None:
        import torch

        self._cudnn, self._case, self._inputs = module, case, inputs
        self._deterministic, self._own_dsinks = deterministic, own_dsinks
        self._io = {torch.float16: module.data_type.HALF, torch.bfloat16: module.data_type.BFLOAT16}[inputs.q.dtype]
        self._handle = module.create_handle()
        self._stream: int | None = None
        # contiguous, so that a gradient has the strides and the ragged offsets of its input
        q, k, v, do = (t.contiguous() for t in (inputs.q, inputs.k, inputs.v, inputs.do))
        cu = inputs.cu_seqlens
        # lse is packed as (batch, heads, seqlen), in a varlen batch as (total, heads)
        lse_shape = [case.batch, case.heads_q, case.seqlen_q] if cu is None else list(q.shape[:2])
        data = {
            Uid.q: q, Uid.k: k, Uid.v: v, Uid.do: do, Uid.o: torch.empty_like(do),
            Uid.dq: torch.empty_like(q), Uid.dk: torch.empty_like(k), Uid.dv: torch.empty_like(v),
            Uid.lse: q.new_empty(lse_shape, dtype=torch.float32),
        }
        if inputs.sinks is not None:
            data[Uid.sinks] = inputs.sinks.float().contiguous()
            data[Uid.dsinks] = torch.empty_like(data[Uid.sinks])
        if cu is not None:
            data[Uid.lengths_q] = data[Uid.lengths_k] = (cu[1:] - cu[:-1]).int().contiguous()
            for offsets, tensor in ((Uid.offsets_q, Uid.q), (Uid.offsets_k, Uid.k), (Uid.offsets_v, Uid.v),
                                    (Uid.offsets_o, Uid.o), (Uid.offsets_lse, Uid.lse)):
                data[offsets] = cu.long() * data[tensor].stride(0)
        self.data = data
        self._workspace: Any = None
        self._forward = self._backward = None

    def _geometry(self, uid: Uid) -> tuple[list[int], list[int]]:
        """Dimensions and strides of a tensor as cuDNN counts them."""
        case, tensor = self._case, self.data[uid]
        if uid in (Uid.sinks, Uid.dsinks):
            return [1, case.heads_q, 1, 1], [case.heads_q, 1, 1, 1]
        if uid in (Uid.lengths_q, Uid.lengths_k):
            return [case.batch, 1, 1, 1], [1, 1, 1, 1]
        if uid >= Uid.offsets_q:
            return [case.batch + 1, 1, 1, 1], [1, 1, 1, 1]
        if self._inputs.cu_seqlens is None:
            if uid == Uid.lse:
                return [*tensor.shape, 1], [*tensor.stride(), 1]
            view = tensor.transpose(1, 2)
            return list(view.shape), list(view.stride())
        rows = case.seqlen_k if uid in (Uid.k, Uid.v, Uid.dk, Uid.dv) else case.seqlen_q
        last = 1 if uid == Uid.lse else tensor.shape[-1]
        # between sequences the ragged offsets count, so the stride of the batch is only there to be valid
        return ([case.batch, tensor.shape[1], rows, last],
                [rows * tensor.stride(0), tensor.stride(1), tensor.stride(0), 1])

    def _graph(self) -> Any:
        types = self._cudnn.data_type
        return self._cudnn.pygraph(io_data_type=self._io, intermediate_data_type=types.FLOAT,
                                   compute_data_type=types.FLOAT, handle=self._handle)

    def _declare(self, graph: Any, uids: list[Uid]) -> dict[Uid, Any]:
        """Declares tensors with data, and the ragged offsets they lie by."""
        import torch

        types = self._cudnn.data_type
        of = {torch.float32: types.FLOAT, torch.int32: types.INT32, torch.int64: types.INT64,
              self._inputs.q.dtype: self._io}
        declared = {}
        for uid in uids:
            dim, stride = self._geometry(uid)
            declared[uid] = graph.tensor(name=uid.name, uid=int(uid), dim=dim, stride=stride,
                                         data_type=of[self.data[uid].dtype])
        return declared

    def _make_ragged(self, graph: Any, tensors: Mapping[Uid, Any]) -> None:
        """Sets the ragged offsets of every tensor of a varlen batch; a gradient lies by its input's."""
        if self._inputs.cu_seqlens is None:
            return
        lies_by = {Uid.q: Uid.offsets_q, Uid.dq: Uid.offsets_q, Uid.k: Uid.offsets_k, Uid.dk: Uid.offsets_k,
                   Uid.v: Uid.offsets_v, Uid.dv: Uid.offsets_v, Uid.o: Uid.offsets_o, Uid.do: Uid.offsets_o,
                   Uid.lse: Uid.offsets_lse}
        offsets = self._declare(graph, sorted({lies_by[u] for u in tensors if u in lies_by}))
        for uid, tensor in tensors.items():
            if uid in lies_by:
                tensor.set_ragged_offset(offsets[lies_by[uid]])

    def _masks(self, graph: Any) -> dict[str, Any]:
        case, alignment = self._case, self._cudnn.diagonal_alignment
        equal = case.seqlen_q == case.seqlen_k
        options: dict[str, Any] = {
            "attn_scale": self._inputs.softmax_scale,
            # with equal lengths the two alignments are one, and top-left is the better supported
            "diagonal_alignment": alignment.TOP_LEFT if equal else alignment.BOTTOM_RIGHT,
            "diagonal_band_right_bound": 0,
        }
        window = visible_window(case)
        if window is not None:
            options["diagonal_band_left_bound"] = window  # counts the query's own key, as we do
        if self._inputs.cu_seqlens is not None:
            lengths = self._declare(graph, [Uid.lengths_q, Uid.lengths_k])
            options |= {"use_padding_mask": True, "seq_len_q": lengths[Uid.lengths_q],
                        "seq_len_kv": lengths[Uid.lengths_k]}
        return options

    def _set_output(self, tensor: Any, uid: Uid, data_type: Any) -> None:
        dim, stride = self._geometry(uid)
        tensor.set_uid(int(uid)).set_output(True).set_dim(dim).set_stride(stride).set_data_type(data_type)

    def _finish(self, graph: Any) -> Any:
        import torch

        try:
            graph.validate()
            graph.build_operation_graph()
            graph.create_execution_plans([self._cudnn.heur_mode.A, self._cudnn.heur_mode.FALLBACK])
            graph.check_support()
            graph.build_plans()
        except self._cudnn.cudnnGraphNotSupportedError as error:
            raise Unsupported(f"cuDNN {self._cudnn.backend_version_string()}: {error}") from error
        needed = max(int(graph.get_workspace_size()), 1)
        if self._workspace is None or self._workspace.numel() < needed:  # the graphs run one after the other
            self._workspace = torch.empty(needed, dtype=torch.uint8, device=self._inputs.q.device)
        return graph

    def build_forward(self) -> None:
        graph = self._graph()
        inputs = self._declare(graph, [Uid.q, Uid.k, Uid.v])
        options = self._masks(graph)
        if Uid.sinks in self.data:
            options["sink_token"] = self._declare(graph, [Uid.sinks])[Uid.sinks]
        o, lse = graph.sdpa(name="forward", q=inputs[Uid.q], k=inputs[Uid.k], v=inputs[Uid.v], generate_stats=True,
                            **options)
        self._set_output(o, Uid.o, self._io)
        self._set_output(lse, Uid.lse, self._cudnn.data_type.FLOAT)
        self._make_ragged(graph, inputs | {Uid.o: o, Uid.lse: lse})
        self._forward = self._finish(graph)
        self._forward_pack = self._pack(Uid.q, Uid.k, Uid.v, Uid.sinks, Uid.o, Uid.lse)

    def build_backward(self) -> None:
        graph = self._graph()
        inputs = self._declare(graph, [Uid.q, Uid.k, Uid.v, Uid.o, Uid.do, Uid.lse])
        options = self._masks(graph)
        if self._own_dsinks:
            sinks = self._declare(graph, [Uid.sinks, Uid.dsinks])
            sinks[Uid.dsinks].set_output(True)
            options |= {"sink_token": sinks[Uid.sinks], "dSink_token": sinks[Uid.dsinks]}
        if self._inputs.cu_seqlens is not None:
            options |= {"max_total_seq_len_q": self._inputs.q.shape[0], "max_total_seq_len_kv": self._inputs.k.shape[0]}
        gradients = graph.sdpa_backward(
            name="backward", q=inputs[Uid.q], k=inputs[Uid.k], v=inputs[Uid.v], o=inputs[Uid.o], dO=inputs[Uid.do],
            stats=inputs[Uid.lse], use_deterministic_algorithm=self._deterministic, **options)
        made = dict(zip((Uid.dq, Uid.dk, Uid.dv), gradients, strict=True))
        for uid, tensor in made.items():
            self._set_output(tensor, uid, self._io)
        self._make_ragged(graph, inputs | made)
        self._backward = self._finish(graph)
        extra = (Uid.sinks, Uid.dsinks) if self._own_dsinks else ()
        self._backward_pack = self._pack(Uid.q, Uid.k, Uid.v, Uid.o, Uid.do, Uid.lse, Uid.dq, Uid.dk, Uid.dv, *extra)

    def _pack(self, *uids: Uid) -> dict[int, Any]:
        ragged = [u for u in self.data if u >= Uid.lengths_q]
        return {int(u): self._view(u) for u in (*uids, *ragged) if u in self.data}

    def _view(self, uid: Uid) -> Any:
        """A tensor in the shape it was declared with; of a varlen batch, as it lies packed."""
        tensor = self.data[uid]
        if self._inputs.cu_seqlens is not None and uid not in _SMALL:
            return tensor[..., None] if uid == Uid.lse else tensor
        dim, stride = self._geometry(uid)
        return tensor.as_strided(dim, stride)

    def _execute(self, graph: Any, pack: dict[int, Any]) -> None:
        import torch

        stream = torch.cuda.current_stream().cuda_stream
        if stream != self._stream:
            self._cudnn.set_stream(handle=self._handle, stream=stream)
            self._stream = stream
        graph.execute(pack, self._workspace, handle=self._handle)

    def forward(self) -> None:
        self._execute(self._forward, self._forward_pack)

    def backward(self) -> None:
        self._execute(self._backward, self._backward_pack)

    def lse(self) -> Any:
        lse = self.data[Uid.lse]
        return lse if self._inputs.cu_seqlens is None else lse.transpose(0, 1)


class Cudnn(Peer):
    name = "cudnn"
    is_flash = True
    distributions = ("nvidia-cudnn-frontend", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13")
    known_options = ("deterministic",)

    def check_installed(self) -> None:
        import cudnn

        version = int(cudnn.backend_version())
        if version < _SINK_VERSION:
            raise RuntimeError(f"cuDNN {cudnn.backend_version_string()} has no sinks, expected 9.13 or later")

    def unsupported(self, case: Case) -> str | None:
        if reason := super().unsupported(case):
            return reason
        if case.pass_ != "fwd" and case.seqlen_q == 1 and case.seqlen_k == 1:
            return "cudnn's backward does not support one query and one key"
        if case.sinks and case.seqlen_q == 1:
            return "cudnn does not support a sink with one query"
        return None

    def prepare(self, case: Case, config: Mapping[str, Any], inputs: Inputs) -> Prepared:
        import cudnn

        from flash_sink_attn.flash_attn_with_sink import sink_gradient

        deterministic = bool(self.options.get("deterministic", False))
        ragged = inputs.cu_seqlens is not None
        own_dsinks = inputs.sinks is not None and not (ragged and int(cudnn.backend_version()) < _RAGGED_SINK_VERSION)
        attention = _Attention(cudnn, case, inputs, deterministic, own_dsinks)
        attention.build_forward()
        attention.forward()
        data, notes, sign, zero_first = attention.data, [], 1, False

        def formula(function: Any) -> Any:
            return function(data[Uid.o], inputs.do, attention.lse(), data[Uid.sinks])

        made: dict[str, Any] = {}

        def backward() -> None:
            if own_dsinks and zero_first:
                data[Uid.dsinks].zero_()
            attention.backward()
            if own_dsinks:
                made["dsinks"] = data[Uid.dsinks]
            elif inputs.sinks is not None:
                made["dsinks"] = formula(fused(sink_gradient, inputs.q.device.type))

        if case.pass_ != "fwd":
            attention.build_backward()
            if own_dsinks:
                sign, zero_first = self._learn_dsinks(attention, formula(sink_gradient))
                if sign < 0:
                    notes.append("dSink_token comes with the opposite sign, turned round when read")
                if zero_first:
                    notes.append("dSink_token is added to, so it is zeroed first, counted")
                if deterministic:
                    notes.append("dSink_token is not deterministic even so")
            elif inputs.sinks is not None:
                notes.append("this cuDNN's varlen backward takes no sink_token; it gets output and lse with the sink, "
                             "dsinks by a fused reduction, counted")
            backward()

        def outputs() -> dict[str, Any]:
            found = {"o": data[Uid.o], "lse": attention.lse()}
            found |= {name: data[Uid[name]] for name in ("dq", "dk", "dv")}
            if "dsinks" in made:
                found["dsinks"] = made["dsinks"] * sign
            return {n: found[n] for n in OUTPUTS[case.pass_] if n in found}

        def poison() -> None:
            made.clear()
            for output in OUTPUTS[case.pass_]:
                with contextlib.suppress(KeyError):
                    data[Uid[output]].fill_(float("nan"))

        def both() -> None:
            attention.forward()
            backward()

        run = {"fwd": attention.forward, "bwd": backward, "fwd_bwd": both}[case.pass_]
        # dsinks is summed by atomics in every mode
        bitwise = True if case.pass_ == "fwd" else (deterministic if not (deterministic and own_dsinks) else None)
        return Prepared(run=run, outputs=outputs, poison=poison, note="; ".join(notes), deterministic=bitwise)

    @staticmethod
    def _learn_dsinks(attention: _Attention, expected: Any) -> tuple[int, bool]:
        """The sign of dSink_token, and whether cuDNN adds to what is there; neither is documented."""
        dsinks = attention.data[Uid.dsinks]
        dsinks.fill_(float("nan"))
        attention.backward()
        zero_first = not bool(dsinks.isfinite().all())
        if zero_first:
            dsinks.zero_()
            attention.backward()
        return (-1 if float((dsinks * expected).sum()) < 0 else 1), zero_first


def make(options: Mapping[str, Any]) -> Implementation:
    return Cudnn(options)
