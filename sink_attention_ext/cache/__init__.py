"""Key-value caches: the functions over them, and PagedKVCache.

fakes.py          their fake kernels, for torch.compile
functions.py      flash_attn_with_kvcache and reshape_and_cache, as users see them
attention.py      what every function that attends over a cache runs
checks.py         validation of caches, scales and new tokens
paged_cache.py    PagedKVCache; arguments.py validates what it is given
page_pool.py      which pages are free (host); page_tables.py: the block table of a group of layers
page_storage.py   the device memory of the pages
step.py           CacheStep: what a model's layers call in one forward pass
sequence_ids.py   ids of sequences; journal.py: an interrupted change is done again
"""
