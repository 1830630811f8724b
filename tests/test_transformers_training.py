"""Training GPT-OSS with our attention: packing, checkpointing, Trainer, torch.compile."""

import pytest
import torch
from tiny_models import (
    assert_same_gradients,
    both,
    gpt_oss,
    gradients,
    logits,
    max_diff,
    padding_mask,
    positions,
    tokens,
)
from transformers import Trainer, TrainingArguments

LENGTHS = (7, 22, 1, 30)


@pytest.fixture(scope="module")
def model():
    return gpt_oss()


def packed(lengths=LENGTHS):
    """One row of sequences, their position_ids, and FlashAttentionKwargs that say the same."""
    ids = tokens(1, sum(lengths))
    position_ids = torch.cat([torch.arange(n) for n in lengths])[None]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    bounds = {
        "cu_seq_lens_q": cu_seqlens.to(torch.int32),
        "cu_seq_lens_k": cu_seqlens.to(torch.int32),
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    return ids, position_ids, bounds


def separately(model, ids, lengths=LENGTHS):
    return torch.cat([logits(model, part) for part in ids.split(lengths, dim=1)], dim=1)


def test_packed_sequences_equal_separate_ones(model):
    """Eager is no oracle here: transformers' eager GPT-OSS lets packed sequences see each other."""
    ids, position_ids, bounds = packed()
    model.set_attn_implementation("eager")
    apart = separately(model, ids)
    model.set_attn_implementation("sink_attention")
    assert max_diff(logits(model, ids, position_ids=position_ids), apart) < 2e-5
    given = logits(model, ids, position_ids=position_ids, **bounds)
    assert max_diff(given, apart) < 2e-5
    lengths = ("max_length_q", "max_length_k")
    on_device = bounds | {name: torch.tensor(bounds[name]) for name in lengths}
    assert torch.equal(logits(model, ids, position_ids=position_ids, **on_device), given)
    unbounded = bounds | dict.fromkeys(lengths)
    assert max_diff(logits(model, ids, position_ids=position_ids, **unbounded), given) < 1e-6


def test_two_rows_of_packed_sequences(model):
    lengths = ((20, 10), (3, 27))
    ids = tokens(2, 30)
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ours = logits(model, ids, position_ids=position_ids)
    for b, row in enumerate(lengths):
        assert max_diff(ours[b : b + 1], separately(model, ids[b : b + 1], row)) < 2e-5


def test_gradients_of_packed_sequences_equal_separate_ones(model):
    ids, position_ids, _ = packed()
    weights = torch.randn(1, ids.shape[1], model.config.vocab_size)

    def backward(outputs):
        model.zero_grad()
        (outputs * weights).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    together = model(ids, position_ids=position_ids, use_cache=False).logits
    ours = backward(together)
    parts = [model(part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)]
    assert_same_gradients(ours, backward(torch.cat(parts, dim=1)), relative=1e-4)


def test_padding_and_packing_exclude_each_other(model):
    ids, _, bounds = packed((20, 20))
    with pytest.raises(ValueError, match="exclude each other"):
        logits(model, ids, attention_mask=padding_mask(40, [30], "left"), **bounds)


def test_positions_that_jump_are_one_sequence(model):
    """Only a restart begins a sequence: training on positions far apart (PoSE) is not packing."""
    ids = tokens(1, 20)
    position_ids = torch.cat([torch.arange(10), torch.arange(100, 110)])[None]
    ours, eager = both(model, lambda m: logits(m, ids, position_ids=position_ids))
    assert max_diff(ours, eager) < 2e-5


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(model, use_reentrant):
    ids = tokens(2, 40)
    mask = padding_mask(40, [40, 27], "left")
    run = {"attention_mask": mask, "position_ids": positions(mask)}
    expected = gradients(model, ids, **run)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    try:
        assert_same_gradients(gradients(model, ids, **run), expected, relative=1e-5)
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer(tmp_path, checkpointing):
    """A few steps on sequences of different lengths: the loss falls and every sink moves."""
    model = gpt_oss(num_hidden_layers=2)
    before = [layer.self_attn.sinks.detach().clone() for layer in model.model.layers]
    text = torch.arange(2, 62).repeat(3)  # a sequence that can be learned
    data = []
    for i in range(32):
        length = 20 + i % 12
        ids = torch.zeros(32, dtype=torch.long)
        ids[:length] = text[i : i + length]
        mask = (torch.arange(32) < length).long()
        labels = ids.masked_fill(mask == 0, -100)
        data.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        per_device_train_batch_size=8,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        gradient_checkpointing=checkpointing,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=data)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.7 * losses[0]
    for layer, old in zip(model.model.layers, before, strict=True):
        assert (layer.self_attn.sinks.detach() - old).abs().min() > 0


# ---- torch.compile ----


def compiled_gradients(model, ids, **run):
    torch._dynamo.reset()
    names, parameters = zip(*model.named_parameters(), strict=True)

    def step(ids):
        return model(ids, use_cache=False, **run).logits

    try:
        results = []
        for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
            outputs = function(ids)
            found = torch.autograd.grad(outputs.float().square().mean(), parameters)
            results.append((outputs.detach(), dict(zip(names, found, strict=True))))
        return results
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_a_training_step_compiled_in_full(side):
    model = gpt_oss(num_hidden_layers=2)
    model.set_experts_implementation("batched_mm")  # the default's backward is not traceable on CPU
    run = {}
    if side is not None:
        mask = padding_mask(24, [24, 15], side)
        run = {"attention_mask": mask, "position_ids": positions(mask)}
    (expected, expected_gradients), (ours, our_gradients) = compiled_gradients(
        model, tokens(2, 24), **run
    )
    assert max_diff(ours, expected) < 1e-5
    assert_same_gradients(our_gradients, expected_gradients, relative=1e-5)


def test_packed_sequences_compiled_need_their_bounds():
    model = gpt_oss(num_hidden_layers=2)
    model.set_experts_implementation("batched_mm")
    ids, position_ids, bounds = packed((9, 15))
    (expected, _), (ours, _) = compiled_gradients(model, ids, position_ids=position_ids, **bounds)
    assert max_diff(ours, expected) < 1e-5
    with pytest.raises(RuntimeError, match="need cu_seq_lens_q"):
        compiled_gradients(model, ids, position_ids=position_ids)


def test_a_mask_with_holes_compiled_is_refused():
    model = gpt_oss(num_hidden_layers=2)
    model.set_experts_implementation("batched_mm")
    holes = torch.ones(
        1, 14, dtype=torch.long
    )  # not longer than the window: eager mode computes it
    holes[0, 5:8] = 0
    with pytest.raises(RuntimeError, match="zeros between ones"):
        compiled_gradients(model, tokens(1, 14), attention_mask=holes)


def test_export():
    model = gpt_oss(num_hidden_layers=2)
    model.set_experts_implementation("batched_mm")
    ids = tokens(2, 24)
    with torch.no_grad():
        program = torch.export.export(
            model, (), {"input_ids": ids, "use_cache": False}, strict=True
        )
        ours = program.module()(input_ids=ids, use_cache=False).logits
    assert max_diff(ours, logits(model, ids)) < 1e-5
