"""eval_needle.py: exact prompts, scores by hand, shared prefixes, results that survive a kill."""

import dataclasses
import hashlib
import json
import random
import re
import shutil
from collections import Counter

import pytest
import torch
from conftest import PROSE, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

import eval_needle
from eval_needle import (
    TASKS,
    Haystack,
    SharedPrefix,
    common_prefix,
    make_sample,
    score,
    text_loss,
)
from model import BadInput, LlamaConfig, generate, load_pretrained, load_tokenizer, save_pretrained
from support.memory.count import forward_flops, training_flops
from support.needles.cost import kv_cache_bytes
from support.needles.figures import draw_curves, draw_heatmap
from support.needles.haystack import CITIES, Hidden, load_haystack
from support.needles.intervals import paired, resampled, student, wilson
from support.needles.results import KEY, Results
from support.needles.summary import gain, gains, summarise, versus


@pytest.fixture(scope="module")
def haystack(toy_dir):
    return Haystack(PROSE, load_tokenizer(toy_dir))


@pytest.fixture(scope="module")
def real_haystack(smollm2_dir, essays_dir):
    text = "\n\n".join(p.read_text() for p in sorted(essays_dir.glob("*.txt")))
    return Haystack(text, load_tokenizer(smollm2_dir))


# ---- prompts -----------------------------------------------------------------------------------


@given(
    st.sampled_from(sorted(TASKS)),
    st.integers(700, 30_000),
    st.sampled_from([0.0, 0.333, 0.5, 1.0]),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_prompts_are_exact(haystack, name, length, depth, seed):
    """[E11] Prompt and answer budget are `length` tokens; also where the haystack has to repeat.
    Keys and values are in their needles and nowhere else."""
    task = TASKS[name]
    length = max(length, 6000) if name == "common_words" else length
    sample = make_sample(task, haystack, length, depth, f"{seed}")
    assert len(sample.ids) + sample.answer_tokens == length
    decode = haystack.tokenizer.decode
    text, asked = decode(sample.ids.tolist()), task.asked(depth)
    prompts = eval_needle.make_prompts(task, haystack, length, f"{seed}")
    needles = [decode(ids).strip() for ids, _ in prompts.needles]
    assert all(text.count(needle) == 1 for needle in needles)
    assert text.endswith(decode(prompts.questions[asked]))
    assert len(sample.true_depths) == len(needles) == task.needles
    for answer in sample.expected:
        inside = sum(needle.count(answer) for needle in needles)
        assert not needles or text.count(answer) == inside > 0
    if not needles:
        return
    if task.ask == "each":  # the needle of the part that holds `depth`
        part, n = min(int(depth * task.needles), task.needles - 1), task.needles
        assert part / n - 0.02 < sample.true_depth < (part + 1) / n or length < 3000
        return
    assert sample.true_depth <= depth
    if depth == 0.0:
        assert sample.true_depth == 0.0
    if length > 3000:
        assert depth - sample.true_depth < 0.02


def test_each_needle_is_asked_for_after_the_same_text(haystack):
    task = dataclasses.replace(TASKS["needles_8"], needles=4)
    depths = task.depths([0.0, 1.0])
    assert depths == [0.125, 0.375, 0.625, 0.875]
    samples = [make_sample(task, haystack, 4000, d, "s") for d in depths]
    assert len({s.expected[0] for s in samples}) == 4
    assert [s.true_depth for s in samples] == sorted({s.true_depth for s in samples})
    texts = [haystack.tokenizer.decode(s.ids.tolist()) for s in samples]
    for text, sample in zip(texts, samples, strict=True):
        asked = text.rsplit(" is:", 1)[0].rsplit(" for ", 1)[1]
        assert f"numbers for {asked} is: {sample.expected[0]}." in text
    shared = min(common_prefix(samples[0].ids, s.ids) for s in samples[1:])
    assert shared > 3800  # one prefill for all four


def test_several_keys_are_asked_for_in_one_question(haystack):
    texts = {}
    for name in ("multiquery", "multivalue"):
        sample = make_sample(TASKS[name], haystack, 2000, 0.5, "s")
        assert len(set(sample.expected)) == 4 and len(sample.true_depths) == 4
        texts[name] = haystack.tokenizer.decode(sample.ids.tolist()).rsplit("\n\n", 1)[1]
    assert re.search(r"numbers for (\w+ ?\w+, ){3}and \w+ are:$", texts["multiquery"])
    assert re.search(r"numbers for \w+ are:$", texts["multivalue"])


def test_a_key_that_the_haystack_holds_is_drawn_again(toy_dir):
    task = dataclasses.replace(TASKS["niah_single"], keys=("Ada", "Bob", "Zoe"))
    stack = Haystack(PROSE, load_tokenizer(toy_dir))
    for seed in range(6):  # Ada and Bob are in the story
        ids = make_sample(task, stack, 900, 0.5, f"{seed}").ids.tolist()
        assert stack.tokenizer.decode(ids).endswith("number for Zoe is:")
    none_left = dataclasses.replace(task, keys=("Ada", "Bob"))
    with pytest.raises(ValueError, match="the haystack holds all but 0 of the needles' 1 words"):
        make_sample(none_left, stack, 900, 0.5, "0")


def test_controls_leave_out_the_needles_or_all_but_the_needle(haystack):
    """Without needles a prompt is as long as with them; alone, what is asked for is in a short
    text, and what is not asked for is in none."""
    for name in TASKS.keys() - {"common_words"}:
        task = TASKS[name]
        whole, without, alone = (
            make_sample(task, haystack, 1500, 0.4, "s", control)
            for control in (None, "no needles", "needle alone")
        )
        text, short = (haystack.tokenizer.decode(s.ids.tolist()) for s in (without, alone))
        assert len(without.ids) == len(whole.ids) and without.expected == whole.expected
        assert not any(answer in text for answer in without.expected), name
        assert alone.expected == whole.expected and 256 < len(alone.ids) < 700
        assert all(answer in short for answer in alone.expected), name
        if task.ask == "each":
            others = [make_sample(task, haystack, 1500, d, "s") for d in (0.1, 0.6)]
            assert not any(s.expected[0] in short for s in others)


def test_a_chain_of_variables_is_in_order_and_all_of_it_is_asked_for(haystack):
    """RULER's variable tracking, by hand: VAR A = 12345., VAR B = VAR A., ... in that order."""
    sample = make_sample(TASKS["variable_tracking"], haystack, 1200, 0.3, "s")
    text = haystack.tokenizer.decode(sample.ids.tolist())
    lines = re.findall(r"VAR ([A-Z]{5}) = (.*?)\.", text)
    names = [name for name, _ in lines]
    assert names == sample.expected and len(set(names)) == 5
    assert [value for _, value in lines[1:]] == [f"VAR {name}" for name in names[:-1]]
    assert lines[0][1].isdecimal() and text.endswith(f"with the value {lines[0][1]} are:")
    assert sample.true_depths == sorted(sample.true_depths) and sample.true_depth <= 0.3
    assert score(sample.expected, f"{names[0].lower()} and {names[3]}") == 0.4


@pytest.mark.parametrize("length", [6000, 20_000])
def test_ten_words_are_common_and_all_others_are_not(haystack, length):
    """RULER's common words extraction: in the numbered list each of the ten comes several times as
    often as any other word."""
    sample = make_sample(TASKS["common_words"], haystack, length, 0.5, "s")
    with pytest.raises(BadInput, match="--lengths 900 is too short for a list of common words"):
        make_sample(TASKS["common_words"], haystack, 900, 0.5, "s")
    text = haystack.tokenizer.decode(sample.ids.tolist())
    counts = Counter(re.findall(r"\d+\. (\S+)", text))
    ten = {word for word, _ in counts.most_common(10)}
    assert ten == set(sample.expected) and len(sample.expected) == 10
    others = [n for word, n in counts.items() if word not in ten]
    assert min(counts[word] for word in ten) >= 3 * max(others) and max(others) <= 3
    if length == 20_000:
        assert 24 <= min(counts[word] for word in ten) <= 30
    assert len(sample.ids) + sample.answer_tokens == length and sample.true_depths == []


@pytest.mark.parametrize(("text", "at"), [("คำ ภาษา ไทย ", "spaces"), ("a line\n", "lines")])
def test_a_text_without_sentence_ends_has_places_for_needles(toy_dir, text, at):
    stack = Haystack(text * 400, load_tokenizer(toy_dir))
    assert stack.at == at
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample(TASKS["niah_single"], stack, 1500, depth, "0")
        assert 0 <= depth - sample.true_depth < 0.02
    with pytest.raises(BadInput, match="hardly any sentence ends, line breaks or spaces"):
        Haystack("คำภาษาไทย" * 400, load_tokenizer(toy_dir))


def test_a_task_whose_answer_is_empty_is_refused(haystack):
    def hide_nothing(task, haystack, length, rng):
        return Hidden(haystack.cut(length, rng), ["The code is."], ["What is the code?"], [[""]])

    task = dataclasses.replace(TASKS["niah_single"], hide=hide_nothing)
    with pytest.raises(BadInput, match="an expected answer is empty"):
        make_sample(task, haystack, 900, 0.5, "0")


def test_answers_are_compared_after_nfc(toy_dir):
    assert score(["Café"], "Cafe\u0301.") == 1.0
    task = dataclasses.replace(TASKS["niah_single"], values=("Cafe\u0301", "tea"))
    stack = Haystack("A CAFÉ is here. " * 99, load_tokenizer(toy_dir))
    for seed in range(4):
        assert make_sample(task, stack, 700, 0.5, f"{seed}").expected == ["tea"]


@pytest.mark.parametrize("case", ["digits merged", "one short essay", "not ASCII", "uuids"])
def test_cases_nobody_tuned_for(case, toy_dir, tmp_path):
    """Tokenizers that merge digits, a haystack that repeats hundreds of times, another script,
    other words: prompts stay exact, and the needle is in the text once, after a sentence."""
    text, task = PROSE, TASKS["niah_single"]
    if case == "one short essay":
        text = "One essay. It is short, and it is all there is."
    if case == "not ASCII":
        text = "雪の日は静かです。春になれば花が咲く！ Très bien, «ça va». Ñandú 🐦 ok? Да. " * 40
    if case == "uuids":
        task = dataclasses.replace(task, keys="uuids", values="uuids")
    folder = toy_dir
    if case == "digits merged":
        numbers = " ".join(f"is: {random.Random(i).randint(10**6, 10**7 - 1)}." for i in range(999))
        write_tokenizer(tmp_path, PROSE + numbers, 900, digits=False)
        folder = tmp_path
    stack = Haystack(text, load_tokenizer(folder))
    for length, depth in ((701, 0.0), (997, 0.333), (1403, 1.0)):
        sample = make_sample(task, stack, length, depth, f"{length}")
        assert len(sample.ids) + sample.answer_tokens == length
        prompt = stack.tokenizer.decode(sample.ids.tolist())
        before, _, after = prompt.partition(f" is: {sample.expected[0]}.")
        assert after and sample.expected[0] not in before + after
        hay = before.rsplit("One of the", 1)[0].rstrip()
        assert hay[-1] in ".!?。！？»" and 0 <= depth - sample.true_depth < 0.15
    if case == "digits merged":
        assert len(stack.tokenizer.encode(" 4821906")) < 7


def test_needles_are_between_sentences(real_haystack):
    """Seen in the decoded text: before each needle a sentence ends, after it text goes on."""
    for seed in range(20):
        sample = make_sample(TASKS["multikey"], real_haystack, 1500, 0.5, f"{seed}")
        text = real_haystack.tokenizer.decode(sample.ids.tolist())
        parts = text.split("One of the special magic numbers")
        for before in parts[:-1]:
            end = before.rstrip().rstrip(")\"'”’]")[-1:]
            assert end in ".!?", before[-40:]
        for after in parts[1:]:
            assert after[after.index(".") + 1].isspace()


def test_ids_are_never_encoded_again_as_a_whole(real_haystack):
    """The haystack's own tokens are in the prompt untouched, in order, around the needle."""
    sample = make_sample(TASKS["niah_single"], real_haystack, 2048, 0.5, "x")
    hay = real_haystack.ids.unfold(0, 400, 1)
    for begin in (100, 1200):
        piece = sample.ids[begin : begin + 400]
        assert (hay == piece).all(dim=1).any()


def test_the_depths_of_a_text_share_everything_else(haystack):
    a, b = (
        make_sample(TASKS["multikey"], haystack, 900, d, "0/multikey/900/0") for d in (0.2, 0.9)
    )
    assert a.expected == b.expected and len(a.ids) == len(b.ids)
    c = make_sample(TASKS["multikey"], haystack, 900, 0.2, "0/multikey/900/1")
    assert c.expected != a.expected
    again = make_sample(TASKS["multikey"], haystack, 900, 0.2, "0/multikey/900/0")
    assert torch.equal(again.ids, a.ids)


def test_a_bos_comes_once_and_only_if_the_tokenizer_adds_one(haystack, toy_dir, tmp_path):
    write_tokenizer(tmp_path, PROSE, 400, add_bos_token=True)
    with_bos = Haystack(PROSE, load_tokenizer(tmp_path))
    for stack, expected in ((haystack, 0), (with_bos, 1)):
        ids = make_sample(TASKS["niah_single"], stack, 700, 0.5, "0").ids
        bos = stack.tokenizer.bos_id
        assert int((ids == bos).sum()) == expected and (ids[0] == bos) == bool(expected)


def test_a_length_below_the_frame_is_refused(haystack):
    with pytest.raises(
        ValueError, match="--lengths 60 is too short: .* this prompt takes at least"
    ):
        make_sample(TASKS["niah_single"], haystack, 60, 0.5, "0")


def test_the_answer_is_redrawn_if_the_haystack_holds_it(toy_dir):
    rng = random.Random("s")
    rng.sample(CITIES, 1)
    first = str(rng.randint(1_000_000, 9_999_999))
    tokenizer = load_tokenizer(toy_dir)
    plain = make_sample(TASKS["niah_single"], Haystack(PROSE, tokenizer), 600, 0.5, "s")
    assert plain.expected == [first]
    spoiled = Haystack(f"The number {first} is here. " + PROSE, tokenizer)
    assert make_sample(TASKS["niah_single"], spoiled, 600, 0.5, "s").expected != [first]


# ---- scores ------------------------------------------------------------------------------------


def test_score_by_hand():
    """[E19]"""
    assert score(["123"], "is 123.") == 1 and score(["123"], "is 12 3") == 0
    assert score(["AbC", "x"], "abc") == 0.5


def test_wilson_by_hand():
    """[E20] Against the published closed form at n = 10: 5 of 10 -> 23.7 % to 76.3 %; 0 of 10 ->
    27.8 %."""
    assert [round(x, 3) for x in wilson(5, 10)] == [0.237, 0.763]
    assert [round(x, 3) for x in wilson(0, 10)] == [0.0, 0.278]


def test_multiquery_interval_draws_whole_haystacks():
    """[E22] Two haystacks, one all right and one all wrong: resampling gives 0, 1/2 or 1, while
    Wilson on the 16 answers, taken for independent, would be far too sure."""
    row = {"model": "m", "length": 100}
    rows = [row | {"task": "multiquery", "repeat": r, "score": float(r)} for r in (0, 1)] * 8
    assert summarise(rows)[0]["interval_95"] == [0.0, 1.0]
    agree = [r | {"score": 1.0} for r in rows]  # two haystacks that agree prove little
    assert summarise(agree)[0]["interval_95"] == [round(x, 3) for x in wilson(16, 16)]
    assert summarise(rows)[0]["texts"] == 2 and summarise(rows)[0]["n"] == 16
    one = [r | {"repeat": 0} for r in rows]
    assert summarise(one)[0]["interval_95"] == [round(x, 3) for x in wilson(8, 16)]
    low, high = resampled([[1.0, 0.0]] * 50)
    assert low == high == 0.5


def test_text_loss_equals_the_plain_way(toy_dir):
    model = load_pretrained(toy_dir)
    ids = torch.randint(300, (251,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(
            model(ids[None, :-1])[0], ids[1:], reduction="none"
        )
    expected = [float(x.mean()) for x in losses.split(100)]
    found = text_loss(model, ids, 100)
    assert [loss for loss, _ in found] == pytest.approx(expected, abs=1e-5)
    assert [n for _, n in found] == [100, 100, 50]


# ---- running -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_shared_prefixes_change_no_answer(toy_dir, haystack, name):
    """Deep to shallow through one cache gives what each prompt alone gives, and prefills less."""
    model = load_pretrained(toy_dir)
    depths = (0.9, 0.6, 0.3) if TASKS[name].ask == "each" else (1.0, 0.75, 0.5)
    length = 6000 if name == "common_words" else 1500
    samples = [make_sample(TASKS[name], haystack, length, d, "0") for d in depths]
    shared, prefilled = SharedPrefix(model), 0
    original = model.hidden

    def counting(ids, *args, **kwargs):
        nonlocal prefilled
        prefilled += ids.shape[1]
        return original(ids, *args, **kwargs)

    model.hidden = counting
    answers = [shared.answer(s.ids, 6, ()) for s in samples]
    assert prefilled < 0.75 * sum(len(s.ids) for s in samples)
    assert answers == [generate(model, s.ids, 6) for s in samples]


@pytest.mark.parametrize("name", ["niah_single", "multivalue", "needles_8"])
def test_nats_of_the_answer_are_those_of_a_whole_forward(toy_dir, haystack, name):
    """After the shared prefill as after none, and by transformers: the sum of log-softmax over the
    answer's tokens. The answer that is generated afterwards is as if nothing had been scored."""
    from transformers import AutoModelForCausalLM

    task, tokenizer = TASKS[name], haystack.tokenizer
    shared = SharedPrefix(load_pretrained(toy_dir))
    theirs = AutoModelForCausalLM.from_pretrained(toy_dir, dtype=torch.float32).eval()
    for depth in sorted(task.depths([0.0, 0.5, 1.0]), reverse=True):
        s = make_sample(task, haystack, 900, depth, "0")
        words = ", and ".join([", ".join(s.expected[:-1]), s.expected[-1]][len(s.expected) == 1 :])
        assert s.answer_ids.tolist() == tokenizer.encode(f" {words}")
        nats = shared.log_probability(s.ids, s.answer_ids)
        whole = torch.cat([s.ids, s.answer_ids])[None]
        for model in (shared.model, lambda ids: theirs(ids).logits):
            with torch.no_grad():
                scores = model(whole)[0].log_softmax(-1)
            slow = 0.0
            for i, token in enumerate(s.answer_ids.tolist()):
                slow += float(scores[len(s.ids) - 1 + i, token])
            assert nats == pytest.approx(slow, abs=1e-4) and nats < 0
        assert shared.answer(s.ids, 6, ()) == generate(shared.model, s.ids, 6)


SEED_300 = "0/niah_single/300/0"  # seed, task, length, repeat


def run(*more, toy_dir, prose_file, out):
    eval_needle.main(
        [
            *f"--model {toy_dir} --haystack {prose_file} --lengths 300 400 --depths 0 1".split(),
            *f"--n 2 --out {out}".split(),
            *more,
        ]
    )
    return [json.loads(x) for x in (out / "needle.jsonl").read_text().splitlines()]


def test_the_command_writes_rows_table_and_figure(toy_dir, prose_file, tmp_path, capsys):
    rows = run("--loss", toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    assert len(rows) == 2 * 2 * 2 + 2 * 2
    for row in rows:
        assert row["seconds"] >= 0 and row["seed"] == 0 and row["model"] == toy_dir.name
    needles = [r for r in rows if r["task"] == "niah_single"]
    assert all(r["score"] == score(r["expected"], r["output"]) for r in needles)
    assert all(r["answer_logprob"] < 0 < r["answer_tokens_scored"] for r in needles)
    summary = json.loads((tmp_path / "needle_results.json").read_text())
    assert {(e["task"], e["length"], e["n"]) for e in summary["table"]} == {
        ("niah_single", 300, 4),
        ("niah_single", 400, 4),
        ("loss", 300, 2),
        ("loss", 400, 2),
    }
    losses = [e["mean"] for e in summary["table"] if e["task"] == "loss"]
    assert {e["nats"] < 0 for e in summary["table"] if e["task"] != "loss"} == {True}
    assert all(4 < x < 15 for x in losses)  # a random model: about ln 400 = 6 or worse
    for name in ("needle", "nats", "curves"):
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "niah_single (found" in (said := capsys.readouterr().out)
    assert "niah_single (log-probability of an answer, nats)" in said and "theta" in said


def test_cells_already_there_are_not_run_again(toy_dir, prose_file, tmp_path, monkeypatch):
    rows = run(toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    path = tmp_path / "needle.jsonl"
    lines = path.read_text().splitlines()
    old = json.loads(lines[2])  # by a version that measured no nats: measured again
    del old["answer_logprob"]
    kept = [*lines[:2], json.dumps(old)]
    path.write_text("\n".join(kept) + "\n" + lines[3][:40])  # killed while writing line 4
    measured, original = [], eval_needle.measure
    monkeypatch.setattr(eval_needle, "measure", lambda *a: measured.append(1) or original(*a))
    again = run(toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    assert len(measured) == len(rows) - 2
    assert again[2] == old
    again = [again[i] for i in (0, 1, 3, *range(4, len(again)))]

    def without_time(rows):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]

    assert without_time(again) == without_time(rows)
    run("--n", "3", toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    assert len(measured) == len(rows) - 2 + 4  # only the new repeats


@pytest.mark.parametrize("theta", [1e7, 1e4])
def test_the_untrained_row_comes_by_itself_where_the_run_changed_theta(
    theta, toy_dir, prose_file, tmp_path, capsys
):
    """It has the original's weights under the result's theta: a model of its own."""
    other, result, out = load_pretrained(toy_dir), tmp_path / "result", tmp_path / "eval"
    other.config = other.config.with_rope(theta, 512)
    save_pretrained(other, result, tokenizer_from=toy_dir)
    (result / "run.json").write_text(json.dumps({"settings": {"model": str(toy_dir)}}))
    flags = f"--model {result} --loss --lengths 300 --depths 0 --n 1 --haystack {prose_file}"
    eval_needle.main(f"{flags} --out {out}".split())
    found = results_of(out)
    labels = ["original", *(["untrained"] if theta == 1e7 else []), "result"]
    assert list(found["models"]) == labels
    losses = {e["model"]: e["mean"] for e in found["table"] if e["task"] == "loss"}
    assert (losses["result"] == losses["original"]) == (theta == 1e4)
    assert losses[labels[-2]] == losses["result"]  # the same weights, the same theta
    own = {"folder": str(toy_dir), "rope_theta": theta, "window": 512}
    assert theta == 1e4 or found["models"]["untrained"] == own
    assert re.search(rf"\nresult +{theta:,.0f} +512 ", capsys.readouterr().out)


def test_any_of_several_end_tokens_stops_an_answer(toy_dir, prose_file, tmp_path):
    folder, where = tmp_path / "m", {"prose_file": prose_file}
    shutil.copytree(toy_dir, folder)
    flags = "--lengths 300 --depths 0 --n 1".split()
    (before,) = run(*flags, toy_dir=folder, out=tmp_path / "a", **where)
    tokenizer = load_tokenizer(folder)
    first = make_sample(TASKS["niah_single"], Haystack(PROSE, tokenizer), 300, 0.0, SEED_300).ids
    ends = [tokenizer.eos_id, generate(load_pretrained(folder), first, 1)[0]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (after,) = run(*flags, toy_dir=folder, out=tmp_path / "b", **where)
    assert before["output"] and after["output"] == ""
    assert after["answer_logprob"] == before["answer_logprob"]


def test_several_tasks_and_repeated_flags(toy_dir, prose_file, tmp_path):
    flags = "--tasks multikey niah_single multikey --lengths 600 500 500 --depths 1 0 0".split()
    rows = run(*flags, toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    assert len(rows) == 2 * 2 * 2 * 2 and {r["task"] for r in rows} == {"multikey", "niah_single"}
    summary = json.loads((tmp_path / "needle_results.json").read_text())
    assert [e["length"] for e in summary["table"]] == [500, 600] * 2
    for task in ("multikey", "niah_single"):
        assert (tmp_path / f"needle_{task}.png").read_bytes()[:4] == b"\x89PNG"


def test_what_some_row_would_refuse_is_refused_before_the_first(
    toy_dir, prose_file, tmp_path, capsys
):
    """A sliding window shorter than the longest prompt; a length that only some keys fit into."""
    folder = tmp_path / "mistral"
    shutil.copytree(toy_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    changes = {"model_type": "mistral", "sliding_window": 350}
    (folder / "config.json").write_text(json.dumps(config | changes))
    flags = f"--haystack {prose_file} --out {tmp_path / 'out'} --depths 0.5 --n 8 --lengths"
    frames = []
    for repeat in range(8):
        with pytest.raises(ValueError, match="at least (\\d+) tokens") as error:
            stack = Haystack(PROSE, load_tokenizer(toy_dir))
            make_sample(TASKS["niah_single"], stack, 20, 0.5, f"0/niah_single/20/{repeat}")
        frames.append(int(re.search(r"at least (\d+)", str(error.value))[1]))
    assert len(set(frames)) > 1  # keys of different length
    for model, lengths in ((folder, "300 400"), (toy_dir, str(min(frames)))):
        with pytest.raises(SystemExit) as stop:
            eval_needle.main(f"--model {model} {flags} {lengths}".split())
        assert stop.value.code == 2 and not (tmp_path / "out").exists()
    err = capsys.readouterr().err
    assert "sliding_window 350 is shorter than --lengths 400" in err and "is too short" in err
    assert "haystack:" not in err  # nothing is announced that does not come


def test_every_length_is_checked_before_the_first_row(toy_dir, prose_file, tmp_path, capsys):
    """Other lengths have other keys: the shortest may fit where a longer one does not."""
    stack = Haystack(PROSE, load_tokenizer(toy_dir))

    def fits(length: int) -> bool:
        try:
            make_sample(TASKS["niah_single"], stack, length, 0.0, f"0/niah_single/{length}/0")
        except ValueError:
            return False
        return True

    first = next(n for n in range(20, 300) if fits(n) and not fits(n + 1))
    flags = f"--model {toy_dir} --haystack {prose_file} --out {tmp_path / 'out'} --n 1"
    with pytest.raises(SystemExit):
        eval_needle.main(f"{flags} --lengths {first} {first + 1}".split())
    assert f"--lengths {first + 1} is too short" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_the_rows_and_says_so(toy_dir, prose_file, tmp_path, monkeypatch, capsys):
    measured, original = [], eval_needle.measure

    def stopping(*args):
        measured.append(1)
        if len(measured) > 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(eval_needle, "measure", stopping)
    with pytest.raises(SystemExit) as stop:
        run(toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    assert stop.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted; the results written are kept in {tmp_path / 'needle.jsonl'};"
        " the same command goes on from there"
    )
    assert len((tmp_path / "needle.jsonl").read_text().splitlines()) == 3


def test_a_haystack_that_repeats_is_announced(toy_dir, prose_file, tmp_path, capsys):
    tokens = len(load_tokenizer(toy_dir).encode(PROSE))
    for longest in (tokens, tokens + 1):
        flags = f"--tasks --loss --n 1 --lengths 300 {longest}".split()
        run(*flags, toy_dir=toy_dir, prose_file=prose_file, out=touched(tmp_path / f"{longest}"))
        warned = f"shorter than --lengths {longest}, so it repeats" in capsys.readouterr().err
        assert warned == (longest > tokens)


def touched(folder):
    folder.mkdir()
    (folder / "needle.jsonl").touch()
    return folder


def test_the_default_haystack_is_found_from_any_folder(essays_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, source = load_haystack(None)
    assert source == "data/essays" and sorted(essays_dir.glob("*.txt"))[0].read_text() in text


def test_a_model_with_another_tokenizer_is_not_compared(toy_dir, prose_file, tmp_path, capsys):
    shutil.copytree(toy_dir, tmp_path / "other")
    write_tokenizer(tmp_path / "other", PROSE[:700], 300)
    with pytest.raises(SystemExit):
        run(
            "--compare",
            str(tmp_path / "other"),
            toy_dir=toy_dir,
            prose_file=prose_file,
            out=tmp_path,
        )
    assert "its tokenizer or vocabulary is not that of --model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        (
            "--model nowhere",
            "model folder nowhere does not exist",
        ),
        ("--lengths 300 50", "--lengths 50 is too short"),
        ("--lengths 1", "--lengths 1 must be at least 2 tokens"),
        ("--tasks", "--tasks without a name takes --loss"),
        ("--haystack nowhere.txt", "nowhere.txt does not exist"),
        ("--lengths 50", "--lengths 50 is too short"),
        ("--depths 0.5 1.5", "--depths 1.5 must be within 0..1"),
        ("--depths nan", "--depths nan must be within 0..1"),
        (
            "--out README.md --lengths 500",
            "--out README.md is a file; a folder for the results is needed",
        ),
        ("--n 0", "--n 0 must be at least 1"),
    ],
)
def test_bad_input_is_one_line(flags, match, toy_dir, prose_file, tmp_path, capsys):
    argv = f"--model {toy_dir} --haystack {prose_file} --out {tmp_path / 'out'} {flags}".split()
    with pytest.raises(SystemExit) as stop:
        eval_needle.main(argv)
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert stop.value.code == 2 and len(lines) == 1 and match in lines[0]
    assert not (tmp_path / "out").exists()


def test_without_a_result_the_error_says_who_makes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        eval_needle.main([])
    assert "error: folder out, which train.py makes, does not exist" in capsys.readouterr().err


def write_template(tmp_path, **fields):
    path = tmp_path / "needle.json"
    path.write_text(json.dumps(fields))
    return str(path)


def test_a_template_replaces_wording_words_and_defaults(toy_dir, prose_file, tmp_path, capsys):
    fields = {
        "needle": "The code of {key} is {value}!",
        "question": "\nWhich code has {key}?",
        "answer": " It is",
        "intro": "",
        "keys": ["Anna", "Bert"],
        "values": ["zyx", "wvu"],
        "task": "multiquery",
        "ask": "each",
        "needles": 2,
        "n": 1,
    }
    eval_needle.main(
        f"--model {toy_dir} --template {write_template(tmp_path, **fields)} --lengths 300"
        f" --haystack {prose_file} --out {tmp_path / 'out'}".split()
    )
    rows = [json.loads(x) for x in (tmp_path / "out" / "needle.jsonl").read_text().splitlines()]
    assert [r["depth"] for r in rows] == [0.75, 0.25] and {r["task"] for r in rows} == {
        "multiquery"
    }
    assert {r["expected"][0] for r in rows} == {"zyx", "wvu"}
    said = capsys.readouterr().out
    assert "\nmultiquery, each in turn (found" in said and "a question and an answer for" in said


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"nedle": "x"}, "unknown field 'nedle'"),
        ({"needle": "no braces"}, "needle must hold {key} and {value}"),
        ({"needle": "{key} {value} {more}"}, "only {key} and {value} may be in braces"),
        ({"needle": "{key} {value} {"}, "only {key} and {value} may be in braces"),
        ({"question": "What?", "answer": ""}, "neither question nor answer holds {key}"),
        ({"keys": "Anna"}, "keys is 'Anna', expected: list"),
        ({"keys": []}, "keys must be a list of words"),
        ({"keys": ["Anna", "Anna"]}, "keys holds a word twice"),
        ({"values": ["a", " "]}, "values must be a list of words, none of them empty"),
        ({"values": ["\u00e9b", "e\u0301b"]}, "values holds a word twice"),
        ({"n": True}, "n is True, expected: int"),
        ({"needles": 0}, "needles is 0, expected: int"),
        (
            {"values": ["zyx"], "needles": 2, "task": "multiquery"},
            "holds all but 1 of the needles'",
        ),
        ({"keys": ["Anna"], "needles": 2, "task": "multiquery"}, "has 2 needles, but only 1 keys"),
        ({"task": "sing"}, "task 'sing' is none of"),
    ],
)
def test_a_bad_template_is_one_line(fields, match, toy_dir, prose_file, tmp_path, capsys):
    argv = f"--model {toy_dir} --template {write_template(tmp_path, **fields)} --lengths 500"
    with pytest.raises(SystemExit) as stop:
        eval_needle.main(f"{argv} --haystack {prose_file} --out {tmp_path / 'out'}".split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and match in error.splitlines()[-1], error
    assert not (tmp_path / "out").exists()


def test_lengths_and_compare_come_from_the_run(toy_dir, prose_file, tmp_path):
    """All defaults: the model that train.py began with beside its result, old window .. new; the
    original gets --n_beyond texts past its window."""
    model, window, base = load_pretrained(toy_dir), 256, str(tmp_path / "base")
    for folder, length in ((base, window), (tmp_path / "out", 4 * window)):
        model.config = model.config.with_rope(1e4, length)
        save_pretrained(model, folder, tokenizer_from=toy_dir)
    (tmp_path / "out" / "run.json").write_text(json.dumps({"settings": {"model": base}}))
    eval_needle.main(
        f"--model {tmp_path / 'out'} --haystack {prose_file} --depths 0.5 --n 2"
        " --n_beyond 1".split()
    )
    lines = (tmp_path / "out" / "needle.jsonl").read_text().splitlines()
    rows, counts = [json.loads(line) for line in lines], {}
    for r in rows:
        counts[r["model"], r["length"]] = counts.get((r["model"], r["length"]), 0) + 1
    base, result = "original", "out"
    assert counts == {
        (base, window): 2,
        (base, 2 * window): 1,
        (base, 4 * window): 1,
        (result, window): 2,
        (result, 2 * window): 2,
        (result, 4 * window): 2,
    }


# ---- the figure --------------------------------------------------------------------------------


def draw(monkeypatch, tmp_path, lengths, names, **options):
    """The heat-map of three models: nothing, half, all found -> the matplotlib figure."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k))
    windows = {
        "models/base": 512,
        **dict.fromkeys(("a/very/long/folder/name/of/a/model", "c"), 9999),
    }
    rows = [
        {"model": m, "task": "t", "length": n, "depth": d, "score": float((i, j % 2) > (1, 0))}
        for m in windows
        for n in lengths
        for i, d in enumerate((0.0, 0.5, 1.0))
        for j in range(4)
    ]
    for i, row in enumerate(rows):
        row |= {"answer_logprob": -float(i % 4), "expected": ["7"]}
    draw_heatmap(tmp_path / "h.png", rows, "t", windows, names, **options)
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
    figures[0].draw_without_rendering()  # saved at another resolution: lay it out again
    return figures[0]


@pytest.mark.parametrize("lengths", [(300,), (300, 600), (300, 500, 600, 700, 800, 900, 131072)])
def test_labels_of_the_heatmap_do_not_overlap(lengths, tmp_path, monkeypatch):
    figure = draw(monkeypatch, tmp_path, lengths, {"c": "a title of quite a few words, in words"})
    axes = figure.axes[:-1]  # the last is the colour bar
    titles = [a.title.get_window_extent() for a in axes]
    ticks = [t.get_window_extent() for a in axes for t in a.get_xticklabels()]
    for boxes in (titles, ticks):
        assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    assert titles[0].x0 > 0 and max(t.y1 for t in titles) <= figure.bbox.y1


def test_no_needle_is_drawn_farther_than_the_text_is_long(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: figures.append(f))
    needle = {"model": "m", "task": "t", "length": 1024, "expected": ["7"], "output": "7"}
    draw_curves(tmp_path / "c.png", [needle | {"true_depth": d} for d in (0.0, 1.0)], "t")
    assert figures[0].axes[0].lines[0].get_xdata().tolist() == [0.5 / 8, 7.5 / 8]


def test_the_heatmap_can_be_read(tmp_path, monkeypatch):
    """Panels in the order and under the names given; contrast of at least 4.5 in every cell; the
    line at the end of the trained window only where it is, and explained."""
    figure = draw(monkeypatch, tmp_path, (300, 600), {"models/base": "base"})
    axes = figure.axes[:-1]
    assert [a.get_title().split("\n")[0] for a in axes] == ["base", "a/very/long/folder", "c"]
    assert [len(a.lines) for a in axes] == [2, 0, 0]
    assert "dashed line: end of the trained window" in figure.get_supxlabel()
    assert "n = 4 per cell" in axes[0].get_title()
    for text in (t for a in axes for t in a.texts):
        column, row = text.get_position()
        image = text.axes.images[0]
        levels = [luminance(image.cmap(image.norm(image.get_array()[row, column])))]
        levels.append({"black": 0.0, "white": 1.0}[text.get_color()])
        assert (max(levels) + 0.05) / (min(levels) + 0.05) > 4.5
    assert {t.get_color() for a in axes for t in a.texts} == {"black", "white"}
    whole = draw(monkeypatch, tmp_path, (300, 400), {})
    assert "dashed" not in whole.get_supxlabel()


def test_the_heatmap_can_show_nats(tmp_path, monkeypatch):
    figure = draw(monkeypatch, tmp_path, (300, 600), {}, in_nats=True)
    *axes, bar = figure.axes
    assert {text.get_text() for a in axes for text in a.texts} == {"-1.50"}  # mean of 0 to -3
    assert axes[0].images[0].get_clim() == (-3.0, 0.0) and "nats" in bar.get_ylabel()


def luminance(color) -> float:
    """Relative luminance of sRGB, by its definition (WCAG 2)."""
    r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color[:3])
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


# ---- the real checkpoint -----------------------------------------------------------------------


def test_smollm2_finds_a_needle_inside_its_window(smollm2_dir, real_haystack):
    """All parts at once on a real model: three needles at 1,024 tokens, all found."""
    model = load_pretrained(smollm2_dir)
    found = 0
    for repeat in range(3):
        sample = make_sample(TASKS["niah_single"], real_haystack, 1024, 0.5, f"0/{repeat}")
        output = real_haystack.tokenizer.decode(
            SharedPrefix(model).answer(sample.ids, sample.answer_tokens, (2,))
        )
        found += score(sample.expected, output)
    assert found == 3


# ---- what a run says, keeps and refuses --------------------------------------------------------


def results_of(out) -> dict:
    return json.loads((out / "needle_results.json").read_text())


def test_a_small_run_later_hides_nothing_of_a_larger_one(toy_dir, prose_file, tmp_path, capsys):
    """One folder, three runs: the rows of the same setup stay in table and figure; another seed is
    another setup, and said to be there."""
    where = {"toy_dir": toy_dir, "prose_file": prose_file, "out": tmp_path}
    run(**where)
    table = results_of(tmp_path)["table"]
    run("--lengths", "350", "--n", "1", "--depths", "0.333", **where)
    later = results_of(tmp_path)
    assert [e for e in later["table"] if e["length"] != 350] == table
    assert {(e["length"], e["depth"]) for e in later["cells"]} == {
        *((n, d) for n in (300, 400) for d in (0.0, 1.0)),
        (350, 0.333),
    }
    assert later["overall"][0]["n"] == 9 and len(later["overall"]) == 1
    run("--tasks", "passkey", **where)
    assert {e["task"] for e in results_of(tmp_path)["table"]} == {"passkey", "niah_single"}
    assert (tmp_path / "needle_passkey.png").is_file()
    capsys.readouterr()
    run("--seed", "5", "--lengths", "300", **where)
    assert [e["n"] for e in results_of(tmp_path)["table"]] == [4]
    assert "17 results there are of other models or settings" in capsys.readouterr().err


def test_controls_measure_the_gain_on_the_same_texts(toy_dir, prose_file, tmp_path, capsys):
    flags = ("--needle_alone", "--tasks", "niah_single", "common_words", "--lengths", "6000")
    results = run(*flags, "--n", "2", toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    without = [r for r in results if r["model"] == "no needles"]
    assert [r["score"] for r in without] == [0.0, 0.0]  # one a text, none for common words
    found = results_of(tmp_path)
    assert list(found["models"]) == [toy_dir.name]  # a control is not a model
    whole, alone = found["gains"]
    assert (whole["model"], alone["model"]) == (toy_dir.name, "needle alone")

    def mean(label):
        own = [r for r in results if r["model"] == label and r["task"] == "niah_single"]
        return sum(r["answer_logprob"] for r in own) / len(own)

    assert whole["mean"] == pytest.approx(mean(toy_dir.name) - mean("no needles"), abs=1e-6)
    assert alone["mean"] == pytest.approx(mean("needle alone") - mean("no needles"), abs=1e-6)
    assert whole["share_of_short_text"] == whole["mean"] / alone["mean"]
    assert "with its needles" in capsys.readouterr().out
    assert (tmp_path / "nats.png").is_file() and not list(tmp_path.glob("*common_words.png"))
    run("--controls", "--lengths", "300", toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    assert "without --compare DIR only the one without needles" in capsys.readouterr().err


def needle_result(model, repeat, score, nats, answers=1, **more):
    row = {"model": model, "repeat": repeat, "score": score, "answer_logprob": nats}
    expected = [f"{repeat}{i}" for i in range(answers)]
    return {"task": "t", "length": 9, "depth": 0, "prompt": "p", "expected": expected} | row | more


def test_gain_by_hand():
    """[E24] Two answers in a prompt: -3 nats with their needles and -9 without are 3 an answer;
    alone in a short text 4, so three quarters of the gain survive the distance."""
    rows = [
        needle_result(label, repeat, 0.0, nats - 2 * repeat, answers=2)
        for label, nats in (("m", -3.0), ("none", -9.0), ("alone", -1.0))
        for repeat in (0, 1)
    ]
    assert gain(rows[0], rows[2]) == 3.0
    whole, alone = gains(rows, "m", "none", "alone")
    assert whole["mean"] == 3.0 and alone["mean"] == 4.0 and whole["share_of_short_text"] == 0.75
    assert whole["interval_95"] == [3.0, 3.0] and whole["texts"] == 2


def test_models_are_compared_text_by_text_on_the_same_prompts():
    """Differences by hand: 1, 2, 3 nats (mean 2, standard deviation 1, t = 4.303 for 3 texts);
    the prompt that only one was asked counts for neither."""
    rows = [needle_result("a", i, 1.0, -1.0) for i in range(4)]
    rows += [needle_result("b", i, float(i > 0), -2.0 - i) for i in range(3)]
    rows += [needle_result("b", 3, 1.0, -99.0, prompt="another")]
    (pair,) = versus(rows, "a")
    assert (pair["model"], pair["against"], pair["nats"]["texts"]) == ("a", "b", 3)
    assert pair["nats"]["mean"] == 2.0 and pair["nats"]["verdict"] == "not told apart"
    low, high = pair["nats"]["interval_95"]
    assert low == pytest.approx(2 - 4.303 / 3**0.5) and high == pytest.approx(2 + 4.303 / 3**0.5)
    assert pair["nats"]["texts_needed"] == 4  # 3.182 / 2 < 2
    assert pair["found"]["mean"] == pytest.approx(1 / 3)
    assert paired([-1.0, -2.0, -3.0, -2.0])["verdict"] == "below"
    assert paired([1.0])["interval_95"] is None and paired([1.0])["verdict"] == "not told apart"
    assert paired([0.0, 0.0])["texts_needed"] is None
    assert [student(n) for n in (5, 30)] == pytest.approx([2.571, 2.042], abs=4e-3)


def test_a_result_of_a_model_changed_anywhere_is_measured_again(
    toy_dir, prose_file, tmp_path, capsys
):
    """One element of one small norm; the same bytes at another time are the same model."""
    folder, out, where = tmp_path / "m", tmp_path / "out", {"prose_file": prose_file}
    shutil.copytree(toy_dir, folder)
    before = len(run(toy_dir=folder, out=out, **where))
    model = load_pretrained(folder)
    model.model.norm.weight.data[7] += 1e-3
    save_pretrained(model, tmp_path / "changed")
    shutil.copy(tmp_path / "changed" / "model.safetensors", folder)
    assert len(run(toy_dir=folder, out=out, **where)) == 2 * before
    shutil.copy(toy_dir / "model.safetensors", folder)
    assert len(run(toy_dir=folder, out=out, **where)) == 2 * before
    assert "every result was measured before" in capsys.readouterr().err
    assert not list(folder.glob("needle*"))  # nothing is kept in a model folder of others


def test_niah_m_is_the_mean_of_its_three_tasks():
    """[E21]"""
    row = {"model": "m", "length": 9}
    scores = {"multikey": (1.0, 1.0), "multivalue": (0.5, 0.0), "multiquery": (0.25, 0.25)}
    rows = [
        row | {"task": task, "repeat": i, "score": s}
        for task, pair in scores.items()
        for i, s in enumerate(pair)
    ]
    entry = summarise(rows)[-1]
    assert entry["task"] == "NIAH(M)" and entry["mean"] == 0.5 and entry["n"] == 6
    assert not any(e["task"] == "NIAH(M)" for e in summarise(rows[:4]))


def test_depths_of_one_haystack_are_no_independent_samples():
    """Two haystacks x 5 depths, one all found and one not: as unsure as two samples are."""
    row = {"model": "m", "task": "niah_single", "length": 9}
    rows = [row | {"repeat": r, "depth": d, "score": float(r)} for r in (0, 1) for d in range(5)]
    assert summarise(rows)[0]["interval_95"] == [0.0, 1.0]
    assert wilson(5, 10)[0] > 0.2
    cells = summarise(rows, ("model", "task", "length", "depth"))
    assert [c["interval_95"] for c in cells] == [[round(x, 3) for x in wilson(1, 2)]] * 5


def test_several_tasks_print_niah_m_cache_and_what_is_ignored(
    toy_dir, prose_file, tmp_path, capsys
):
    tasks = "--tasks multikey multivalue multiquery needles_8 --lengths 800 --n 1".split()
    rows = run(*tasks, toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    assert {r["depth"] for r in rows if r["task"] == "needles_8"} == {
        (i + 0.5) / 8 for i in range(8)
    }
    said = capsys.readouterr()
    assert "\nmultiquery (found" in said.out and "\nneedles_8, each in turn (found" in said.out
    assert "NIAH(M) (found" in said.out and "the mean of multikey, multivalue" in said.out
    # 2 x 2 layers x 2 heads x 12 x 800 tokens x 4 bytes
    assert "key-value cache at 800 tokens: 0.00 GiB (float32)" in said.err
    assert "to do: 14 prompts of 11,200 tokens together" in said.err
    assert "--depths is not for needles_8: the needles divide the text among them" in said.err
    assert "a short prompt is read at" in said.err


def test_the_cache_of_an_8b_at_128k_is_16_gib():
    config = LlamaConfig(128_256, 4096, 14_336, 32, 32, 8, 128, 131_072)
    assert kv_cache_bytes(config, 131_072, torch.bfloat16) == 16 * 2**30
    # 4,096 tokens, each with all those before it: twice 4,096 x weights, attention by hand
    weights = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14_336)
    pairs = 4096 * 4096 / 2
    assert forward_flops(config, 0, 4096) == 2 * 4096 * weights + 32 * 4 * 4096 * pairs
    head = 2 * 4096 * config.vocab_size * config.hidden_size
    assert training_flops(config, 4096) == 3 * (forward_flops(config, 0, 4096) + head)
    halves = forward_flops(config, 0, 1000) + forward_flops(config, 1000, 4096)
    assert halves == forward_flops(config, 0, 4096)


def test_a_template_can_be_a_whole_ruler_task(toy_dir, prose_file, tmp_path):
    """Task text, several needles in words of its own, one question for all, the answer's beginning
    and RULER's fixed budget of 128 tokens: the prompt around the haystack is theirs, literally."""
    fields = {
        "task": "multiquery",
        "intro": "Some codes are hidden within the following text. Memorize them.\n",
        "needle": "A code for {key} is: {value}.",
        "question": "\nWhat are all the codes for {key}?",
        "answer": " The codes for {key} are",
        "keys": ["red fox", "blue owl", "old elk"],
        "needles": 3,
        "values": "uuids",
        "answer_tokens": 128,
        "haystack": "noise",
        "n": 1,
    }
    flags = f"--template {write_template(tmp_path, **fields)} --lengths 900 --depths 0.333"
    eval_needle.main(f"--model {toy_dir} {flags} --haystack {prose_file} --out {tmp_path}".split())
    row = json.loads((tmp_path / "needle.jsonl").read_text())
    assert len(row["expected"]) == 3 and len(set(row["expected"])) == 3
    assert all(
        re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", v) for v in row["expected"]
    )
    assert row["depth"] == 0.333 and len(row["true_depths"]) == 3
    own = {"keys": tuple(fields["keys"])}
    for name in ("intro", "needle", "question", "answer", "needles", "values", "answer_tokens"):
        own[name] = fields[name]
    task = dataclasses.replace(TASKS["multiquery"], haystack="noise", **own)
    stack = Haystack(PROSE, load_tokenizer(toy_dir))
    ids = make_sample(task, stack, 900, 0.333, "0/multiquery/900/0").ids
    assert hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12] == row["prompt"]
    text = stack.tokenizer.decode(ids.tolist())
    assert len(ids) == 900 - 128 and text.startswith(fields["intro"])
    assert text.count("The lamp is lit.") > 4 and "says that" not in text  # noise, not the prose
    keys = re.search(r"\nWhat are all the codes for (.+)\? The codes for (.+) are$", text)
    first, second, last = keys[1].replace("and ", "").split(", ")
    assert keys[1] == keys[2] == f"{first}, {second}, and {last}"
    for key, value in zip((first, second, last), row["expected"], strict=True):
        assert text.count(f"A code for {key} is: {value}.") == 1


def test_what_a_template_says_for_its_own_task_is_not_lost_in_silence(
    toy_dir, prose_file, tmp_path, capsys
):
    path = write_template(tmp_path, task="multiquery", needles=2, intro="Codes.")
    flags = f"--template {path} --tasks multikey --lengths 500 --n 1"
    run(*flags.split(), toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    said = capsys.readouterr().err
    assert f"{path} is for its task multiquery, and not for --tasks multikey" in said
    path = write_template(tmp_path, needles=2)  # of no task: of every one
    rows = run(*flags.split(), toy_dir=toy_dir, prose_file=prose_file, out=tmp_path)
    assert {len(r["true_depths"]) for r in rows} == {2, 4}
    assert "and not for --tasks" not in capsys.readouterr().err


def test_one_essay_one_haystack_one_depth(toy_dir, tmp_path, capsys):
    """A folder with one short essay, --n 1, a depth and a length that are multiples of nothing."""
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "only.txt").write_text("Ein Aufsatz über Öl. Er ist kurz! Schluß.\n")
    flags = "--n 1 --lengths 613 --depths 0.333 --tasks niah_single multikey_hard passkey"
    eval_needle.main(
        f"--model {toy_dir} --haystack {tmp_path / 'essays'} {flags} --out {tmp_path}".split()
    )
    rows = [json.loads(line) for line in (tmp_path / "needle.jsonl").read_text().splitlines()]
    assert [(r["length"], r["depth"]) for r in rows] == [(613, 0.333)] * 3
    assert all(0.2 < r["true_depth"] <= 0.333 for r in rows)
    assert "so it repeats" in capsys.readouterr().err


def test_any_answer_is_read_again_and_a_line_without_its_end_is_kept(tmp_path):
    def row(i):
        return dict.fromkeys(KEY, i) | {"output": "a\u2028b\x85c\n"}

    results = Results(tmp_path)
    results.add(row(1))
    results.add(row(2))
    path = tmp_path / "needle.jsonl"
    path.write_text(path.read_text().removesuffix("\n"))
    results = Results(tmp_path)
    assert list(results.known.values()) == [row(1), row(2)]
    results.add(row(3))
    results.add(row(4))
    assert list(Results(tmp_path).known.values()) == [row(i) for i in (1, 2, 3, 4)]
