"""What an evaluation will cost, said before it starts: memory of the cache, and time."""

import time

import torch

from support.memory.count import forward_flops
from support.memory.kernels import in_words
from support.system.console import duration, log

DECODE = 16  # a generated token costs about as much time as so many of a prompt, on a CPU


def kv_cache_bytes(config, tokens: int, dtype: torch.dtype) -> int:
    """Keys and values of all layers.

    >>> from support.memory.count import LLAMA3_8B
    >>> kv_cache_bytes(LLAMA3_8B, 131_072, torch.bfloat16) / 2**30  # GiB
    16.0
    """
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return per_token * tokens * dtype.itemsize


def prompt_flops(config, begin: int, end: int, answer_tokens: int) -> float:
    """FLOPs of a prompt of `end` tokens whose first `begin` are in the cache, and of its answer."""
    answer = answer_tokens * forward_flops(config, end, end + 1) * DECODE
    return forward_flops(config, begin, end) + answer


def announce(source: str, haystack, candidates: list, missing: list[dict], settings) -> None:
    """The haystack, the largest cache, and how much there is to do."""
    longest, dtype = settings.lengths[-1], getattr(torch, settings.dtype.removeprefix("torch."))
    n, sentences = len(haystack.ids), len(haystack.starts)
    log(f"haystack: {source}, {n:,} tokens, {sentences:,} {haystack.at}")
    if haystack.at != "sentences":
        log(f"warning: hardly any sentence ends in it, so needles go between {haystack.at}")
    if n < longest:
        log(f"warning: shorter than --lengths {longest}, so it repeats (--haystack)")
    cache = max(kv_cache_bytes(c.config, longest, dtype) for c in candidates) / 2**30
    log(f"key-value cache at {longest:,} tokens: {cache:.2f} GiB ({str(dtype)[6:]})")
    if torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] / 2**30
        log(f"free on the GPU: {free:.1f} GiB, for weights and cache; attention: {in_words()}")
    tokens = sum(asked["length"] for asked in missing)
    log(f"to do: {len(missing):,} prompts of {tokens:,} tokens together")


LAYOUT = "{desc}{percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # of the progress bar


def tell_time(work: float, config, prefill, longest: int) -> None:
    """Log how long `work` FLOPs may take, from the speed of reading a prompt: of 256 tokens, 512,
    and so on up to `longest`, until one takes 0.3 s. (With a small model, short prompts measure the
    overhead of a call.)"""
    tokens, seconds = min(256, longest), 0.0
    prefill(torch.zeros(tokens, dtype=torch.int64))  # warms up
    while seconds < 0.3 and tokens <= longest:
        ids = torch.arange(tokens) % config.vocab_size
        started = time.monotonic()
        prefill(ids)
        seconds, read, tokens = time.monotonic() - started, tokens, 2 * tokens
    speed = forward_flops(config, 0, read) / seconds
    so = f"so all may take {duration(work / speed)}"
    log(f"{read:,} tokens are read at {speed / 1e9:,.0f} GFLOP/s, {so}")
