"""Our mask objects against masks that transformers writes out, and what is refused."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from tiny_models import gpt_oss, logits, max_diff, padding_mask, tokens
from torch import nn
from transformers import masking_utils

from sink_attention_ext.integrations.mask_function import sink_attention_mask
from sink_attention_ext.integrations.masks import (
    GatheredMask,
    PackedMask,
    PaddedMask,
    UnpaddedMask,
)
from sink_attention_ext.integrations.transformers import sink_attention

HEADS_Q, HEADS_KV, HEAD_DIM = 4, 2, 8
CAUSAL = masking_utils.causal_mask_function


def layer(**attributes):
    module = nn.Module()
    vars(module).update({"layer_idx": 0, "is_causal": True} | attributes)
    return module


def inputs(batch, q_length, kv_length, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, HEAD_DIM, generator=generator)

    q = draw(batch, HEADS_Q, q_length)
    k, v = draw(batch, HEADS_KV, kv_length), draw(batch, HEADS_KV, kv_length)
    return q, k, v, torch.randn(HEADS_Q, generator=generator)


def eager(q, k, v, s_aux, visible):
    """Attention with a sink, where visible (batch, 1, q_length, kv_length)."""
    k, v = (t.repeat_interleave(HEADS_Q // HEADS_KV, dim=1) for t in (k, v))
    scores = q @ k.transpose(2, 3) * HEAD_DIM**-0.5
    scores = scores.masked_fill(~visible, -torch.inf)
    sink = s_aux[None, :, None, None].expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1]
    return (weights @ v).transpose(1, 2)


def check(q_length, kv_length, q_offset=0, kv_offset=0, rule=CAUSAL, padding=None, **extra):
    """Compares our attention with eager's where the row is no padding; returns our mask."""
    batch = 2 if padding is None else padding.shape[0]
    arguments = {
        "batch_size": batch,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": rule,
        "attention_mask": padding,
        **extra,
    }
    mask = sink_attention_mask(**arguments)
    visible = masking_utils.sdpa_mask(**arguments, allow_is_causal_skip=False)
    q, k, v, s_aux = inputs(batch, q_length, kv_length)
    expected = eager(q, k, v, s_aux, visible)

    rows = torch.ones(batch, q_length, dtype=torch.bool)
    if padding is not None and q_offset + q_length <= padding.shape[1]:
        rows = padding[:, int(q_offset) : int(q_offset) + q_length]
    for gradient in (False, True):  # decode and training take different kernels
        q.requires_grad_(gradient)
        ours, weights = sink_attention(layer(), q, k, v, mask, s_aux=s_aux)
        assert weights is None and ours.isfinite().all()
        torch.testing.assert_close(ours[rows], expected[rows], atol=2e-6, rtol=2e-5)
    return mask


def sliding(window):
    return masking_utils.sliding_window_causal_mask_function(window)


@pytest.mark.parametrize("window", [None, 4, 9, 40])
@pytest.mark.parametrize("side", [None, "left", "right"])
def test_prefill_and_cached_rows(window, side):
    """A growing cache: 0 to 12 tokens before 1 to 20 new ones."""
    for past, new in itertools.product([0, 1, 7, 12], [1, 3, 20]):
        total = past + new
        padding = None
        if side is not None:
            lengths = [total, max(total - 3, 1), max(total - 9, 0), 0]
            padding = padding_mask(total, lengths, side).bool()
        rule = CAUSAL if window is None else sliding(window)
        mask = check(new, total, q_offset=past, rule=rule, padding=padding)
        assert isinstance(mask, UnpaddedMask if side is None else PaddedMask)


def test_padding_at_the_end_of_a_row_and_the_beginning_of_the_next():
    """Together it is longer than a row."""
    left, right = (padding_mask(12, [3, 0, 2], side) for side in ("left", "right"))
    full, window = masking_utils.bidirectional_mask_function, sliding(4)
    for padding in (left, torch.cat([right, left]), torch.cat([left, right])):
        for rule in (CAUSAL, window, full):
            check(12, 12, rule=rule, padding=padding.bool())


@pytest.mark.parametrize("padded", [False, True])
def test_static_cache_with_a_tail_of_zeros(padded):
    """q_offset is a tensor that changes after the mask was made."""
    for past, new in itertools.product([0, 5, 12], [1, 6, 20]):
        offset = torch.tensor(past)
        padding = padding_mask(past + new, [past + new, past + new - 1], "left").bool()
        arguments = {"q_offset": offset, "padding": padding if padded else None}
        mask = check(new, 64, **arguments)
        again = sink_attention_mask(
            2, new, 64, q_offset=offset, mask_function=CAUSAL, attention_mask=arguments["padding"]
        )
        offset += new  # as StaticLayer.update does
        q, k, v, s_aux = inputs(2, new, 64)
        before, after = (sink_attention(layer(), q, k, v, m, s_aux=s_aux)[0] for m in (mask, again))
        assert torch.equal(before, after)


@pytest.mark.parametrize("padded", [False, True])
def test_sliding_cache_that_has_dropped_tokens(padded):
    """kv_offset > 0: the key of index 0 is not the first token."""
    window = 8
    for past, new in itertools.product([8, 20], [1, 5]):
        kv_offset = past - window + 1
        padding = padding_mask(past + new, [past + new, new + 3], "left").bool() if padded else None
        check(new, window - 1 + new, past, kv_offset, sliding(window), padding, local_size=window)


def test_holes_in_the_padding_mask():
    holes = torch.tensor([[1, 1, 0, 0, 1, 1, 0, 1], [0, 1, 1, 1, 1, 1, 1, 1]]).bool()
    assert isinstance(check(8, 8, padding=holes), GatheredMask)
    assert isinstance(check(1, 8, q_offset=7, padding=holes), GatheredMask)
    assert isinstance(check(3, 8, q_offset=5, padding=holes), GatheredMask)
    check(1, 8, q_offset=7, rule=sliding(8), padding=holes)  # the window reaches every key
    with pytest.raises(ValueError, match="zeros between ones .* sliding window of 4 tokens"):
        check(8, 8, rule=sliding(4), padding=holes)


def test_bidirectional_rules():
    full = masking_utils.bidirectional_mask_function
    window = masking_utils.sliding_window_bidirectional_mask_function(3)
    padding = padding_mask(10, [10, 6], "right").bool()
    for rule, rows in ((full, padding), (window, padding), (full, None), (window, None)):
        check(10, 10, rule=rule, padding=rows)
    check(4, 10, rule=full, padding=padding)  # cross attention over padded encoder states
    check(4, 10, rule=full)
    with pytest.raises(ValueError, match="bidirectional window"):
        check(4, 10, rule=window)


@pytest.mark.parametrize(("left", "right"), [(3, 3), (2, 4), (0, 3), (20, 2), (3, 20)])
def test_windows_to_both_sides_that_are_written_out(left, right):
    def window(b, h, q, k):
        return (k >= q - left) & (k <= q + right)

    full = masking_utils.bidirectional_mask_function
    rules = (
        masking_utils.and_masks(full, window),
        masking_utils.or_masks(
            masking_utils.and_masks(CAUSAL, lambda b, h, q, k: k >= q - left),
            masking_utils.and_masks(full, window),
        ),
    )
    for rule in rules:
        for side in ("right", "left"):
            for padding in (None, padding_mask(12, [12, 7, 0, 1], side).bool()):
                mask = check(12, 12, rule=rule, padding=padding, use_vmap=True)
                assert not mask.causal and mask.window_size == (min(left, 11), min(right, 11))
        ids = torch.tensor([[0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2]] * 2)
        packed = masking_utils.and_masks(rule, masking_utils.packed_sequence_mask_function(ids))
        assert isinstance(check(12, 12, rule=packed, use_vmap=True), PackedMask)
        with pytest.raises(ValueError, match="queries and keys are the same tokens"):
            check(4, 12, q_offset=8, rule=rule, use_vmap=True)


def test_two_windows_are_the_narrower_one():
    both = masking_utils.sliding_window_bidirectional_overlay
    for rule in (
        masking_utils.and_masks(both(2), both(4)),
        masking_utils.and_masks(both(4), both(2)),
        masking_utils.and_masks(masking_utils.sliding_window_overlay(3), both(5)),
        masking_utils.and_masks(both(5), masking_utils.sliding_window_overlay(3)),
        masking_utils.and_masks(CAUSAL, both(5), masking_utils.sliding_window_overlay(3)),
    ):
        check(12, 12, rule=rule)


def test_sequences_that_share_a_number_are_not_told_apart_by_where_they_begin():
    """Tokens 0 and 4 are of one sequence, with another one in between."""
    ids = torch.tensor([[0, 1, 1, 0, 0, 2, 2, 2]] * 2)
    packed = masking_utils.packed_sequence_mask_function(ids)
    with pytest.raises(ValueError, match="neither causal nor full"):
        check(8, 8, rule=masking_utils.and_masks(CAUSAL, packed))


def test_packed_rule_and_padding():
    """A mask function may say both (ESM C's does)."""
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]])
    packed = masking_utils.packed_sequence_mask_function(ids)
    padding = padding_mask(8, [8, 6], "right").bool()
    for rule in (CAUSAL, masking_utils.bidirectional_mask_function):
        with pytest.raises(ValueError, match="cannot compute the mask function"):
            check(8, 8, rule=masking_utils.and_masks(rule, packed), padding=padding)


def test_packed_rule():
    ids = torch.tensor([[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1, 1, 1, 1, 1, 2]])
    packed = masking_utils.packed_sequence_mask_function(ids)
    for rule in (CAUSAL, sliding(2)):
        mask = check(8, 8, rule=masking_utils.and_masks(rule, packed))
        assert isinstance(mask, PackedMask)


def test_chunked_rule_only_while_it_is_causal():
    rule = masking_utils.chunked_causal_mask_function(8, torch.zeros(2, dtype=torch.long))
    check(8, 8, rule=rule)
    with pytest.raises(ValueError, match="mask function .*and_mask.* neither causal nor full"):
        check(9, 9, rule=rule)


def test_a_rule_of_the_user_is_written_out_and_read():
    allowed = masking_utils.and_masks(CAUSAL, lambda b, h, q, k: k > q - 5)  # a window of 5
    mask = check(12, 12, rule=allowed, use_vmap=True)
    assert mask.window_size == (4, 0)
    image = masking_utils.or_masks(CAUSAL, lambda b, h, q, k: (q < 4) & (k < 4))
    with pytest.raises(ValueError, match="neither causal nor full"):
        check(12, 12, rule=image, use_vmap=True)


def test_image_tokens_that_see_each_other_are_refused():
    ids = torch.tensor([[-1, -1, 0, 0, 0, -1, -1, -1]] * 2)
    rule = masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(ids))
    with pytest.raises(ValueError, match="neither causal nor full"):
        check(8, 8, rule=rule)
    text = masking_utils.or_masks(CAUSAL, masking_utils.blockwise_overlay(torch.full((2, 8), -1)))
    check(8, 8, rule=text)


@pytest.mark.parametrize("as_float", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_a_4d_mask_of_the_user_is_read(as_float, window):
    rule = CAUSAL if window is None else sliding(window)
    for past, new, tail in itertools.product([0, 9], [1, 7], [0, 6]):
        total = past + new
        padding = padding_mask(total, [total, total - min(3, past)], "left").bool()
        if window is not None and new == 1:
            padding = None  # of one row only the keys it sees are known, and that is enough
        visible = masking_utils.sdpa_mask(
            2, new, total + tail, past, 0, rule, padding, allow_is_causal_skip=False
        )
        mask = visible
        if as_float:
            mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        q, k, v, s_aux = inputs(2, new, total + tail)
        ours, _ = sink_attention(layer(), q, k, v, mask, s_aux=s_aux)
        expected = eager(q, k, v, s_aux, visible)
        torch.testing.assert_close(ours, expected, atol=2e-6, rtol=2e-5)


def test_a_4d_mask_that_hides_everything_of_one_sequence():
    visible = torch.zeros(2, 1, 7, 13, dtype=torch.bool)
    visible[0, 0, :, :10] = torch.ones(7, 10).tril(3)  # and three keys behind the rows
    q, k, v, s_aux = inputs(2, 7, 13)
    for gradient in (False, True):
        q.requires_grad_(gradient)
        ours, _ = sink_attention(layer(), q, k, v, visible, s_aux=s_aux)
        torch.testing.assert_close(ours, eager(q, k, v, s_aux, visible), atol=2e-6, rtol=2e-5)


def test_a_4d_mask_through_the_model_is_authoritative_as_in_eager():
    model, ids = gpt_oss(), tokens(2, 24)
    causal = torch.ones(24, 24).tril().bool()[None, None]
    ours = logits(model, ids, attention_mask=causal)
    model.set_attn_implementation("eager")
    written = torch.zeros(1, 1, 24, 24).masked_fill(~causal, torch.finfo(torch.float32).min)
    assert max_diff(ours, logits(model, ids, attention_mask=written)) < 2e-5


def random_mask():
    return torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(3)) < 0.5


REFUSED_4D = {
    "random": (random_mask(), "neither causal nor full"),
    "gaps in each row": (
        torch.tensor([1, 0, 1, 1, 1, 1, 1, 1]).bool().expand(2, 1, 8, 8),
        "gaps in between",
    ),
    "bias": (torch.linspace(-1, 0, 64).view(1, 1, 8, 8), "values other than 0"),
    "integers": (torch.ones(1, 1, 8, 8, dtype=torch.long), "dtype is torch.int64"),
    "per head": (
        torch.stack([torch.ones(8, 8).tril(), torch.ones(8, 8)] * 2).bool()[None],
        "differs between heads",
    ),
    "packed": (
        torch.block_diag(*[torch.ones(4, 4).tril()] * 2).bool()[None, None],
        "neither causal nor full",
    ),
}


@pytest.mark.parametrize("name", REFUSED_4D)
def test_a_4d_mask_that_the_kernels_cannot_express_is_refused(name):
    mask, why = REFUSED_4D[name]
    q, k, v, s_aux = inputs(2, 8, 8)
    with pytest.raises(ValueError, match=f"cannot compute attention_mask: .*{why}"):
        sink_attention(layer(), q, k, v, mask, s_aux=s_aux)


def test_other_masks_are_refused():
    q, k, v, s_aux = inputs(2, 8, 8)
    with pytest.raises(ValueError, match="4 dimensions; got shape"):
        sink_attention(layer(), q, k, v, torch.ones(2, 8), s_aux=s_aux)
    mask = sink_attention_mask(2, 4, 4, mask_function=CAUSAL)
    with pytest.raises(ValueError, match="made for 4 queries and 4 keys; got query"):
        sink_attention(layer(), q, k, v, mask, s_aux=s_aux)
    with pytest.raises(ValueError, match="attention_mask is None, but causal"):
        sink_attention(layer(), q[:, :, :3], k, v, None, s_aux=s_aux)
    with pytest.raises(ValueError, match="the layer's sliding_window is 4"):
        mask = sink_attention_mask(2, 8, 8, mask_function=CAUSAL)
        sink_attention(layer(), q, k, v, mask, sliding_window=4)
    with pytest.raises(ValueError, match="the cache is too short"):
        sink_attention_mask(2, 8, 8, q_offset=1, mask_function=CAUSAL)


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("dropout", 0.1, "no attention dropout.*0.1"),
        ("output_attentions", True, "output_attentions"),
        ("position_bias", torch.zeros(1), "position_bias"),
        ("indices", torch.zeros(1), "indices"),
        ("s_aux", torch.zeros(HEADS_Q + 1), "s_aux has 5 logits, q has 4 heads in .* 0"),
    ],
)
def test_an_argument_that_cannot_be_computed_is_refused(argument, value, message):
    q, k, v, s_aux = inputs(2, 8, 8)
    with pytest.raises(ValueError, match=message):
        sink_attention(layer(), q, k, v, None, **({"s_aux": s_aux} | {argument: value}))


def test_masks_move_between_devices_and_pass_through_generate():
    padding = padding_mask(8, [8, 5], "left").bool()
    mask = sink_attention_mask(2, 8, 8, mask_function=CAUSAL, attention_mask=padding)
    assert mask.contiguous() is mask and mask.ndim == 4
    moved = mask.to("meta", non_blocking=True)
    assert moved.cu_seqlens_q.device.type == "meta" and mask.cu_seqlens_q.device.type == "cpu"
    assert sink_attention_mask(2, 8, 8, mask_function=CAUSAL, attention_mask=mask) is mask


def test_a_layer_without_masks_follows_is_causal_and_its_window():
    q, k, v, s_aux = inputs(2, 8, 8)
    everything = torch.ones(2, 1, 8, 8, dtype=torch.bool)
    lower = everything.tril()
    for module, extra, visible in (
        (layer(), {}, lower),
        (layer(is_causal=False), {}, everything),
        (layer(), {"is_causal": False}, everything),
        (layer(), {"sliding_window": 3}, lower & everything.triu(-2)),
    ):
        ours, _ = sink_attention(module, q, k, v, None, s_aux=s_aux, **extra)
        torch.testing.assert_close(ours, eager(q, k, v, s_aux, visible), atol=2e-6, rtol=2e-5)


def test_config_of_a_quantized_model_decides_the_dtype():
    module = layer(config=SimpleNamespace(_is_quantized=True, dtype=torch.bfloat16))
    q, k, v, s_aux = inputs(1, 4, 4)
    assert sink_attention(module, q, k, v, None, s_aux=s_aux)[0].dtype == torch.bfloat16
