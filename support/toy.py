"""The toy task: sentences that pair two words, woven into long text, and questions about them.

A tiny model can learn to answer them on two CPU cores in minutes, so they show there what a needle
test shows on a real model. Keys and wordings of the test (assets/tiny/needle.json) are held out
from every pair sentence of the training; the 64 values are the same. None of the words occurs in
the Python standard library."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from support.standard_library import SEPARATOR, standard_library_sources
from support.text import Corpus, Tokens

# the embedded model: what the commands take where no --model is given
TINY = os.path.relpath(Path(__file__).resolve().parent.parent / "assets" / "tiny")

KEYS = """
acacia alder amber anvil badger beaver birch bison blanket bronze butter candle canyon cavern
cheese copper coral easel eel egret falcon fiddle finch flute fox gecko goat hammer heather iguana
jacket jade jaguar jungle kettle kimono kiwi lantern larch lemon lilac lily llama magpie mango
maple meadow mitten mole moose nettle newt ocean onion opal osprey otter owl panda papaya piano
pony poppy potato puma pumpkin quartz quilt rabbit raisin raven river ruby sapphire spruce summit
tiger tundra turnip urchin vanilla velvet violin vulture walrus wheat whistle willow
""".split()
VALUES = """
basket camel cedar celery chimney clover crane desert dingo drum fern garlic glacier goblet guitar
harbor harp heron honey hyena iris ivory jackal ladder lagoon lemur lentil linden lotus melon moss
myrtle napkin oboe olive onyx parsley pearl pepper plum poplar prairie quince ribbon rocket rose
saddle shark silver swan tapir toad topaz trumpet valley viper volcano wagon walnut weasel wombat
yak yogurt zither
""".split()
TEST_KEYS = """
almond barley bread carpet carrot cherry daisy ferret ginger goose grape hamster hare hazel ibis
island juniper koala lark laurel marble narwhal oak ocelot pear pigeon pillow quail radish saffron
salmon sandal spinach stoat thistle tomato trout tulip wolf zebra
""".split()
PAIRS = (  # before and after the two words
    ("\nNote the pair", " and so on.\n"),
    ("\nRemember:", ".\n"),
    ("\nIn the list,", " go together.\n"),
    ("\n# match", ".\n"),
    ("\nWe read that", " belong to each other.\n"),
)
QUESTIONS = ("\nAsked for the pair", "\nIn the list,", "\nRemember:", "\n# match")
NEEDLE = {  # the test: becomes assets/tiny/needle.json
    "task": "multiquery",
    "ask": "each",  # in turn: all in one answer is more than a tiny model can give
    "needles": 8,
    "n": 4,
    "n_beyond": 1,
    "haystack": "python-reference",
    "intro": "",
    "needle": "The secret couple is {key} {value}, do not forget it.",
    "question": "\nWhat is the secret couple? It is {key}",
    "answer": "",
    "keys": TEST_KEYS,
    "values": VALUES,
}
TEXT, WOVEN, SCORED = range(3)  # role of a token of a toy sample
SPOT = 1 / 256  # copies of a pair stand within this share of the text: far from its question alike


class Weaver:
    """Builds toy samples in token space."""

    def __init__(self, tokenizer):
        def encode(text: str) -> Tensor:
            return torch.tensor(tokenizer.encode(text))

        self.keys, self.values, held_out = (
            torch.tensor([tokenizer.encode(" " + word) for word in words])[:, 0]
            for words in (KEYS, VALUES, TEST_KEYS)
        )
        self.pairs = [(encode(before), encode(after)) for before, after in PAIRS]
        self.questions = [encode(question) for question in QUESTIONS]
        self.pieces = torch.arange(tokenizer.vocab_size)
        self.other = self.pieces[~torch.isin(self.pieces, held_out)]

    def weave(
        self,
        draw: Callable[[int], Tensor],
        tokens: int,
        pairs: int,
        generator: torch.Generator,
        *,
        copies: int = 1,
        any_piece: float = 0.0,
        blocks: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """(ids (tokens,), role (tokens,)): `pairs` pair sentences at random places of the text
        draw(n) -> (n,), each `copies` times close together, and a question for each at the end.

        any_piece: share of the pairs whose words are any pieces of the vocabulary (no test key).
        blocks: runs of random pieces that occur twice. SCORED are the second word of a question
        and the repeated pieces: what can be known from far before."""

        def integer(high: int) -> int:
            return int(torch.randint(high, (1,), generator=generator))

        def pick(table: Tensor, n: int) -> Tensor:
            return table[torch.randperm(len(table), generator=generator)[:n]]

        words = pairs - int(any_piece * pairs)
        keys = torch.cat((pick(self.keys, words), pick(self.other, pairs - words)))
        chosen = torch.randint(len(self.values), (words,), generator=generator)
        values = torch.cat((self.values[chosen], pick(self.other, pairs - words)))
        inserts: list[tuple[float, Tensor, int]] = []  # place in 0..1, ids, how many are scored
        for pair in torch.stack((keys, values), dim=1):
            spot = (1 - SPOT) * float(torch.rand(1, generator=generator))
            for offset in torch.rand(copies, generator=generator).tolist():
                before, after = self.pairs[integer(len(self.pairs))]
                inserts.append((spot + SPOT * offset, torch.cat((before, pair, after)), 0))
        for i in torch.randperm(len(keys), generator=generator).tolist():
            question = self.questions[integer(len(self.questions))]
            ids = torch.cat((question, keys[i : i + 1], values[i : i + 1]))
            inserts.append((1.0, ids, 1))
        for _ in range(blocks):
            block = pick(self.pieces, 6 + integer(11))
            first, second = torch.rand(2, generator=generator).sort().values.tolist()
            inserts += [(first, block, 0), (second, block, len(block) - 1)]
        inserts.sort(key=lambda insert: insert[0])
        room = tokens - sum(len(ids) for _, ids, _ in inserts)
        if room < 0:
            raise ValueError(f"{tokens} tokens are too few for the toy's pairs (--train_len)")
        text = draw(room)
        out, role, done = [], [], 0
        for place, ids, known in inserts:
            here = int(place * len(text))
            out += [text[done:here], ids]
            role += [(TEXT, here - done), (WOVEN, len(ids) - known), (SCORED, known)]
            done = here
        out.append(text[done:])
        role.append((TEXT, len(text) - done))
        return torch.cat(out), torch.cat([torch.full((n,), kind) for kind, n in role])


class ToyCorpus(Corpus):
    """A corpus whose windows have the toy task woven in: one pair and question per 128 tokens of
    the sample, at most 88. Windows longer than the sample repeat each pair, so that selection can
    drop some."""

    def __init__(self, tokens: Tokens, min_tokens: int, tokenizer, copies: int = 5):
        super().__init__(tokens, min_tokens)
        self.sample_tokens, self.copies, self.weaver = min_tokens, copies, Weaver(tokenizer)
        self.tokenizer, self.known, self.questions = tokenizer, 0, 0

    def window(self, tokens: int, generator: torch.Generator) -> Tensor:
        ids, _ = self.weaver.weave(
            lambda n: super(ToyCorpus, self).window(n, generator),
            tokens,
            max(1, min(len(KEYS), self.sample_tokens // 128)),
            generator,
            copies=self.copies if tokens > self.sample_tokens else 1,
        )
        return ids

    def look_at(self, sample: Tensor) -> None:
        known, questions = answerable(self.tokenizer.decode(sample.tolist()))
        self.known, self.questions = self.known + known, self.questions + questions

    def remark(self) -> str:
        known, questions = self.known, self.questions
        self.known = self.questions = 0
        if questions == 0:
            return ""
        return f"the pair was kept for {known / questions:.1%} of the {questions} questions kept"


def load_toy_text(tokenizer) -> Tokens:
    """Python sources only: the language reference is what the toy is tested on."""
    tokens = Tokens("the sources of the Python standard library, with word pairs woven in")
    tokens.add_texts([[SEPARATOR.join(standard_library_sources())]], tokenizer)
    return tokens


def answerable(text: str) -> tuple[int, int]:
    """(questions whose pair stands before them, questions) in the text of a sample.

    >>> answerable("\\n# match owl yak.\\n\\nRemember: owl yak\\nRemember: fox yak")
    (1, 2)
    """
    # subtle: without the line break before them, which belongs to a segment that may be gone
    befores = "|".join(re.escape(b.strip()) for b in [before for before, _ in PAIRS] + [*QUESTIONS])
    afters = "|".join(re.escape(after.strip("\n")) for _, after in PAIRS)
    seen, known, questions = set(), 0, 0
    for key, value, after in re.findall(f"(?:{befores}) (\\w+) (\\w+)({afters})?", text):
        if after:
            seen.add((key, value))
        else:
            questions += 1
            known += (key, value) in seen
    return known, questions
