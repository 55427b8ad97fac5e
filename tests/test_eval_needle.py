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
from support.huggingface.config import yarn_scaling
from support.memory.count import forward_flops, training_flops
from support.needles.cost import kv_cache_bytes
from support.needles.figures import draw_curves, draw_heatmap
from support.needles.haystack import Hidden, load_haystack
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


def test_words_that_the_haystack_holds_are_not_hidden(toy_dir):
    """Keys, values and numbers; compared after NFC, without case."""
    tokenizer, niah = load_tokenizer(toy_dir), TASKS["niah_single"]
    story, cafe = Haystack(PROSE, tokenizer), Haystack("A CAFÉ is here. " * 99, tokenizer)
    task = dataclasses.replace(niah, keys=("Ada", "Bob", "Zoe"))  # Ada and Bob are in the story
    tea = dataclasses.replace(niah, values=("Cafe\u0301", "tea"))
    for seed in range(6):
        ids = make_sample(task, story, 900, 0.5, f"{seed}").ids.tolist()
        assert tokenizer.decode(ids).endswith("number for Zoe is:")
        assert make_sample(tea, cafe, 700, 0.5, f"{seed}").expected == ["tea"]
    none_left = dataclasses.replace(task, keys=("Ada", "Bob"))
    with pytest.raises(BadInput, match="the haystack holds all but 0 of the needles' 1 words"):
        make_sample(none_left, story, 900, 0.5, "0")
    (number,) = make_sample(niah, story, 600, 0.5, "s").expected
    spoiled = Haystack(f"The number {number} is here. " + PROSE, tokenizer)
    assert make_sample(niah, spoiled, 600, 0.5, "s").expected != [number]


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


def test_needles_are_between_sentences_of_a_text_that_is_not_encoded_again(real_haystack):
    """Seen in the decoded text: before each needle a sentence ends, after it text goes on. The
    haystack's own tokens are in the prompt untouched, in order, around the needle."""
    for seed in range(20):
        sample = make_sample(TASKS["multikey"], real_haystack, 1500, 0.5, f"{seed}")
        text = real_haystack.tokenizer.decode(sample.ids.tolist())
        parts = text.split("One of the special magic numbers")
        for before in parts[:-1]:
            end = before.rstrip().rstrip(")\"'”’]")[-1:]
            assert end in ".!?", before[-40:]
        for after in parts[1:]:
            assert after[after.index(".") + 1].isspace()
    sample = make_sample(TASKS["niah_single"], real_haystack, 2048, 0.5, "x")
    hay = real_haystack.ids.unfold(0, 400, 1)
    for begin in (100, 1200):
        assert (hay == sample.ids[begin : begin + 400]).all(dim=1).any()


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


# ---- scores ------------------------------------------------------------------------------------


def test_score_by_hand():
    """[E19] Case and the form of an accent do not count."""
    assert score(["123"], "is 123.") == 1 and score(["123"], "is 12 3") == 0
    assert score(["AbC", "x"], "abc") == 0.5 and score(["Café"], "Cafe\u0301.") == 1


def test_wilson_by_hand():
    """[E20] Against the published closed form at n = 10: 5 of 10 -> 23.7 % to 76.3 %; 0 of 10 ->
    27.8 %."""
    assert [round(x, 3) for x in wilson(5, 10)] == [0.237, 0.763]
    assert [round(x, 3) for x in wilson(0, 10)] == [0.0, 0.278]


def test_multiquery_interval_draws_whole_haystacks():
    """[E22] Two haystacks, one all right and one all wrong: resampling gives 0, 1/2 or 1, while
    Wilson on the 16 answers, taken for independent, would be far too sure."""
    row = {"model": "m", "length": 100, "task": "multiquery"}
    rows = [row | {"repeat": r, "score": float(r)} for r in (0, 1)] * 8
    assert summarise(rows)[0]["interval_95"] == [0.0, 1.0] and wilson(8, 16)[0] > 0.2
    agree = [r | {"score": 1.0} for r in rows]  # two haystacks that agree prove little
    assert summarise(agree)[0]["interval_95"] == [round(x, 3) for x in wilson(16, 16)]
    assert summarise(rows)[0]["texts"] == 2 and summarise(rows)[0]["n"] == 16
    one = [r | {"repeat": 0} for r in rows]
    assert summarise(one)[0]["interval_95"] == [round(x, 3) for x in wilson(8, 16)]
    cells = summarise(
        [r | {"depth": i // 2} for i, r in enumerate(rows)], ("model", "task", "depth")
    )
    assert [c["interval_95"] for c in cells] == [[round(x, 3) for x in wilson(1, 2)]] * 8
    assert resampled([[1.0, 0.0]] * 50) == (0.5, 0.5)


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


@pytest.fixture
def judge(toy_dir, prose_file, tmp_path):
    """judge(flags) -> the results in needle.jsonl. Of a repeated flag the last one counts."""

    def run(flags="", model=toy_dir, out=tmp_path / "out"):
        grid = "--lengths 300 400 --depths 0 1 --n 2"
        argv = f"--model {model} --haystack {prose_file} --out {out} {grid} {flags}"
        eval_needle.main(argv.split())
        return [json.loads(line) for line in (out / "needle.jsonl").read_text().splitlines()]

    return run


@pytest.fixture
def refused(judge, tmp_path, capsys):
    """refused(flags) -> the one error line; exit code 2, nothing announced, nothing written."""

    def run(flags, **more):
        with pytest.raises(SystemExit) as stop:
            judge(flags, **more)
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2 and not (tmp_path / "out").exists()
        assert sum(line.startswith("error:") for line in lines) == 1
        assert not any(line.startswith("haystack:") for line in lines)
        return lines[-1]

    return run


def results_of(out) -> dict:
    return json.loads((out / "needle_results.json").read_text())


def test_the_command_writes_rows_table_and_figure(judge, toy_dir, tmp_path, capsys):
    rows, out = judge("--loss"), tmp_path / "out"
    assert len(rows) == 2 * 2 * 2 + 2 * 2
    for row in rows:
        assert row["seconds"] >= 0 and row["seed"] == 0 and row["model"] == toy_dir.name
    needles = [r for r in rows if r["task"] == "niah_single"]
    assert all(r["score"] == score(r["expected"], r["output"]) for r in needles)
    assert all(r["answer_logprob"] < 0 < r["answer_tokens_scored"] for r in needles)
    table = results_of(out)["table"]
    cells = {(task, n) for task in ("niah_single", "loss") for n in (300, 400)}
    assert {(e["task"], e["length"]) for e in table} == cells
    for e in table:
        assert e["n"] == 4 and e["nats"] < 0 if e["task"] != "loss" else e["n"] == 2
    losses = [e["mean"] for e in table if e["task"] == "loss"]
    assert all(4 < x < 15 for x in losses)  # a random model: about ln 400 = 6 or worse
    for name in ("needle", "nats", "curves"):
        assert (out / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert "niah_single (found" in (said := capsys.readouterr().out)
    assert "niah_single (log-probability of an answer, nats)" in said and "theta" in said


def test_cells_already_there_are_not_run_again(judge, tmp_path, monkeypatch):
    rows, path = judge(), tmp_path / "out" / "needle.jsonl"
    lines = path.read_text().splitlines()
    old = json.loads(lines[2])  # by a version that measured no nats: measured again
    del old["answer_logprob"]
    kept = [*lines[:2], json.dumps(old)]
    path.write_text("\n".join(kept) + "\n" + lines[3][:40])  # killed while writing line 4
    measured, original = [], eval_needle.measure
    monkeypatch.setattr(eval_needle, "measure", lambda *a: measured.append(1) or original(*a))
    again = judge()
    assert len(measured) == len(rows) - 2
    assert again.pop(2) == old

    def without_time(rows):
        return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]

    assert without_time(again) == without_time(rows)
    judge("--n 3")
    assert len(measured) == len(rows) - 2 + 4  # only the new repeats


@pytest.mark.parametrize(
    ("theta", "scaling"), [(1e7, None), (1e4, yarn_scaling(64, 512)), (1e4, None)]
)
def test_the_untrained_row_comes_by_itself_where_the_run_changed_the_rope(
    theta, scaling, judge, toy_dir, tmp_path, capsys
):
    """It has the original's weights under the result's theta and scaling: a model of its own."""
    changed = theta == 1e7 or scaling is not None
    other, result = load_pretrained(toy_dir), tmp_path / "result"
    other.config = other.config.with_rope(theta, 512, scaling)
    save_pretrained(other, result, tokenizer_from=toy_dir)
    (result / "run.json").write_text(json.dumps({"settings": {"model": str(toy_dir)}}))
    judge("--loss --lengths 300 --depths 0 --n 1", model=result)
    found = results_of(tmp_path / "out")
    labels = ["original", *["untrained"] * changed, "result"]
    assert list(found["models"]) == labels
    losses = {e["model"]: e["mean"] for e in found["table"] if e["task"] == "loss"}
    assert (losses["result"] == losses["original"]) == (not changed)
    assert losses[labels[-2]] == losses["result"]  # the same weights, the same RoPE
    own = {"folder": str(toy_dir), "rope_theta": theta, "window": 512}
    own |= {"rope_scaling": scaling} if scaling else {}
    assert not changed or found["models"]["untrained"] == own
    assert re.search(rf"\nresult +{theta:,.0f} +512 ", capsys.readouterr().out)


def test_any_of_several_end_tokens_stops_an_answer(judge, haystack, toy_dir, tmp_path):
    folder, flags = tmp_path / "m", "--lengths 300 --depths 0 --n 1"
    shutil.copytree(toy_dir, folder)
    (before,) = judge(flags, model=folder, out=tmp_path / "a")
    first = make_sample(TASKS["niah_single"], haystack, 300, 0.0, "0/niah_single/300/0").ids
    ends = [haystack.tokenizer.eos_id, generate(load_pretrained(folder), first, 1)[0]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (after,) = judge(flags, model=folder, out=tmp_path / "b")
    assert before["output"] and after["output"] == ""
    assert after["answer_logprob"] == before["answer_logprob"]


def test_several_tasks_and_repeated_flags(judge, tmp_path, capsys):
    tasks = ["multikey", "multivalue", "multiquery", "needles_8"]
    rows = judge(f"--tasks {' '.join(tasks)} multikey --n 1 --lengths 900 800 800 --depths 1 0 0")
    assert len(rows) == 2 * (3 * 2 + 8) and {r["task"] for r in rows} == set(tasks)
    parts = {(i + 0.5) / 8 for i in range(8)}
    assert {r["depth"] for r in rows if r["task"] == "needles_8"} == parts
    table = results_of(tmp_path / "out")["table"]
    assert [e["length"] for e in table if e["task"] != "NIAH(M)"] == [800, 900] * 4
    for task in tasks:
        assert (tmp_path / "out" / f"needle_{task}.png").read_bytes()[:4] == b"\x89PNG"
    said = capsys.readouterr()
    assert "\nmultiquery (found" in said.out and "\nneedles_8, each in turn (found" in said.out
    assert "NIAH(M) (found" in said.out and "the mean of multikey, multivalue" in said.out
    # 2 x 2 layers x 2 heads x 12 x 900 tokens x 4 bytes
    assert "key-value cache at 900 tokens: 0.00 GiB (float32)" in said.err
    assert "to do: 28 prompts of 23,800 tokens together" in said.err
    assert "--depths is not for needles_8: the needles divide the text among them" in said.err
    assert "a short prompt is read at" in said.err


def test_a_prompt_that_cannot_be_made_is_refused_before_the_first_is_run(refused, haystack):
    """Each length and text has its own keys, so a later prompt may not fit where the first does."""

    def fits(length: int, repeat: int = 0) -> bool:
        try:
            row_seed = f"0/niah_single/{length}/{repeat}"
            return bool(make_sample(TASKS["niah_single"], haystack, length, 0.0, row_seed))
        except BadInput:
            return False

    n = next(n for n in range(20, 300) if fits(n) and not fits(n + 1))
    assert f"--lengths {n + 1} is too short" in refused(f"--n 1 --lengths {n} {n + 1}")
    n = next(n for n in range(20, 300) if fits(n, 0) and not fits(n, 1))
    assert f"--lengths {n} is too short" in refused(f"--n 2 --lengths {n}")


def test_a_model_that_cannot_be_compared_is_refused(refused, toy_dir, tmp_path):
    shutil.copytree(toy_dir, tmp_path / "other")
    write_tokenizer(tmp_path / "other", PROSE[:700], 300)
    error = refused(f"--compare {tmp_path / 'other'}")
    assert "its tokenizer or vocabulary is not that of --model" in error
    shutil.copytree(toy_dir, tmp_path / "mistral")
    config = json.loads((toy_dir / "config.json").read_text())
    config |= {"model_type": "mistral", "sliding_window": 350}
    (tmp_path / "mistral" / "config.json").write_text(json.dumps(config))
    error = refused("", model=tmp_path / "mistral")
    assert "sliding_window 350 is shorter than --lengths 400" in error


def test_ctrl_c_keeps_the_rows_and_says_so(judge, tmp_path, monkeypatch, capsys):
    measured, original = [], eval_needle.measure

    def stopping(*args):
        measured.append(1)
        if len(measured) > 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(eval_needle, "measure", stopping)
    with pytest.raises(SystemExit) as stop:
        judge()
    assert stop.value.code == 130
    kept = tmp_path / "out" / "needle.jsonl"
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted; the results written are kept in {kept}; the same command goes on from there"
    )
    assert len(kept.read_text().splitlines()) == 3


def test_a_haystack_that_repeats_is_announced(judge, toy_dir, tmp_path, capsys):
    tokens = len(load_tokenizer(toy_dir).encode(PROSE))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "needle.jsonl").touch()  # an empty file of results is fine
    for longest in (tokens, tokens + 1):
        judge(f"--tasks --loss --n 1 --lengths 300 {longest}")
        warned = f"shorter than --lengths {longest}, so it repeats" in capsys.readouterr().err
        assert warned == (longest > tokens)


def test_the_default_haystack_is_found_from_any_folder(essays_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, source = load_haystack(None)
    assert source == "data/essays" and sorted(essays_dir.glob("*.txt"))[0].read_text() in text


BAD_TEMPLATES = [
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
    ({"values": ["zyx"], "needles": 2, "task": "multiquery"}, "holds all but 1 of the needles'"),
    ({"keys": ["Anna"], "needles": 2, "task": "multiquery"}, "has 2 needles, but only 1 keys"),
    ({"task": "sing"}, "task 'sing' is none of"),
]


@pytest.mark.parametrize(
    ("flags", "match"),
    [
        ("--model nowhere", "model folder nowhere does not exist"),
        ("--lengths 300 50", "--lengths 50 is too short: with its keys this prompt takes at least"),
        ("--lengths 1", "--lengths 1 must be at least 2 tokens"),
        ("--tasks", "--tasks without a name takes --loss"),
        ("--haystack nowhere.txt", "nowhere.txt does not exist"),
        ("--depths 0.5 1.5", "--depths 1.5 must be within 0..1"),
        ("--depths nan", "--depths nan must be within 0..1"),
        ("--out README.md", "--out README.md is a file; a folder for the results is needed"),
        ("--n 0", "--n 0 must be at least 1"),
        *BAD_TEMPLATES,
    ],
)
def test_bad_input_is_one_line(flags, match, refused, tmp_path):
    flags = template(tmp_path, **flags) if isinstance(flags, dict) else flags
    assert match in refused(flags)


def test_without_a_result_the_error_says_who_makes_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        eval_needle.main([])
    assert "error: folder out, which train.py makes, does not exist" in capsys.readouterr().err


def template(folder, **fields) -> str:
    """The flag for a template with these fields."""
    path = folder / "needle.json"
    path.write_text(json.dumps(fields))
    return f"--template {path}"


def test_a_template_replaces_wording_words_and_defaults(judge, tmp_path, capsys):
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
    }
    rows = judge(f"{template(tmp_path, **fields)} --lengths 300 --n 1")
    assert [r["depth"] for r in rows] == [0.75, 0.25]
    assert {r["task"] for r in rows} == {"multiquery"}
    assert {r["expected"][0] for r in rows} == {"zyx", "wvu"}
    said = capsys.readouterr().out
    assert "\nmultiquery, each in turn (found" in said and "a question and an answer for" in said


def test_the_grid_and_who_is_compared_come_from_the_template_and_the_run(
    toy_dir, prose_file, tmp_path
):
    """All defaults: the original beside the result, from the old window to the new one, with the
    template's n; the original gets --n_beyond texts past its window."""
    model, window, base = load_pretrained(toy_dir), 256, str(tmp_path / "base")
    for folder, length in ((base, window), (tmp_path / "result", 4 * window)):
        model.config = model.config.with_rope(1e4, length)
        save_pretrained(model, folder, tokenizer_from=toy_dir)
    (tmp_path / "result" / "run.json").write_text(json.dumps({"settings": {"model": base}}))
    template(tmp_path / "result", n=2, n_beyond=9)
    eval_needle.main(
        f"--model {tmp_path / 'result'} --haystack {prose_file} --depths 0.5 --n_beyond 1".split()
    )
    lines = (tmp_path / "result" / "needle.jsonl").read_text().splitlines()
    counts = Counter((r["model"], r["length"] // window) for r in map(json.loads, lines))
    ours = {("result", times): 2 for times in (1, 2, 4)}
    assert counts == ours | {("original", 1): 2, ("original", 2): 1, ("original", 4): 1}


# ---- the figure --------------------------------------------------------------------------------


def draw(monkeypatch, tmp_path, lengths, **options):
    """The heat-map of three models: nothing, half, all found -> the matplotlib figure."""
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda f, *a, **k: figures.append(f) or save(f, *a, **k))
    windows = {
        "base": 512,
        "a/very/long/folder/name/of/a/model": 9999,
        "in quite a few words": 9999,
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
    draw_heatmap(tmp_path / "h.png", rows, "t", windows, **options)
    assert (tmp_path / "h.png").read_bytes()[:4] == b"\x89PNG"
    figures[0].draw_without_rendering()  # saved at another resolution: lay it out again
    return figures[0]


@pytest.mark.parametrize("lengths", [(300,), (300, 600), (300, 500, 600, 700, 800, 900, 131072)])
def test_labels_of_the_heatmap_do_not_overlap(lengths, tmp_path, monkeypatch):
    figure = draw(monkeypatch, tmp_path, lengths)
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
    """Panels in the given order; contrast of at least 4.5 in every cell; the line at the end of the
    trained window only where it is, and explained; nats on a scale of their own."""
    figure = draw(monkeypatch, tmp_path, (300, 600))
    axes = figure.axes[:-1]
    first_lines = [a.get_title().split("\n")[0] for a in axes]
    assert first_lines == ["base", "a/very/long/folder", "in quite a few"]
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
    assert "dashed" not in draw(monkeypatch, tmp_path, (300, 400)).get_supxlabel()
    *axes, bar = draw(monkeypatch, tmp_path, (300, 600), in_nats=True).axes
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


def test_a_small_run_later_hides_nothing_of_a_larger_one(judge, tmp_path, capsys):
    """One folder, three runs: the rows of the same setup stay in table and figure; another seed is
    another setup, and said to be there."""
    out = tmp_path / "out"
    judge()
    table = results_of(out)["table"]
    judge("--lengths 350 --n 1 --depths 0.333")
    later = results_of(out)
    assert [e for e in later["table"] if e["length"] != 350] == table
    cells = {(n, d) for n in (300, 400) for d in (0.0, 1.0)} | {(350, 0.333)}
    assert {(e["length"], e["depth"]) for e in later["cells"]} == cells
    assert later["overall"][0]["n"] == 9 and len(later["overall"]) == 1
    judge("--tasks passkey")
    assert {e["task"] for e in results_of(out)["table"]} == {"passkey", "niah_single"}
    assert (out / "needle_passkey.png").is_file()
    capsys.readouterr()
    judge("--seed 5 --lengths 300")
    assert [e["n"] for e in results_of(out)["table"]] == [4]
    assert "17 results there are of other models or settings" in capsys.readouterr().err


def test_controls_measure_the_gain_on_the_same_texts(judge, toy_dir, tmp_path, capsys):
    results = judge("--needle_alone --tasks niah_single common_words --lengths 6000")
    without, out = [r for r in results if r["model"] == "no needles"], tmp_path / "out"
    assert [r["score"] for r in without] == [0.0, 0.0]  # one a text, none for common words
    found = results_of(out)
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
    assert (out / "nats.png").is_file() and not list(out.glob("*common_words.png"))
    judge("--controls --lengths 300")
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


def test_a_result_of_a_model_changed_anywhere_is_measured_again(judge, toy_dir, tmp_path, capsys):
    """One element of one small norm; the same bytes at another time are the same model."""
    folder = tmp_path / "m"
    shutil.copytree(toy_dir, folder)
    before = len(judge(model=folder))
    model = load_pretrained(folder)
    model.model.norm.weight.data[7] += 1e-3
    save_pretrained(model, tmp_path / "changed")
    shutil.copy(tmp_path / "changed" / "model.safetensors", folder)
    assert len(judge(model=folder)) == 2 * before
    shutil.copy(toy_dir / "model.safetensors", folder)
    assert len(judge(model=folder)) == 2 * before
    assert "every result was measured before" in capsys.readouterr().err
    assert not list(folder.glob("needle*"))  # nothing is kept in the folder of another's model


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


def test_a_template_can_be_a_whole_ruler_task(judge, haystack, tmp_path):
    """Task text, several needles in words of its own, one question for all, the answer's beginning
    and RULER's fixed budget of 128 tokens: the prompt around the haystack is theirs, literally."""
    own = {
        "intro": "Some codes are hidden within the following text. Memorize them.\n",
        "needle": "A code for {key} is: {value}.",
        "question": "\nWhat are all the codes for {key}?",
        "answer": " The codes for {key} are",
        "keys": ["red fox", "blue owl", "old elk"],
        "needles": 3,
        "values": "uuids",
        "answer_tokens": 128,
        "haystack": "noise",
    }
    flags = template(tmp_path, task="multiquery", **own)
    (row,) = judge(f"{flags} --lengths 900 --depths 0.333 --n 1")
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert len(set(row["expected"])) == 3 and all(re.fullmatch(uuid, v) for v in row["expected"])
    assert row["depth"] == 0.333 and len(row["true_depths"]) == 3
    task = dataclasses.replace(TASKS["multiquery"], **own | {"keys": tuple(own["keys"])})
    ids = make_sample(task, haystack, 900, 0.333, "0/multiquery/900/0").ids
    assert hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:12] == row["prompt"]
    text = haystack.tokenizer.decode(ids.tolist())
    assert len(ids) == 900 - 128 and text.startswith(own["intro"])
    assert text.count("The lamp is lit.") > 4 and "says that" not in text  # noise, not the prose
    keys = re.search(r"\nWhat are all the codes for (.+)\? The codes for (.+) are$", text)
    first, second, last = keys[1].replace("and ", "").split(", ")
    assert keys[1] == keys[2] == f"{first}, {second}, and {last}"
    for key, value in zip((first, second, last), row["expected"], strict=True):
        assert text.count(f"A code for {key} is: {value}.") == 1


def test_what_a_template_says_for_its_own_task_is_not_lost_in_silence(judge, tmp_path, capsys):
    flags = template(tmp_path, task="multiquery", needles=2, intro="Codes.")
    flags += " --tasks multikey --lengths 500 --n 1"
    judge(flags)
    told = "needle.json is for its task multiquery, and not for --tasks multikey"
    assert told in capsys.readouterr().err
    template(tmp_path, needles=2)  # without a task: for all
    assert {len(r["true_depths"]) for r in judge(flags)} == {2, 4}
    assert "and not for --tasks" not in capsys.readouterr().err


def test_one_essay_one_haystack_one_depth(judge, tmp_path):
    """A folder with one short essay, --n 1, a depth and a length that are multiples of nothing."""
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "only.txt").write_text("Ein Aufsatz über Öl. Er ist kurz! Schluß.\n")
    flags = "--n 1 --lengths 613 --depths 0.333 --tasks niah_single multikey_hard passkey"
    rows = judge(f"{flags} --haystack {tmp_path / 'essays'}")
    assert [(r["length"], r["depth"]) for r in rows] == [(613, 0.333)] * 3
    assert all(0.2 < r["true_depth"] <= 0.333 for r in rows)


def test_any_answer_is_read_again_and_a_line_without_its_end_is_kept(tmp_path):
    rows = [dict.fromkeys(KEY, i) | {"output": "a\u2028b\x85c\n"} for i in range(4)]
    path = tmp_path / "needle.jsonl"
    for half in (rows[:2], rows[2:]):
        results = Results(tmp_path)
        for row in half:
            results.add(row)
        path.write_text(path.read_text().removesuffix("\n"))
    assert list(Results(tmp_path).known.values()) == rows
