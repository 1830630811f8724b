"""PagedKVCache pickled, copied and loaded, here and elsewhere: its sequences stay its own."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache_model import CacheModel

from sink_attention_ext import PagedKVCache
from sink_attention_ext.cache import sequence_ids

LOADED = """
import pickle, sys
from pathlib import Path
model = pickle.loads(Path(sys.argv[1]).read_bytes())
old = list(model.tokens)
model.check()
new = [model.allocate() for _ in range(3)]
assert not {*old} & {*new}, (old, new)
model.check()
model.append([*old, *new], [2, 1, 3, 4, 1])
model.check()
model.free(old[0])
assert model.allocate() not in old
model.check()
Path(sys.argv[1]).write_bytes(pickle.dumps((model, new)))
"""


def made() -> CacheModel:
    model = CacheModel(max_num_seqs=8)
    a, b = model.allocate(), model.allocate()
    model.append([a, b], [9, 6])
    return model


def grows(model: CacheModel) -> None:
    old = list(model.tokens)
    new = model.allocate()
    model.append([*old, new], [3] * len(old) + [5])
    model.check()


def test_in_a_new_process(tmp_path: Path) -> None:
    """And back again: the ids of neither process are those of the other."""
    model, path = made(), tmp_path / "cache"
    path.write_bytes(pickle.dumps(model))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    subprocess.run([sys.executable, "-c", LOADED, path], check=True, env=environment)
    back, new = pickle.loads(path.read_bytes())
    back.check()
    grows(back)
    for seq in new:  # unknown to the cache that was stored
        with pytest.raises(ValueError, match="seq_id must be a sequence of this cache"):
            model.cache.seqlen(seq)
    grows(model)
    assert len({*model.tokens, *back.tokens}) == len(model.tokens) + len(back.tokens) - 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_grow_apart(copied) -> None:
    model = made()
    copies = [copied(model) for _ in range(3)]
    old = set(model.tokens)
    for copy_ in (*copies, model):
        assert set(copy_.tokens) == old
        grows(copy_)
    added = [set(copy_.tokens) - old for copy_ in (*copies, model)]
    assert len(set.union(*added)) == 4
    with pytest.raises(ValueError, match="seq_id must be a sequence of this cache"):
        model.cache.append([*added[0]], 1)


def test_a_step_stays_with_its_cache() -> None:
    model = made()
    seq = next(iter(model.tokens))
    step = model.append([seq], [1], write=False)
    cache, stored = copy.deepcopy((model.cache, step))
    new = model.new_kv(0, [seq], [1])
    with pytest.raises(RuntimeError, match="this step has ended"):
        stored.write(0, *new)
    for layer in range(2):
        step.write(layer, *model.new_kv(layer, [seq], [1]))
    model.check()
    assert not torch.equal(cache.k_cache(0), model.cache.k_cache(0))


def test_a_shallow_copy_is_refused() -> None:
    with pytest.raises(TypeError, match="use copy.deepcopy"):
        copy.copy(made().cache)


def test_loaded_in_inference_mode_and_used_outside() -> None:
    stored = pickle.dumps(made())
    with torch.inference_mode():
        model = pickle.loads(stored)
    grows(model)
    with torch.inference_mode():
        grows(model)


def test_loaded_under_another_default_device() -> None:
    stored = pickle.dumps(made())
    with torch.device("meta"):
        model = pickle.loads(stored)
    grows(model)


def test_an_interrupted_change_is_stored_whole() -> None:
    model = made()
    cache: PagedKVCache = model.cache
    failures = [MemoryError()]

    def action() -> None:
        if failures:
            raise failures.pop()

    with pytest.raises(MemoryError):
        cache._journal.change(action)
    model.cache = pickle.loads(pickle.dumps(cache))
    grows(model)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_draws_ids_of_its_own() -> None:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(writer, str(sequence_ids.new_id()).encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert abs(int(os.read(reader, 100)) - sequence_ids.new_id()) > 1000
    os.close(reader)
    os.close(writer)
