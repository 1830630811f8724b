"""Sequences packed into rows: with padding, caches, given bounds; against each sequence alone.

transformers' eager attention is no oracle here: GPT-OSS does not tell its masks of position_ids,
and no model does together with a padding mask.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
import transformers
from tiny_models import gpt_oss, gradients, logits, max_diff, padding_mask, positions, tokens
from torch import Tensor, nn
from transformers import DynamicCache, GptOssForCausalLM, StaticCache, masking_utils

from sink_attention_ext.integrations.mask_function import sink_attention_mask
from sink_attention_ext.integrations.transformers import sink_attention

LENGTHS = (21, 5, 30)  # the window is 16
TOTAL = sum(LENGTHS)
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> GptOssForCausalLM:
    model = gpt_oss(num_hidden_layers=2)
    model.set_experts_implementation("batched_mm")
    return model


@pytest.fixture(scope="module")
def parts() -> list[Tensor]:
    return [tokens(1, n, seed=n)[0] for n in LENGTHS]


@pytest.fixture(scope="module")
def alone(model: GptOssForCausalLM, parts: list[Tensor]) -> Tensor:
    return torch.cat([logits(model, part[None])[0] for part in parts])


def bounds(*values: int, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(values, dtype=dtype)


STARTS = bounds(0, *itertools.accumulate(LENGTHS))


def row(parts: list[Tensor], left: int = 0, right: int = 0, gap: int = 0) -> dict[str, Tensor]:
    """input_ids, position_ids and attention_mask (1, n) of packed parts with padding around."""
    before, between, behind = (torch.zeros(n, dtype=torch.long) for n in (left, gap, right))
    ids, place, mask = [before], [before], [before]
    for i, part in enumerate(parts):
        if i > 0:
            for pieces in (ids, place, mask):
                pieces.append(between)
        ids.append(part)
        place.append(torch.arange(len(part)))
        mask.append(torch.ones_like(part))
    for pieces in (ids, place, mask):
        pieces.append(behind)
    names = ("input_ids", "position_ids", "attention_mask")
    return {name: torch.cat(p)[None] for name, p in zip(names, (ids, place, mask), strict=True)}


def run(model: GptOssForCausalLM, given: dict[str, Tensor], **more: object) -> Tensor:
    """The logits of the tokens that are no padding, row after row."""
    mask = given["attention_mask"].bool()
    with torch.no_grad():
        return model(**(given | more)).logits[mask.expand(given["input_ids"].shape[0], -1)]


# ---- position_ids ----


@pytest.mark.parametrize(
    "padding",
    [{}, {"right": 3}, {"right": 1}, {"left": 4}, {"left": 2, "right": 5}, {"gap": 2, "right": 1}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32], ids=str)
def test_padding_beside_packed_sequences(
    model: GptOssForCausalLM,
    parts: list[Tensor],
    alone: Tensor,
    padding: dict[str, int],
    dtype: torch.dtype,
) -> None:
    given = row(parts, **padding)
    given["attention_mask"] = given["attention_mask"].to(dtype)
    assert max_diff(run(model, given), alone) < TOLERANCE


@pytest.mark.parametrize(("left", "with_mask"), [(0, True), (0, False), (3, True)])
@pytest.mark.parametrize("cache", ["none", "dynamic", "static"])
def test_rows_of_a_batch_and_their_caches(
    model: GptOssForCausalLM,
    parts: list[Tensor],
    alone: Tensor,
    cache: str,
    left: int,
    with_mask: bool,
) -> None:
    """position_ids of one row stand for all of them; each row may also have its own."""
    given, backwards = row(parts, left=left), row(parts[::-1], left=left)
    both = {name: torch.cat([given[name], backwards[name]]) for name in given}
    same = {name: torch.cat([given[name], given[name]]) for name in given}
    same["position_ids"] = given["position_ids"]
    reverse = torch.cat(alone.split(LENGTHS)[::-1])
    for rows, expected in ((both, [alone, reverse]), (same, [alone, alone])):
        options: dict[str, object] = {"use_cache": cache != "none"}
        if cache == "static":
            options["past_key_values"] = StaticCache(config=model.config, max_cache_len=80)
        if not with_mask:
            options["attention_mask"] = None
        assert max_diff(run(model, rows, **options), torch.cat(expected)) < TOLERANCE


def test_padded_and_packed_gradients(model: GptOssForCausalLM, parts: list[Tensor]) -> None:
    """Of one loss: the mean over all parts' tokens but the first of each."""
    expected: dict[str, Tensor] = {}
    counted = sum(len(part) - 1 for part in parts)
    for part in parts:
        for name, gradient in gradients(model, part[None]).items():
            expected[name] = expected.get(name, 0) + gradient * ((len(part) - 1) / counted)
    given = row(parts, left=2, right=3)
    labels = given["input_ids"].masked_fill(
        (given["attention_mask"] == 0) | (given["position_ids"] == 0), -100
    )
    model.zero_grad()
    model(**given, labels=labels, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            allowed = 2e-5 * expected[name].abs().max().item() + 1e-8
            assert max_diff(parameter.grad, expected[name]) < allowed, name


def test_padding_inside_of_a_packed_sequence_is_refused(
    model: GptOssForCausalLM, parts: list[Tensor]
) -> None:
    given = row(parts)
    given["attention_mask"][0, 10] = 0
    with pytest.raises(ValueError, match="zeros between the ones of a sequence that shares its"):
        run(model, given)


def test_packed_sequences_behind_a_cache_are_refused(
    model: GptOssForCausalLM, parts: list[Tensor]
) -> None:
    first, rest = row(parts[:1]), row(parts[1:])
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=80),
    ):
        run(model, first, past_key_values=cache)
        with pytest.raises(ValueError, match="restart within 35 tokens behind .* cached ones"):
            run(model, rest, past_key_values=cache, attention_mask=torch.ones(1, TOTAL))


@pytest.mark.parametrize("masked_position", [0, 1])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_padded_prompts_in_chunks_are_not_packed(
    model: GptOssForCausalLM, cache: str, masked_position: int
) -> None:
    """Left padding has positions that do not rise; its tokens' rise through every chunk."""
    ids, mask = tokens(2, 40), padding_mask(40, [40, 13], "left")
    place = positions(mask).masked_fill(mask == 0, masked_position)
    expected = logits(model, ids, attention_mask=mask, position_ids=place, use_cache=False)
    kept = (
        DynamicCache(config=model.config)
        if cache == "dynamic"
        else StaticCache(config=model.config, max_cache_len=50)
    )
    chunks = []
    for begin, end in ((0, 20), (20, 24), (24, 25), (25, 40)):
        chunk = {"attention_mask": mask[:, :end], "position_ids": place[:, begin:end]}
        chunks.append(logits(model, ids[:, begin:end], past_key_values=kept, **chunk))
    ours = torch.cat(chunks, dim=1)
    assert max_diff(ours[mask.bool()], expected[mask.bool()]) < TOLERANCE


def test_holes_in_a_padding_mask_are_not_packing(model: GptOssForCausalLM) -> None:
    """Positions that count real tokens stand still in a hole."""
    ids, mask = tokens(1, 14), torch.ones(1, 14, dtype=torch.long)
    mask[0, 5:8] = 0
    ours = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    expected = logits(model, ids[:, mask[0].bool()])
    assert max_diff(ours[0, mask[0].bool()], expected[0]) < TOLERANCE


# ---- cu_seq_lens ----

GIVEN = {
    "cu_seq_lens_q": STARTS,
    "cu_seq_lens_k": STARTS,
    "max_length_q": max(LENGTHS),
    "max_length_k": max(LENGTHS),
}
SUBSETS = [names for n in range(1, 5) for names in itertools.combinations(GIVEN, n)]


@pytest.mark.parametrize("restarting", [False, True])
@pytest.mark.parametrize("names", SUBSETS, ids=lambda names: "-".join(names))
def test_each_subset_of_the_bounds(
    model: GptOssForCausalLM,
    parts: list[Tensor],
    alone: Tensor,
    names: tuple[str, ...],
    restarting: bool,
) -> None:
    """What is given is used; what is not enough is refused, and never passed over."""
    place = row(parts)["position_ids"] if restarting else torch.arange(TOTAL)[None]
    options = {name: GIVEN[name] for name in names} | {"position_ids": place}
    ids = torch.cat(parts)[None]
    if {"cu_seq_lens_q", "cu_seq_lens_k"} <= set(names):
        assert max_diff(logits(model, ids, **options)[0], alone) < TOLERANCE
    else:
        match = f"need both cu_seq_lens_q and cu_seq_lens_k .* got {' and '.join(names)} only"
        with pytest.raises(ValueError, match=match):
            logits(model, ids, **options)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_bounds_through_the_rows_of_a_batch(
    model: GptOssForCausalLM, parts: list[Tensor], alone: Tensor, dtype: torch.dtype
) -> None:
    ids = torch.cat(parts).expand(2, -1)
    twice = torch.cat([STARTS, STARTS[1:] + TOTAL]).to(dtype)
    options = {"cu_seq_lens_q": twice, "cu_seq_lens_k": twice}
    assert max_diff(logits(model, ids, **options), alone.expand(2, -1, -1)) < TOLERANCE
    for wrong in (STARTS, bounds(0, 40, 2 * TOTAL)):  # one row's; across the rows' bound
        with pytest.raises(ValueError, match=f"every multiple of {TOTAL} up to {2 * TOTAL}"):
            logits(model, ids, cu_seq_lens_q=wrong, cu_seq_lens_k=wrong)


def both_ways(bound: object, **more: object) -> dict[str, object]:
    return {"cu_seq_lens_q": bound, "cu_seq_lens_k": bound} | more


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        (both_ways([0, TOTAL]), TypeError, "cu_seq_lens_q must be a tensor; got list"),
        (both_ways(STARTS.float()), TypeError, "int32 or int64; got .* of torch.float32"),
        (both_ways(STARTS[None]), TypeError, r"\(sequences \+ 1,\) .* got \(1, 4\)"),
        (both_ways(STARTS, max_length_q=30.0), TypeError, "max_length_q must be an int"),
        (both_ways(STARTS, max_length_k="30"), TypeError, "max_length_k must be an int"),
        (both_ways(STARTS, max_length_q=-1), ValueError, "max_length_q must be at least 0"),
        (both_ways(STARTS, max_length_q=7), ValueError, "max_seqlen_q"),
        (both_ways(STARTS + 1), ValueError, "cu_seqlens_q"),
        (both_ways(STARTS.long() + 2**32), ValueError, "cu_seqlens_q"),
        (
            {"cu_seq_lens_q": STARTS, "cu_seq_lens_k": STARTS[:3]},
            ValueError,
            "must have as many entries; got 4 and 3",
        ),
        (
            both_ways(STARTS, attention_mask=padding_mask(TOTAL, [TOTAL - 1], "right")),
            ValueError,
            "attention_mask with padding exclude each other",
        ),
        (
            both_ways(bounds(0, 21, TOTAL), position_ids=row(
                [torch.zeros(n, dtype=torch.long) for n in LENGTHS]
            )["position_ids"]),
            ValueError,
            "cu_seq_lens_q and position_ids disagree",
        ),
    ],
)  # fmt: skip
def test_bounds_that_are_wrong(
    model: GptOssForCausalLM,
    options: dict[str, object],
    error: type[Exception],
    match: str,
) -> None:
    with pytest.raises(error, match=match):
        logits(model, tokens(1, TOTAL), **options)


def test_a_filled_row(model: GptOssForCausalLM, parts: list[Tensor], alone: Tensor) -> None:
    """Collators fill a row up with position 0, behind the last bound or as one sequence more."""
    given = row(parts, right=4)
    for bound in (STARTS, torch.cat([STARTS, bounds(TOTAL + 4)])):
        options = both_ways(bound, attention_mask=None)
        assert max_diff(run(model, given, **options), alone) < TOLERANCE


# ---- torch.compile ----

Step = Callable[[Tensor], Tensor]


@pytest.fixture
def compiled(model: GptOssForCausalLM) -> Iterator[Callable[..., Step]]:
    torch._dynamo.reset()

    def compile_with(**options: object) -> Step:
        def step(ids: Tensor) -> Tensor:
            return model(ids, use_cache=False, **options).logits

        return torch.compile(step, fullgraph=True, backend="eager")

    yield compile_with
    torch._dynamo.reset()


def test_compiled_packed_rows_with_padding_are_refused(
    compiled: Callable[..., Step], model: GptOssForCausalLM, parts: list[Tensor]
) -> None:
    with torch.no_grad():
        for padding in ({"right": 3}, {"left": 3}):
            given = row(parts, **padding)
            ids = given.pop("input_ids")
            with pytest.raises(RuntimeError, match="need cu_seq_lens_q"):
                compiled(**given)(ids)
            mask = given["attention_mask"]
            whole = {"attention_mask": mask, "position_ids": positions(mask)}
            ours, real = compiled(**whole)(ids), mask.bool()
            assert max_diff(ours[real], logits(model, ids, **whole)[real]) < TOLERANCE


def test_compiled_bounds(compiled: Callable[..., Step], parts: list[Tensor], alone: Tensor) -> None:
    ids = torch.cat(parts)[None]
    place = row(parts)["position_ids"]
    with torch.no_grad():
        ours = compiled(**both_ways(STARTS, position_ids=place))(ids)
        assert max_diff(ours[0], alone) < TOLERANCE
        with pytest.raises(RuntimeError, match="position_ids disagree"):
            compiled(**both_ways(bounds(0, 21, TOTAL), position_ids=place))(ids)
        with pytest.raises(Exception, match="need both cu_seq_lens_q and cu_seq_lens_k"):
            compiled(cu_seq_lens_q=STARTS, position_ids=place)(ids)


# ---- the attention function itself ----


def random_rows(generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """position_ids, attention_mask and numbers of sequences (padding -1) of random packed rows."""

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=generator))

    batch, length = draw(1, 4), draw(2, 40)
    number = torch.full((batch, length), -1)
    place = torch.randint(0, 3, (batch, length), generator=generator)  # of padding: anything
    for b in range(batch):
        end, column, sequence = length - draw(0, 3), draw(0, 4), 0
        while column < end:
            size = min(draw(1, 14), end - column)
            number[b, column : column + size] = sequence
            begin = 0 if sequence > 0 else draw(0, 3)
            place[b, column : column + size] = torch.arange(begin, begin + size)
            column += size + draw(0, 3) * draw(0, 2)
            sequence += 1
    return place, number >= 0, number


@pytest.mark.parametrize("seed", range(40))
def test_random_rows(seed: int) -> None:
    """Sequences of any length behind each other, padding of any length around and between them."""
    generator = torch.Generator().manual_seed(seed)
    place, is_real, number = random_rows(generator)
    (batch, length), heads = place.shape, 4
    tail, window = seed % 2 * 5, (None, 1, 4, 100)[seed // 2 % 4]  # a static cache's unused keys
    rule = masking_utils.causal_mask_function
    if window is not None:
        rule = masking_utils.sliding_window_causal_mask_function(window)
    mask = sink_attention_mask(
        batch, length, length + tail, mask_function=rule, attention_mask=is_real
    )
    q, k, v = (
        torch.randn(batch, heads, n, 8, generator=generator)
        for n in (length, length + tail, length + tail)
    )
    sinks = torch.tensor([20.0, -20.0, 1.0, -1.0])
    row, column = torch.arange(length)[:, None], torch.arange(length)
    visible = (column <= row) & (row - column < (window or length))
    visible = visible & (number[:, :, None] == number[:, None]) & is_real[:, None]
    scores = (q.double() @ k[:, :, :length].double().mT * 8**-0.5).masked_fill(
        ~visible[:, None], -torch.inf
    )
    logit = sinks.double()[None, :, None, None].expand(batch, -1, length, 1)
    weights = torch.cat([scores, logit], -1).softmax(-1)[..., :-1]
    expected = (weights @ v[:, :, :length].double()).transpose(1, 2)[is_real]
    for gradient in (False, True):
        q.requires_grad_(gradient)
        module = nn.Module()
        out, _ = sink_attention(
            module, q, k, v, mask, s_aux=sinks, position_ids=place, sliding_window=window
        )
        torch.testing.assert_close(out[is_real].double(), expected, atol=2e-6, rtol=2e-5)
        assert out.isfinite().all()


@pytest.mark.parametrize("ids", [[*range(5), *range(5)], [0] * 10], ids=["segments", "zeros"])
@pytest.mark.parametrize("padded", [None, False, True])
def test_position_ids_of_an_encoder_pack_nothing(ids: list[int], padded: bool | None) -> None:
    """Two segments of one text, as BERT has them: all see each other, in transformers' own too."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    mask = None if padded is None else torch.ones(2, 10, dtype=torch.long)
    if padded:
        mask[0, 7:] = 0
    results = []
    for name in ("sdpa", "sink_attention"):
        model.set_attn_implementation(name)
        with torch.no_grad():
            hidden = model(
                torch.arange(20).view(2, 10), position_ids=torch.tensor([ids]), attention_mask=mask
            ).last_hidden_state
        results.append(hidden if mask is None else hidden[mask.bool()])
    torch.testing.assert_close(results[1], results[0], atol=2e-5, rtol=2e-5)
