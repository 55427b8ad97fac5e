"""support/toy.py and assets/tiny: the woven task is what it says, and the test set is held out."""

import json
import re
from pathlib import Path

import pytest
import torch

import recipe
from eval_needle import TASKS, Haystack, make_sample
from model import LlamaConfig, load_pretrained, load_tokenizer
from support import toy
from support.standard_library import standard_library_sources, standard_library_topics

TINY = Path(__file__).resolve().parent.parent / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def text(tokenizer):
    return torch.tensor(tokenizer.encode("".join(standard_library_sources()[:20])))


def draw_from(text):
    return lambda n: text[:n]


def test_every_word_is_one_piece_and_in_no_haystack(tokenizer):
    everything = "\n".join([*standard_library_sources(), standard_library_topics()]).lower()
    seen = set(re.findall("[a-z]+", everything))
    for word in toy.KEYS + toy.VALUES + toy.TEST_KEYS:
        assert len(tokenizer.encode(" " + word)) == 1 and word not in seen, word


def test_the_test_has_its_own_keys_and_wording():
    needle = json.loads((TINY / "needle.json").read_text())
    assert needle == toy.NEEDLE
    assert not set(needle["keys"]) & set(toy.KEYS)
    wording = (needle["needle"] + needle["question"]).format(key="", value="")
    training = " ".join([before + after for before, after in toy.PAIRS] + [*toy.QUESTIONS])
    shared = set(re.findall("[a-z]+", wording.lower())) & set(
        re.findall("[a-z]+", training.lower())
    )
    assert shared <= {"the"}, shared


@pytest.mark.parametrize("copies", [1, 4])
def test_what_is_scored_can_be_looked_up(tokenizer, text, copies):
    """Slow twin: each scored token has its bigram somewhere before; all else stays in place."""
    weaver = toy.Weaver(tokenizer)
    generator = torch.Generator().manual_seed(0)
    options = {"copies": copies, "any_piece": 0.25, "blocks": 3}
    ids, role = weaver.weave(draw_from(text), 3000, 24, generator, **options)
    assert len(ids) == len(role) == 3000
    plain = ids[role == toy.TEXT]
    assert torch.equal(plain, text[: len(plain)])  # the text itself, in order, nothing lost
    pairs = list(zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True))
    scored = (role == toy.SCORED).nonzero()[:, 0].tolist()
    assert len(scored) >= 24 + 3 * 5
    for t in scored:
        assert pairs[t - 1] in pairs[: t - 1]
    held_out = {tokenizer.encode(" " + w)[0] for w in toy.TEST_KEYS}
    no_blocks, role = weaver.weave(draw_from(text), 3000, 24, generator, any_piece=0.5)
    assert not held_out & set(no_blocks[role != toy.TEXT].tolist())


def test_copies_of_a_pair_stand_close_together(tokenizer, text):
    """Far from its question alike, so that a copy is no short cut."""
    weaver, tokens = toy.Weaver(tokenizer), 20_000
    options = {"copies": 6}
    ids, _ = weaver.weave(
        lambda n: text.repeat(4)[:n], tokens, 10, torch.Generator().manual_seed(1), **options
    )
    keys = set(weaver.keys.tolist())
    places: dict[int, list[int]] = {}
    for t, token in enumerate(ids.tolist()):
        if token in keys:
            places.setdefault(token, []).append(t)
    assert len(places) == 10
    for where in places.values():
        *copies, question = where
        assert len(copies) == 6 and question > 0.97 * tokens
        assert copies[-1] - copies[0] < tokens * toy.SPOT + 60 * 12


def test_selection_keeps_pairs_with_their_questions(tokenizer):
    """By recipe.py, which knows nothing of the task: with the words as impactful types nearly
    every kept question has its pair (to reach: 95 %), at random fewer questions are kept."""
    corpus = toy.ToyCorpus(toy.load_toy_text(tokenizer), 4992, tokenizer)
    generator = torch.Generator().manual_seed(0)
    impactful = torch.zeros(2048, dtype=torch.bool)
    impactful[torch.cat((corpus.weaver.keys, corpus.weaver.values))] = True
    counts = {}
    for select in ("impact", "random"):
        window = corpus.window(16_384, generator)
        assert len(window) == 16_384
        ids, _ = recipe.make_example(
            window,
            tokenizer,
            4992,
            16_384,
            method="longrecipe",
            select=select,
            impactful=impactful,
            generator=generator,
        )
        counts[select] = toy.answerable(tokenizer.decode(ids.tolist()))
    known, questions = counts["impact"]
    assert 36 <= questions <= 39 and known >= 0.95 * questions  # the end is cut to fit
    assert counts["random"][1] < 25


def test_the_tiny_model_is_small_and_reads_keys_it_never_had(tokenizer):
    """4 haystacks x 8 questions at 2,048 tokens, prompts in place: at least 80 % right, chance
    among the eight values is 12.5 %. (At 8,192: assets/results/tiny.)"""
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 4e6
    assert LlamaConfig.from_dir(TINY).max_position_embeddings == 8192
    model = load_pretrained(TINY)
    task = TASKS["multiquery"]
    fields = {k: v for k, v in toy.NEEDLE.items() if k in vars(task) and k != "haystack"}
    words = {k: tuple(fields[k]) for k in ("keys", "values")}
    task = type(task)(**fields | words)
    haystack = Haystack(standard_library_topics()[:100_000], tokenizer)
    right = 0
    for repeat in range(4):
        for depth in task.depths([]):
            sample = make_sample(task, haystack, 2048, depth, f"t/{repeat}")
            with torch.no_grad():
                said = tokenizer.decode([int(model(sample.ids[None])[0, -1].argmax())])
            right += said.strip() == sample.expected[0]
    assert right >= 0.8 * 32
