"""Random steps of PagedKVCache against a plain dictionary model (cache_model.py).

After each step: reference counts, free lists and block tables agree, rows are as short as promised,
and every key and value that a next token sees is where the table says. Some appends are followed by
attention, compared with attention to all that was ever appended.
"""

from __future__ import annotations

from collections.abc import Sequence

import cache_model
import pytest
import torch
from cache_model import CacheModel
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from sink_attention_ext import CacheStep, OutOfPages

RUNS, STEPS = 80, 40
MANY_RUNS = 600
LONGEST = 60


class PagedCacheMachine(RuleBasedStateMachine):
    model: CacheModel

    @initialize(
        windows=st.sampled_from([(-1, 5), (0, -1), (3, 3, -1), (7, 2), (-1, 11, 2, -1), (40, -1)]),
        page_size=st.integers(1, 5),
        num_pages=st.integers(6, 60),
        num_sink_tokens=st.sampled_from([0, 0, 1, 3, 6]),
    )
    def make(
        self, windows: tuple[int, ...], page_size: int, num_pages: int, num_sink_tokens: int
    ) -> None:
        self.model = CacheModel(
            windows,
            page_size=page_size,
            num_pages=num_pages,
            num_sink_tokens=num_sink_tokens,
            max_num_seqs=5,
            max_seqlen=LONGEST,
            max_num_batched_tokens=40,
        )
        self.freed: list[int] = []

    def pick(self, data: st.DataObject) -> int:
        return data.draw(st.sampled_from(sorted(self.model.tokens)))

    @precondition(lambda self: len(self.model.tokens) < 5)
    @rule()
    def allocate(self) -> None:
        self.model.allocate()

    @precondition(lambda self: self.model.tokens)
    @rule(times=st.integers(1, 12))
    def decode(self, times: int) -> None:
        """One token for every sequence, some times."""
        model = self.model
        seqs = [seq for seq, tokens in model.tokens.items() if len(tokens) + times <= LONGEST]
        for _ in range(times):
            if model.cache.can_append(seqs):
                model.append(seqs, [1] * len(seqs))
                model.check()

    @precondition(lambda self: self.model.tokens)
    @rule(data=st.data(), attend=st.booleans())
    def append(self, data: st.DataObject, attend: bool) -> None:
        model = self.model
        seqs = data.draw(st.lists(st.sampled_from(sorted(model.tokens)), min_size=1, unique=True))
        few = st.one_of(st.integers(0, 2), st.integers(0, 40 // len(seqs)))
        counts = [min(data.draw(few), LONGEST - len(model.tokens[seq])) for seq in seqs]
        free = model.cache.num_free_pages
        if not model.cache.can_append(seqs, counts):
            with pytest.raises(OutOfPages, match="nothing was changed"):
                model.cache.append(seqs, counts)
            assert model.cache.num_free_pages == free
            return
        step = model.append(seqs, counts)
        if attend and step.num_tokens > 0:
            self.attend(data, step, seqs, counts)

    def attend(
        self, data: st.DataObject, step: CacheStep, seqs: list[int], counts: list[int]
    ) -> None:
        model = self.model
        layer = data.draw(st.integers(0, len(model.windows) - 1))
        q = torch.randn(step.num_tokens, cache_model.NUM_HEADS_Q, cache_model.HEAD_DIM)
        s_aux = torch.randn(cache_model.NUM_HEADS_Q)
        out, lse = step.attend(layer, q, s_aux=s_aux, return_lse=True)
        expected, expected_lse = model.expected(layer, q, seqs, counts, s_aux)
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5)

    @precondition(lambda self: 0 < len(self.model.tokens) < 5)
    @rule(data=st.data())
    def fork(self, data: st.DataObject) -> None:
        free = self.model.cache.num_free_pages
        self.model.fork(self.pick(data))
        assert self.model.cache.num_free_pages == free

    @precondition(lambda self: self.model.tokens)
    @rule(data=st.data(), back=st.integers(0, LONGEST))
    def truncate(self, data: st.DataObject, back: int) -> None:
        seq = self.pick(data)
        length = max(0, len(self.model.tokens[seq]) - back)
        try:
            self.model.truncate(seq, length)
        except ValueError as error:
            assert "have given up pages" in str(error)
            assert length < self.model.shortest[seq]
            assert any(left >= 0 for left in self.model.windows)

    @precondition(lambda self: self.model.tokens)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        seq = self.pick(data)
        self.model.free(seq)
        self.freed.append(seq)

    @precondition(lambda self: self.freed)
    @rule(data=st.data())
    def use_what_was_freed(self, data: st.DataObject) -> None:
        seq, cache = data.draw(st.sampled_from(self.freed)), self.model.cache
        for misuse in (
            lambda: cache.free(seq),
            lambda: cache.append([*self.model.tokens, seq]),
            lambda: cache.fork(seq),
            lambda: cache.truncate(seq, 0),
            lambda: cache.seqlen(seq),
        ):
            with pytest.raises(ValueError, match=f"got {seq}, which was freed"):
                misuse()

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self) -> None:
        """When all are freed, all pages are free."""
        if hasattr(self, "model"):
            for seq in list(self.model.tokens):
                self.model.free(seq)
            assert all(s.num_used_pages == 0 for s in self.model.cache.stats().values())


def run(runs: int, phases: Sequence[Phase] = tuple(Phase)) -> None:
    run_state_machine_as_test(
        PagedCacheMachine,
        settings=settings(
            max_examples=runs,
            phases=phases,
            stateful_step_count=STEPS,
            derandomize=True,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_steps() -> None:
    run(RUNS)


@pytest.mark.slow
def test_many_random_steps() -> None:
    run(MANY_RUNS)
