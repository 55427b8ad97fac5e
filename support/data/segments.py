"""Where sentences end, for recipe.split_segments and for the places of needles; and which tokens
hold a digit."""

import functools

import numpy as np
import torch
from torch import Tensor

from support.system.console import log

STOPS = ".!?…"  # end a sentence if white space follows: 3.14 and os.path stay whole
# End a sentence whatever follows. Chinese and Japanese, full and half width; danda and double danda
# (Hindi, Bengali and other scripts of India); Arabic and Urdu; Armenian; Ethiopic; Khmer; Burmese.
WIDE_STOPS = "。！？．｡" + "।॥" + "؟۔" + "։" + "።፧፨" + "។៕" + "။"
CLOSERS = "\"')]}”’»」』）】》｣"
RARE = 2000  # characters for each end of a segment: with fewer ends, spaces part segments too
SPACES = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


say_once = functools.cache(log)


@functools.lru_cache(maxsize=4)
def _vocabulary_bytes(tokenizer) -> tuple[np.ndarray, np.ndarray]:
    """All tokens' bytes in one array, and where each token begins in it: made once."""
    table = [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]
    begin = np.cumsum([0] + [len(t) for t in table])
    return np.frombuffer(b"".join(table), dtype=np.uint8), begin


def split_segments(ids: Tensor, tokenizer, at_spaces: bool | None = None) -> Tensor:
    """Where sentences begin: see recipe.split_segments. Arrays of all bytes and all characters
    instead of a loop."""
    if len(ids) == 0:
        raise ValueError("cannot split an empty sample into segments")
    flat, begin = _vocabulary_bytes(tokenizer)
    token = ids.numpy()
    size = begin[token + 1] - begin[token]  # bytes of each token
    token_begin = np.cumsum(size) - size  # byte offset of each token in this text
    raw = flat[np.repeat(begin[token] - token_begin, size) + np.arange(size.sum())]
    # subtle: bytes that are no UTF-8 (a sample may begin inside a character) become one code
    # point each, so that code points can still be mapped back to bytes.
    text = raw.tobytes().decode("utf-8", errors="surrogateescape")
    char = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype="<u4")
    escaped = (char >= 0xDC80) & (char <= 0xDCFF)
    width = np.where(escaped, 1, 1 + (char >= 0x80) + (char >= 0x800) + (char >= 0x10000))

    def one_of(characters: str) -> np.ndarray:
        return np.isin(char, [ord(c) for c in characters])

    def latest(where: np.ndarray) -> np.ndarray:  # index of the last True so far
        return np.maximum.accumulate(np.where(where, np.arange(len(char)), -1))

    stop, wide, closer, space = map(one_of, (STOPS, WIDE_STOPS, CLOSERS, SPACES))
    space_next = np.append(space[1:], True)  # the end of the text counts as white space
    run = stop | wide | closer  # stops and closing quotes that follow one another: ?!")
    run_ends, before_run = run & ~np.append(run[1:], False), latest(~run)
    # [E5] seg(S): disjoint runs whose union is S, in order; an end is after character i where
    ends = (char == ord("\n")) | (run_ends & (latest(wide) > before_run))
    ends |= run_ends & (latest(stop) > before_run) & space_next
    if at_spaces or (at_spaces is None and ends.sum() * RARE < len(char)):
        say_once("a text with hardly any sentence end (. ! ? or line break): split at its spaces")
        ends |= space_next & ~space
    end_byte = np.cumsum(width)[ends]
    starts = np.unique(np.append(0, np.searchsorted(token_begin, end_byte)))
    return torch.from_numpy(starts[starts < len(token)])


def rarely_ends(ids: Tensor, tokenizer) -> bool:
    """Whether a text (T,) has fewer than one segment end in RARE characters."""
    ends = len(split_segments(ids, tokenizer, at_spaces=False)) - 1
    return ends * RARE < len(tokenizer.decode(ids.tolist()))


@functools.lru_cache(maxsize=4)
def digit_types(tokenizer) -> Tensor:
    """Token types that hold a digit, bool (V,): what the released code selects by."""
    return torch.tensor(
        [any(48 <= b <= 57 for b in tokenizer.token_bytes(i)) for i in range(tokenizer.vocab_size)]
    )
