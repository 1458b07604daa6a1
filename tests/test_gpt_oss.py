"""A tiny random gpt-oss through the kernel, against its own eager attention.

The yardstick is the model's eager attention in bfloat16; the truth is the same model in float64. Every expert is
active, so that rounding cannot change the routing and with it the function under test.
"""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="4.55")
from transformers import GptOssConfig, GptOssForCausalLM  # noqa: E402

from flash_sink_attn import gpt_oss  # noqa: E402
from flash_sink_attn.gpt_oss import replace_gpt_oss_with_flash_sink_attn, restore_gpt_oss_attention  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WINDOW = 8
ROPE = "rope_parameters" if hasattr(GptOssConfig(), "rope_parameters") else "rope_scaling"  # transformers 5, 4
BF16_ROUNDING = 2.0**-8
ATTENTION_PARAMETERS = ("q_proj", "k_proj", "v_proj", "o_proj", "sinks")


def tiny_model(dtype=torch.bfloat16, **overrides):
    """Two layers, the first with a window; weights are bfloat16 values in any dtype, the same on every call."""
    fields = {
        "num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW,
        "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "num_local_experts": 2, "num_experts_per_tok": 2, "vocab_size": 64, "max_position_embeddings": 128,
        "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 63, "attn_implementation": "eager",
        "experts_implementation": "eager",  # the others refuse float64
        ROPE: {"rope_type": "default", "rope_theta": 10000.0},
    }
    torch.manual_seed(0)
    model = GptOssForCausalLM(GptOssConfig(**(fields | overrides)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Far from the uniform attention of the default initialisation, so that masks and sinks matter.
            mean, std = (1.0, 0.1) if "norm" in name else (0.0, 1.0 if name.endswith("sinks") else 0.3)
            parameter.normal_(mean, std)
    return model.to(torch.bfloat16).to(dtype).to(DEVICE)


def tokens(batch, seqlen, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 63, (batch, seqlen), generator=generator).to(DEVICE)


def logits_and_gradients(model, rows=None, **inputs):
    """Logits of the given (batch, seqlen) rows, and the gradients of a fixed random projection of them."""
    model.zero_grad()
    logits = model(use_cache=False, **inputs).logits
    logits = logits if rows is None else logits[rows]
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)).to(logits)
    (logits * weights).sum().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}


def relative_error(x, truth):
    return ((x.double() - truth).norm() / truth.norm()).item()


def attention_gradients(gradients):
    """One vector for each kind of attention parameter, both layers in it, and one of everything."""
    kinds = {kind: [g for name, g in gradients.items() if f"self_attn.{kind}" in name] for kind in ATTENTION_PARAMETERS}
    kinds["all"] = list(gradients.values())
    return {kind: torch.cat([g.double().flatten() for g in found]) for kind, found in kinds.items()}


def assert_as_good_as_eager(ours, eager, truth):
    """At most twice eager's error, plus one rounding, for logits and gradients."""
    names = {"logits": [run[0] for run in (ours, eager, truth)]}
    grouped = [attention_gradients(run[1]) for run in (ours, eager, truth)]
    names |= {kind: [g[kind] for g in grouped] for kind in grouped[0]}
    for name, (x, yardstick, exact) in names.items():
        assert torch.isfinite(x).all(), name
        error, allowed = relative_error(x, exact), 2 * relative_error(yardstick, exact) + BF16_ROUNDING
        assert error <= allowed, f"{name}: relative error {error:.3g}, allowed {allowed:.3g}"


def compare(rows=None, checkpointing=False, **inputs):
    model = tiny_model()
    eager = logits_and_gradients(model, rows, **inputs)
    truth = logits_and_gradients(tiny_model(torch.float64), rows, **inputs)
    replace_gpt_oss_with_flash_sink_attn(model)
    if checkpointing:
        model.train().gradient_checkpointing_enable()
    assert_as_good_as_eager(logits_and_gradients(model, rows, **inputs), eager, truth)


def test_logits_and_gradients_of_a_full_batch():
    compare(input_ids=tokens(2, 21))


def test_gradient_checkpointing():
    compare(checkpointing=True, input_ids=tokens(1, 17))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(side):
    lengths = torch.tensor([[19], [6]], device=DEVICE)
    columns = torch.arange(19, device=DEVICE)[None]
    mask = (columns < lengths if side == "right" else columns >= 19 - lengths).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    compare(rows=mask.bool(), input_ids=tokens(2, 19), attention_mask=mask, position_ids=positions)


def test_padding_rows_do_not_reach_the_other_rows():
    mask = torch.ones(2, 13, dtype=torch.long, device=DEVICE)
    mask[1, 5:] = 0
    ids = tokens(2, 13)
    changed = torch.where(mask.bool(), ids, 1 + ids % 61)
    model = replace_gpt_oss_with_flash_sink_attn(tiny_model())
    with torch.no_grad():
        first, second = (model(input_ids=x, attention_mask=mask, use_cache=False).logits for x in (ids, changed))
    assert not torch.equal(ids, changed)
    assert torch.equal(first[mask.bool()], second[mask.bool()])


def packed_batch():
    """Lengths 11, 1 and 9: one row of 21 tokens, and the same sequences as a right-padded batch of three."""
    lengths = [11, 1, 9]
    ids = tokens(1, 21)
    positions = torch.cat([torch.arange(n) for n in lengths])[None].to(DEVICE)
    padded = torch.nn.utils.rnn.pad_sequence(list(ids[0].split(lengths)), batch_first=True)
    mask = torch.arange(11, device=DEVICE)[None] < torch.tensor(lengths, device=DEVICE)[:, None]
    return ids, positions, padded, mask.long()


@pytest.mark.parametrize("given_by", ["position_ids", "cu_seq_lens"])
def test_packed_sequences_equal_a_padded_batch(given_by):
    ids, positions, padded, mask = packed_batch()
    packed = {"input_ids": ids, "position_ids": positions}
    if given_by == "cu_seq_lens":
        ends = torch.tensor([0, 11, 12, 21], dtype=torch.int32, device=DEVICE)
        packed |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 11, "max_length_k": 11}
    model = tiny_model()
    rows = mask.bool()
    eager = logits_and_gradients(model, rows, input_ids=padded, attention_mask=mask)
    truth = logits_and_gradients(tiny_model(torch.float64), rows, input_ids=padded, attention_mask=mask)
    every_row = torch.ones_like(positions).bool()
    ours = logits_and_gradients(replace_gpt_oss_with_flash_sink_attn(model), every_row, **packed)
    assert_as_good_as_eager(ours, eager, truth)


@pytest.mark.parametrize("padding", [0, 4])
def test_prefill_chunks_and_decode_with_a_cache(padding):
    """Prefill of 7, a chunk of 3, then single tokens until the window's cache has long dropped its first keys."""
    ids = tokens(2, 14)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    model = tiny_model()
    inputs = {"attention_mask": mask, "position_ids": positions}
    with torch.no_grad():
        truth = tiny_model(torch.float64)(input_ids=ids, **inputs, use_cache=False).logits
        eager = model(input_ids=ids, **inputs, use_cache=False).logits
        replace_gpt_oss_with_flash_sink_attn(model)
        cache, steps, start = None, [], 0
        for n in (7, 3, 1, 1, 1, 1):
            step = model(input_ids=ids[:, start:start + n], attention_mask=mask[:, :start + n],
                         position_ids=positions[:, start:start + n], past_key_values=cache, use_cache=True)
            steps.append(step.logits)
            cache = step.past_key_values
            start += n
    real = mask.bool()
    error, yardstick = (relative_error(x[real], truth[real]) for x in (torch.cat(steps, dim=1), eager))
    assert error <= 2 * yardstick + BF16_ROUNDING


def test_generate_from_a_padded_prompt():
    """Every step's logits against a whole forward over what came out."""
    new = 5
    ids = tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    model = replace_gpt_oss_with_flash_sink_attn(tiny_model())
    out = model.generate(ids, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0,
                         eos_token_id=None, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(out.sequences[:, :6], ids)
    steps = torch.stack(out.logits, dim=1)
    assert torch.equal(steps.argmax(-1), out.sequences[:, 6:])
    mask = torch.nn.functional.pad(mask, (0, new - 1), value=1)
    whole = {"input_ids": out.sequences[:, :-1], "attention_mask": mask,
             "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
    with torch.no_grad():
        truth = tiny_model(torch.float64)(**whole).logits[:, -new:]
        eager = restore_gpt_oss_attention(model)(**whole).logits[:, -new:]
    assert relative_error(steps, truth) <= 2 * relative_error(eager, truth) + BF16_ROUNDING


def test_autocast_of_a_float32_model():
    ids = tokens(1, 13)
    eager_model, ours_model = tiny_model(torch.float32), replace_gpt_oss_with_flash_sink_attn(tiny_model(torch.float32))
    truth = logits_and_gradients(tiny_model(torch.float64), input_ids=ids)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        eager = logits_and_gradients(eager_model, input_ids=ids)
        ours = logits_and_gradients(ours_model, input_ids=ids)
    assert_as_good_as_eager(ours, eager, truth)


def test_float32_without_autocast_is_refused():
    model = replace_gpt_oss_with_flash_sink_attn(tiny_model(torch.float32))
    with pytest.raises(TypeError, match="expected float16 or bfloat16, got torch.float32$"):
        model(input_ids=tokens(1, 5), use_cache=False)


def test_compiled_attention_is_one_graph_and_never_mixes_packed_sequences():
    model = replace_gpt_oss_with_flash_sink_attn(tiny_model())
    layer = model.model.layers[0].self_attn
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hidden = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE, torch.bfloat16)
    positions = torch.arange(12, device=DEVICE)[None]

    def run(layer, positions, **packed):
        x = hidden.clone().requires_grad_()
        out, _ = layer(hidden_states=x, position_embeddings=model.model.rotary_emb(hidden, positions),
                       attention_mask=None, position_ids=positions, **packed)
        out.backward(hidden)
        return out.detach(), x.grad

    for x, y in zip(run(compiled, positions), run(layer, positions), strict=True):
        assert torch.equal(x, y)
    ends = torch.tensor([0, 6, 12], dtype=torch.int32, device=DEVICE)
    packed = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 6, "max_length_k": 6}
    for x, y in zip(run(compiled, positions % 6, **packed), run(layer, positions % 6), strict=True):
        assert torch.equal(x, y)
    if DEVICE == "cpu":  # on a GPU the same assertion ends the process's CUDA context
        with pytest.raises(RuntimeError, match="position_ids restart"):
            run(compiled, positions % 6)


def test_a_static_cache_is_refused():
    model = replace_gpt_oss_with_flash_sink_attn(tiny_model())
    with pytest.raises(NotImplementedError, match="the last query must be at the last key"):
        model.generate(tokens(1, 5), max_new_tokens=4, cache_implementation="static", pad_token_id=0)


@pytest.mark.parametrize(("inputs", "error", "message"), [
    ({"attention_mask": torch.tensor([[1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1]])}, ValueError, "padding between"),
    ({"attention_mask": torch.ones(1, 1, 11, 11, dtype=torch.bool)}, ValueError, "2-D padding mask"),
    ({"attention_mask": torch.tensor([[0] + 9 * [1]])}, (ValueError, NotImplementedError), "attention_mask|last key"),
    ({"position_ids": torch.tensor([[0, 1, 2, 5, 6, 7, 8, 9, 10, 11, 12]])}, ValueError, "got a step of 3"),
    ({"attention_mask": torch.tensor([[0] + 10 * [1]]), "cu_seq_lens_q": torch.tensor([0, 11], dtype=torch.int32)},
     ValueError, "cu_seq_lens_q"),
])
def test_what_has_no_right_answer_is_refused(inputs, error, message):
    model = replace_gpt_oss_with_flash_sink_attn(tiny_model())
    with pytest.raises(error, match=message):
        model(input_ids=tokens(1, 11), use_cache=False, **{name: x.to(DEVICE) for name, x in inputs.items()})


def test_attention_dropout_is_refused_in_training_only():
    model = replace_gpt_oss_with_flash_sink_attn(tiny_model(attention_dropout=0.1))
    model.eval()(input_ids=tokens(1, 5), use_cache=False)
    with pytest.raises(NotImplementedError, match="attention dropout"):
        model.train()(input_ids=tokens(1, 5), use_cache=False)


def test_only_the_given_model_is_changed_and_restoring_undoes_it():
    model, other = tiny_model(), tiny_model()
    eager, _ = logits_and_gradients(model, input_ids=tokens(1, 9))
    wrapper = torch.nn.ModuleDict({"inner": model})
    assert replace_gpt_oss_with_flash_sink_attn(wrapper) is wrapper
    assert replace_gpt_oss_with_flash_sink_attn(model) is model
    assert model.config._attn_implementation == gpt_oss.ATTN_IMPLEMENTATION
    assert other.config._attn_implementation == "eager"
    assert copy.deepcopy(model).config._attn_implementation == gpt_oss.ATTN_IMPLEMENTATION
    assert gpt_oss.ATTN_IMPLEMENTATION not in model.config.to_json_string()
    assert restore_gpt_oss_attention(wrapper) is wrapper
    assert model.config._attn_implementation == "eager"
    assert torch.equal(logits_and_gradients(model, input_ids=tokens(1, 9))[0], eager)
    with pytest.raises(ValueError, match="replace_gpt_oss_with_flash_sink_attn"):
        restore_gpt_oss_attention(model)


def test_the_kernel_is_what_runs(monkeypatch):
    """Each layer calls it once, with its own window and its own sinks."""
    calls = []
    monkeypatch.setattr(gpt_oss, "flash_sink_attn_func", lambda q, k, v, sinks, window, **_: calls.append(
        (window, sinks)) or q)
    model = replace_gpt_oss_with_flash_sink_attn(tiny_model())
    model(input_ids=tokens(1, 5), use_cache=False)
    assert [window for window, _ in calls] == [WINDOW, None]
    assert [sinks for _, sinks in calls] == [layer.self_attn.sinks for layer in model.model.layers]


@pytest.mark.parametrize("model", [torch.nn.Linear(2, 2), "gpt-oss"])
def test_another_model_is_refused(model):
    with pytest.raises(TypeError, match="expected a Transformers gpt-oss model"):
        replace_gpt_oss_with_flash_sink_attn(model)


def test_positions_are_read_once_per_tensor_and_again_when_changed():
    positions = torch.arange(6)[None]
    assert gpt_oss._packed_layout(positions, 1) is None
    positions[0, 3:] -= 3
    layout = gpt_oss._packed_layout(positions, 1)
    assert layout.cu_seqlens_q.tolist() == [0, 3, 6]
    assert gpt_oss._packed_layout(positions, 1) is layout
    assert gpt_oss._packed_layout(positions, 2).cu_seqlens_q.tolist() == [0, 3, 6, 9, 12]
