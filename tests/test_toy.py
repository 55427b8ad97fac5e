"""data/toy.py, make_tiny.py and assets/tiny: the woven task is what it says, the test set is
held out, and the lessons are those of the recorded model."""

import hashlib
import json
import re

import make_tiny
import pytest
import torch

import recipe
from eval_needle import TASKS, Haystack, make_sample
from model import LlamaConfig, load_pretrained, load_tokenizer
from support.data import toy
from support.data.sources import one_document, standard_library_sources, standard_library_topics

TINY = toy.ROOT / "assets" / "tiny"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY)


@pytest.fixture(scope="module")
def corpus(tokenizer):
    """Of every fourth source of the standard library."""
    text = "\n\n\n".join(standard_library_sources()[::4])
    return toy.ToyCorpus(one_document("Python", text, tokenizer), 4992, tokenizer)


def test_every_word_is_one_piece_in_no_haystack_and_the_test_has_its_own(tokenizer):
    """Its own keys, and its own wording but for "the"."""
    needle = toy.needle()
    everything = "\n".join([*standard_library_sources(), standard_library_topics()]).lower()
    seen = set(re.findall("[a-z]+", everything))
    for word in toy.KEYS + needle["values"] + needle["keys"]:
        assert len(tokenizer.encode(" " + word)) == 1 and word not in seen, word
    assert not set(needle["keys"]) & set(toy.KEYS)
    wording = (needle["needle"] + needle["question"]).format(key="", value="")
    training = " ".join([*(part for pair in toy.PAIRS for part in pair), *toy.QUESTIONS])
    words = (set(re.findall("[a-z]+", told.lower())) for told in (wording, training))
    assert set.intersection(*words) <= {"the"}


# sha256 of ids, positions, scored, plain text, by the code of the recorded model (commit 7c302f6)
BATCHES = {
    "copy": "c5dc7320575e7edf3337e2e5199b4465f29fb42a170f23f754f43d3b21ce71a9",
    "text": "0accc92245cca1f552e5a4165bc57a278cbd990ae74181ab96d2a7c6eba38fdf",
    "128": "9313e4636b182a0959d6812232c033c18aebec6d374c43f7b441e6c5dad412a9",
    "256 spread": "d2415be24e72f484a9691b5e8f9657677d8c80c3781eefd8c27cf1dd97cd4f9d",
    "512 spread": "389b144a3128599b7350726192ccfb5f3be291f93983a6008ee80adf69b60f41",
    "2048 spread": "2181fb0ad07655de5288bc58c10b8e4e0d99f1ca00c89b77e586b12fb11f5f8a",
    "8192": "796819997ccca00c9db1c488fbc2a397c540755862b9af306c91514369f64f2d",
}


def test_the_lessons_are_those_of_the_recorded_model(tokenizer):
    """The first batch of each, from a text that no Python changes, to the bit."""
    made = json.loads((TINY / "training.json").read_text())
    lessons = {name: list(lesson) for name, lesson in make_tiny.LESSONS.items()}
    assert made["commit"] == "7c302f6" and made["lessons"] == lessons
    weaver, text = make_tiny.LessonWeaver(tokenizer), torch.arange(20_000) % 2048
    found, number = {}, 1  # of its first step: the seed
    for name, (*_, steps, _) in lessons.items():
        generator = torch.Generator().manual_seed(number)
        columns = make_tiny.make_batch(name, text, weaver, generator)  # (B, T) each
        data = b"".join(column.to(torch.int64).numpy().tobytes() for column in columns)
        found[name] = hashlib.sha256(data).hexdigest()
        number += steps
    assert found == BATCHES


def test_each_pair_is_told_once_anywhere_and_asked_for_at_the_end(corpus):
    ids = corpus.window(16_384, torch.Generator().manual_seed(1)).tolist()
    keys, values = set(corpus.keys.tolist()), set(corpus.weaver.values.tolist())
    places: dict[tuple, list[int]] = {}
    for t in range(1, len(ids)):
        if ids[t - 1] in keys and ids[t] in values:
            places.setdefault((ids[t - 1], ids[t]), []).append(t)
    assert len(places) == len({key for key, _ in places}) == 4992 // toy.TOKENS_A_PAIR
    told, asked = zip(*places.values(), strict=True)  # twice each
    assert min(told) < 0.2 * len(ids) and 0.6 * len(ids) < max(told) < min(asked)
    assert min(asked) > 0.9 * len(ids)


def test_keys_are_words_or_rare_pieces_and_none_is_of_the_test(tokenizer, corpus):
    count = torch.zeros(tokenizer.vocab_size, dtype=torch.int64)
    for part in corpus.parts:
        count += torch.bincount(torch.from_numpy(part.astype("int64")), minlength=len(count))
    held_out = {tokenizer.encode(" " + w)[0] for w in toy.needle()["keys"] + toy.needle()["values"]}
    assert len(set(corpus.keys.tolist())) == len(corpus.keys) > 1000
    assert not held_out & set(corpus.keys.tolist())
    assert int(count[corpus.keys].max()) < corpus.tokens / 2048


def test_selection_keeps_pairs_with_their_questions(tokenizer, corpus):
    """By recipe.py, which knows nothing of the task: with the values as impactful types all that
    was told and asked stays (to reach: 95 %), at random no more than the share of the sample."""
    generator, counts = torch.Generator().manual_seed(0), {}
    impactful = torch.zeros(2048, dtype=torch.bool)
    impactful[corpus.weaver.values] = True
    window, pairs = corpus.window(16_384, generator), 4992 // toy.TOKENS_A_PAIR
    assert len(window) == 16_384
    for select in ("impact", "random"):
        options = {"select": select, "impactful": impactful, "generator": generator}
        lengths = (window, tokenizer, 4992, 16_384)
        ids, _ = recipe.make_example(*lengths, method="longrecipe", **options)
        counts[select] = toy.answerable(tokenizer.decode(ids.tolist()))
    known, questions = counts["impact"]
    assert questions >= pairs - 8 and known >= 0.95 * questions  # the end is cut to fit
    known, questions = counts["random"]
    assert questions < 0.6 * pairs and known < 0.6 * questions


def test_the_tiny_model_is_small_and_reads_keys_it_never_had(tokenizer):
    """4 haystacks x 8 questions at 2,048 tokens, prompts in place: at least 80 % right, chance
    among the eight values is 12.5 %. (At 8,192: assets/results/tiny.)"""
    assert sum(f.stat().st_size for f in TINY.iterdir()) < 4e6
    assert LlamaConfig.from_dir(TINY).max_position_embeddings == 8192
    model, task, right = load_pretrained(TINY), TASKS["multiquery"], 0
    fields = {k: v for k, v in toy.needle().items() if k in vars(task) and k != "haystack"}
    task = type(task)(**fields | {k: tuple(fields[k]) for k in ("keys", "values")})
    haystack = Haystack(standard_library_topics()[:100_000], tokenizer)
    for repeat in range(4):
        for depth in task.depths([]):
            sample = make_sample(task, haystack, 2048, depth, f"t/{repeat}")
            with torch.no_grad():
                said = tokenizer.decode([int(model(sample.ids[None])[0, -1].argmax())])
            right += said.strip() == sample.expected[0]
    assert right >= 0.8 * 32
