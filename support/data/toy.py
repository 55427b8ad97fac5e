"""The toy task: pairs of words told in the midst of long text, and asked for at its end.

A tiny model can learn to answer them on two CPU cores in minutes, so they show there what a needle
test shows on a real model. No word of it is in the Python standard library. The test itself is
assets/tiny/needle.json: its keys and wordings are in no pair of the training, its values are the
same."""

import functools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from support.data.text import Corpus, Tokens
from support.system.bad_input import BadInput

ROOT = Path(__file__).resolve().parents[2]
# the embedded model: what the commands take where no --model is given
TINY = os.path.relpath(ROOT / "assets" / "tiny")

KEYS = """
acacia alder amber anvil badger beaver birch bison blanket bronze butter candle canyon cavern
cheese copper coral easel eel egret falcon fiddle finch flute fox gecko goat hammer heather iguana
jacket jade jaguar jungle kettle kimono kiwi lantern larch lemon lilac lily llama magpie mango
maple meadow mitten mole moose nettle newt ocean onion opal osprey otter owl panda papaya piano
pony poppy potato puma pumpkin quartz quilt rabbit raisin raven river ruby sapphire spruce summit
tiger tundra turnip urchin vanilla velvet violin vulture walrus wheat whistle willow
""".split()
# Of these wordings the lessons of assets/tiny had the first five and four (studies/make_tiny.py).
PAIRS = (  # before and after the two words
    ("\nNote the pair", " and so on.\n"),
    ("\nRemember:", ".\n"),
    ("\nIn the list,", " go together.\n"),
    ("\n# match", ".\n"),
    ("\nWe read that", " belong to each other.\n"),
    ("\nKeep in mind:", " for later.\n"),
    ("\nA table has", " as rows.\n"),
    ("\nHere we find", ".\n"),
)
QUESTIONS = (
    "\nAsked for the pair",
    "\nIn the list,",
    "\nRemember:",
    "\n# match",
    "\nAgain:",
    "\nThe table has",
    "\nSo we find",
)
PAIRS_A_LINE, TOKENS_A_PAIR = 8, 28  # of a ToyCorpus: dense, because steps are few
RARE = 1 / 2048  # a piece rarer than this in the text can be a key


@functools.cache
def needle() -> dict:
    """The test as assets/tiny/needle.json has it, with its "keys" and "values"."""
    return json.loads((ROOT / "assets" / "tiny" / "needle.json").read_text(encoding="utf-8"))


class Weaver:
    """The words and sentences of toy samples as ids."""

    def __init__(self, tokenizer):
        def encode(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text))

        self.keys, self.values = (
            torch.tensor([tokenizer.encode(" " + word) for word in words])[:, 0]
            for words in (KEYS, needle()["values"])
        )
        self.pairs = [(encode(before), encode(after)) for before, after in PAIRS]
        self.questions = [encode(question) for question in QUESTIONS]
        self.comma = encode(",")


Insert = tuple[float, Tensor]  # place in 0..1 of the text, ids


def insert(draw: Callable[[int], Tensor], tokens: int, inserts: list[Insert]) -> Tensor:
    """ids (tokens,): the text draw(n) -> (n,) with all inserts in their places."""
    inserts = sorted(inserts, key=lambda one: one[0])
    room = tokens - sum(len(ids) for _, ids in inserts)
    if room < 0:
        raise BadInput(f"{tokens} tokens are too few for toy pairs (--train_len, --replay_len)")
    text = draw(room)
    out, done = [], 0
    for place, ids in inserts:
        here = int(place * len(text))
        out += [text[done:here], ids]
        done = here
    return torch.cat([*out, text[done:]])


def integer(high: int, generator: torch.Generator) -> int:
    return int(torch.randint(high, (1,), generator=generator))


def pick(table: Tensor, n: int, generator: torch.Generator) -> Tensor:
    return table[torch.randperm(len(table), generator=generator)[:n]]


class ToyCorpus(Corpus):
    """A corpus whose windows have the toy task woven in: a pair per 28 tokens of the sample, as far
    as there are keys: the words, and pieces made of letters and rare in the text (" hone", the
    start of " honey"), so that matching is learnt and not some keys (LOG.md)."""

    def __init__(self, tokens: Tokens, min_tokens: int, tokenizer):
        super().__init__(tokens, min_tokens)
        self.weaver = Weaver(tokenizer)
        n = tokenizer.vocab_size
        count = sum(np.bincount(part, minlength=n) for part in self.parts)
        words = {
            tokenizer.encode(" " + word)[0] for word in KEYS + needle()["values"] + needle()["keys"]
        }
        rare = [
            i
            for i in range(n)
            if count[i] < RARE * self.tokens
            and i not in words
            and re.fullmatch(" ?[a-zA-Z]{2,}", tokenizer.decode([i]))
        ]
        self.keys = torch.cat((self.weaver.keys, torch.tensor(rare, dtype=torch.int64)))
        self.pairs = max(1, min(len(self.keys), min_tokens // TOKENS_A_PAIR))  # of one window

    def window(self, tokens: int, generator: torch.Generator) -> Tensor:
        """ids (tokens,): some keys with a value each, eight pairs to a line, the lines at random
        places of a window of the text; at its end the same pairs in other lines.

        Each pair is told once: where copies are between a pair and its question, the near one is
        taken, and the distance is not learnt (LOG.md)."""
        weaver, keys = self.weaver, pick(self.keys, self.pairs, generator)
        chosen = torch.randint(len(weaver.values), (len(keys),), generator=generator)
        pairs = torch.stack((keys, weaver.values[chosen]), dim=1)
        inserts: list[Insert] = []
        for asked in (False, True):
            for line in torch.randperm(len(keys), generator=generator).split(PAIRS_A_LINE):
                before, after = weaver.pairs[integer(len(weaver.pairs), generator)]
                place = float(torch.rand(1, generator=generator))
                if asked:
                    place, after = 1.0, weaver.comma[:0]
                    before = weaver.questions[integer(len(weaver.questions), generator)]
                listed = torch.cat([torch.cat((pairs[i], weaver.comma)) for i in line])[:-1]
                inserts.append((place, torch.cat((before, listed, after))))
        return insert(lambda n: super(ToyCorpus, self).window(n, generator), tokens, inserts)


def answerable(text: str) -> tuple[int, int]:
    """(pairs asked for that were told before, pairs asked for) in the text of a sample.

    >>> answerable("\\n# match owl yak, fox harp.\\n\\nRemember: owl yak, elk harp\\n")
    (1, 2)
    """
    # subtle: without the line break before them, which belongs to a segment that may be gone
    heads = "|".join(re.escape(b.strip()) for b in [before for before, _ in PAIRS] + [*QUESTIONS])
    told, known, questions = set(), 0, 0
    for line in re.split(f"\n|{heads}", text):
        pairs = [p for p in re.findall(r"(\w+) (\w+)", line) if p[1] in needle()["values"]]
        if "." in line:  # pairs are told with a full stop, asked without
            told.update(pairs)
        else:
            questions += len(pairs)
            known += sum(pair in told for pair in pairs)
    return known, questions
