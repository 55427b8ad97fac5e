"""eval_needle.py: exact prompts, scores by hand, shared prefixes, results that survive a kill."""

import dataclasses
import hashlib
import json
import math
import random
import re
import shutil
import signal
import textwrap
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import PROSE, edit_config, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

import eval_needle
from eval_needle import TASKS, Haystack, SharedPrefix, common_prefix, make_sample, score, text_loss
from model import BadInput, LlamaConfig, generate, load_pretrained, load_tokenizer, save_pretrained
from support.huggingface.config import yarn_scaling
from support.memory.count import LLAMA3_8B, forward_flops, training_flops
from support.needles.figures import draw_curves, draw_heatmap
from support.needles.haystack import MADE_UP, Hidden, listed, load_haystack
from support.needles.intervals import paired, resampled, student, wilson
from support.needles.results import Results
from support.needles.settings import parse, resolve
from support.needles.summary import gain, gains, summarise, versus
from support.needles.tasks import check_task


@pytest.fixture(scope="module")
def haystack(toy_dir):
    return Haystack(PROSE, load_tokenizer(toy_dir))


def text_of(stack, sample) -> str:
    return stack.tokenizer.decode(sample.ids.tolist())


def change(name: str, **fields) -> eval_needle.Task:
    return dataclasses.replace(TASKS[name], **fields)


# ---- prompts -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stacks(haystack, toy_dir, tmp_path_factory):
    """Also a tokenizer that merges digits and adds a BOS, a text that repeats many times, one in
    other scripts, and one with hard-wrapped lines."""
    folder = tmp_path_factory.mktemp("tokenizer")
    numbers = " ".join(f"is: {random.Random(i).randint(10**6, 10**7 - 1)}." for i in range(999))
    write_tokenizer(folder, PROSE + numbers, 900, digits=False, add_bos_token=True)
    merging, plain = load_tokenizer(folder), haystack.tokenizer
    assert len(merging.encode(" 4821906")) < 7 and merging.adds_bos and not plain.adds_bos
    scripts = "雪の日は静かです。春になれば花が咲く！ Très bien, «ça va». Ñandú 🐦 ok? Да. " * 40
    short = Haystack("One essay. It is short, and it is all there is.", plain)
    wrapped = Haystack(textwrap.fill(PROSE, 40), plain)
    return [haystack, Haystack(PROSE, merging), short, Haystack(scripts, plain), wrapped]


@given(
    st.integers(0, 4),
    st.sampled_from([*sorted(TASKS), "uuids"]),
    st.integers(700, 30_000),
    st.sampled_from([0.0, 0.333, 0.5, 1.0]),
    st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_prompts_are_exact(stacks, stack, name, length, depth, seed):
    """[E11] Prompt and answer budget are `length` tokens, also where the haystack has to repeat; it
    is not encoded again. Keys and values are in their needles and nowhere else, and a sentence ends
    before each needle. Other depths share all but the place."""
    stack = stacks[0 if name == "common_words" else stack]  # which takes many words, and tokens
    length = max(length, 6000) if name == "common_words" else length
    task = TASKS.get(name, change("niah_single", keys="uuids", values="uuids"))
    sample = make_sample(task, stack, length, depth, f"{seed}")
    assert len(sample.ids) + sample.answer_tokens == length
    bos = (sample.ids == stack.tokenizer.bos_id).nonzero().flatten().tolist()
    assert bos == [0] * stack.tokenizer.adds_bos
    text, asked = text_of(stack, sample), task.asked(depth)
    prompts = eval_needle.make_prompts(task, stack, length, f"{seed}")
    assert text.endswith(stack.tokenizer.decode(prompts.questions[asked]))
    plain = make_sample(task, stack, length, depth, f"{seed}", "no needles").ids.tolist()
    end = len(plain) - len(prompts.questions[asked])
    assert plain[:end] == prompts.head + prompts.hidden.hay[: end - len(prompts.head)].tolist()
    needles = [stack.tokenizer.decode(ids).strip() for ids, _ in prompts.needles]
    assert len(sample.true_depths) == len(needles) == task.needles
    for needle in needles:
        before, _ = text.split(needle)
        assert before.rstrip()[-1] in ".!?。！？»"
    for answer in sample.expected:
        inside = sum(needle.count(answer) for needle in needles)
        assert not needles or text.count(answer) == inside > 0
    if task.ask == "each":  # the needle of the part that holds `depth`
        part, n = min(int(depth * task.needles), task.needles - 1), task.needles
        assert part / n - 0.02 < sample.true_depth < (part + 1) / n or length < 3000
    elif needles:
        assert sample.true_depth == 0.0 if depth == 0.0 else sample.true_depth <= depth
        assert depth - sample.true_depth < (0.02 if length > 3000 else 0.25)
        assert make_sample(task, stack, length, 0.7, f"{seed}").expected == sample.expected
        assert make_sample(task, stack, length, depth, "else").expected != sample.expected


NUMBER = r"One of the special magic numbers for ([\w -]+) is: (\d{7})\."
ONE = (
    "What is the special magic number for {0} that the text above mentions?"
    " The special magic number for {0} is:"
)
ALL = (
    "What are all the special magic numbers for {0} that the text mentions?"
    " The special magic numbers for {0} are:"
)
BY_HAND = dict.fromkeys(("niah_single", "multikey", "multikey_hard", "needles_8"), (NUMBER, ONE))
BY_HAND |= dict.fromkeys(("multivalue", "multiquery"), (NUMBER, ALL))
BY_HAND["passkey"] = (
    r"The (pass key) is (\d{7})\. Remember it: \2 is the pass key\.",
    "What is the pass key that the text above mentions? The pass key is",
)  # task -> (its needles: key, value; its question)


@pytest.mark.parametrize("name", BY_HAND)
def test_what_is_hidden_and_asked_by_hand(name, haystack):
    """The question, literally, holds the key of each answer; eight in turn come after one text."""
    task, (needle, question) = TASKS[name], BY_HAND[name]
    samples = [make_sample(task, haystack, 4000, depth, "s") for depth in task.depths([0.3])]
    for sample in samples:
        text = text_of(haystack, sample)
        key_of = {value: key for key, value in re.findall(needle, text)}
        assert len(key_of) == task.needles or name == "multikey_hard"
        keys = list(dict.fromkeys(key_of[answer] for answer in sample.expected))
        assert len(keys) == (4 if name == "multiquery" else 1)
        assert len(set(sample.expected)) == (4 if task.ask == "all" else 1)
        assert text.endswith("\n\n" + question.format(listed(keys)))
    assert len({sample.expected[0] for sample in samples}) == len(samples)
    assert [s.true_depth for s in samples] == sorted(s.true_depth for s in samples)
    assert all(common_prefix(samples[0].ids, s.ids) > 3800 for s in samples)


def test_a_chain_of_variables_is_in_order_and_all_of_it_is_asked_for(haystack):
    """RULER's variable tracking, by hand: VAR A = 12345., VAR B = VAR A., ... in that order."""
    sample = make_sample(TASKS["variable_tracking"], haystack, 1200, 0.3, "s")
    text = text_of(haystack, sample)
    names, values = zip(*re.findall(r"VAR ([A-Z]{5}) = (.*?)\.", text), strict=True)
    assert list(names) == sample.expected and len(set(names)) == 5
    assert list(values[1:]) == [f"VAR {name}" for name in names[:-1]]
    assert values[0].isdecimal() and text.endswith(f"with the value {values[0]} are:")
    assert sample.true_depths == sorted(sample.true_depths) and sample.true_depth <= 0.3


@pytest.mark.parametrize("length", [6000, 20_000])
def test_ten_words_are_common_and_all_others_are_not(haystack, length):
    """RULER's common words extraction: in the numbered list each of the ten comes several times as
    often as any other word."""
    sample = make_sample(TASKS["common_words"], haystack, length, 0.5, "s")
    counts = Counter(re.findall(r"\d+\. (\S+)", text_of(haystack, sample))).most_common()
    assert {word for word, _ in counts[:10]} == set(sample.expected) and sample.true_depths == []
    assert counts[9][1] >= 3 * counts[10][1] and counts[10][1] <= 3
    assert length < 20_000 or 24 <= counts[9][1] <= 30
    with pytest.raises(BadInput, match="--lengths 900 is too short for a list of common words"):
        make_sample(TASKS["common_words"], haystack, 900, 0.5, "s")


def test_words_that_the_haystack_holds_are_not_hidden(toy_dir):
    """Keys, values and numbers; compared after NFC, without case. An answer is never empty."""
    tokenizer, niah = load_tokenizer(toy_dir), TASKS["niah_single"]
    story, cafe = Haystack(PROSE, tokenizer), Haystack("A CAFÉ is here. " * 99, tokenizer)
    task = change("niah_single", keys=("Ada", "Bob", "Zoe"))  # Ada and Bob are in the story
    tea = change("niah_single", values=("Cafe\u0301", "tea"))
    for seed in range(6):
        sample = make_sample(task, story, 900, 0.5, f"{seed}")
        assert text_of(story, sample).endswith("number for Zoe is:")
        assert make_sample(tea, cafe, 700, 0.5, f"{seed}").expected == ["tea"]
    (number,) = make_sample(niah, story, 600, 0.5, "s").expected
    spoiled = Haystack(f"The number {number} is here. " + PROSE, tokenizer)
    assert make_sample(niah, spoiled, 600, 0.5, "s").expected != [number]

    def hide_nothing(task, haystack, length, rng):
        return Hidden(haystack.cut(length, rng), ["The code is."], ["What is the code?"], [[""]])

    check_task("own", change("niah_single", hide=hide_nothing, question="What is it?", answer=""))

    for fields, why in (
        ({"keys": ("Ada", "Bob")}, "the needles need 1 words, the haystack lacks only 0 of theirs"),
        ({"hide": hide_nothing}, "an expected answer is empty"),
    ):
        with pytest.raises(BadInput, match=why):
            make_sample(change("niah_single", **fields), story, 900, 0.5, "0")


@pytest.mark.parametrize("name", [name for name, task in TASKS.items() if task.needles])
def test_controls_leave_out_the_needles_or_all_but_the_needle(name, haystack):
    """Without needles a prompt is as long as with them; alone, what is asked for is in a short
    text, and what is not asked for is in none."""
    task = TASKS[name]
    whole, without, alone = (
        make_sample(task, haystack, 1500, 0.4, "s", control)
        for control in (None, "no needles", "needle alone")
    )
    text, short = (text_of(haystack, sample) for sample in (without, alone))
    assert len(without.ids) == len(whole.ids) and 256 < len(alone.ids) < 700
    assert whole.expected == without.expected == alone.expected
    assert not any(answer in text for answer in whole.expected)
    assert all(answer in short for answer in whole.expected)
    if task.ask == "each":
        others = [make_sample(task, haystack, 1500, d, "s") for d in (0.1, 0.6)]
        assert not any(s.expected[0] in short for s in others)


@pytest.mark.parametrize(("text", "at"), [("คำ ภาษา ไทย ", "spaces"), ("a line\n", "lines")])
def test_a_text_without_sentence_ends_has_places_for_needles(toy_dir, text, at):
    stack = Haystack(text * 400, load_tokenizer(toy_dir))
    assert stack.at == at
    for depth in (0.0, 0.5, 1.0):
        sample = make_sample(TASKS["niah_single"], stack, 1500, depth, "0")
        assert 0 <= depth - sample.true_depth < 0.02
    with pytest.raises(BadInput, match="hardly any sentence ends, line breaks or spaces"):
        Haystack("คำภาษาไทย" * 400, load_tokenizer(toy_dir))


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


def result_of(model="m", repeat=0, score=0.0, nats=-1.0, answers=1, **more) -> dict:
    """A line of needle.jsonl, made by hand."""
    row = {"model": model, "repeat": repeat, "score": score, "answer_logprob": nats}
    expected = [f"{repeat}{i}" for i in range(answers)]
    return {"task": "t", "length": 9, "depth": 0, "prompt": "p", "expected": expected} | row | more


def test_multiquery_interval_draws_whole_haystacks():
    """[E22] Two haystacks, one all right and one all wrong: resampling gives 0, 1/2 or 1, while
    Wilson on the 16 answers, taken for independent, would be far too sure."""

    def entry(repeats=(0, 1), scores=(0.0, 1.0)) -> dict:
        pairs = zip(repeats, scores, strict=True)
        (found,) = summarise([result_of(repeat=r, score=s) for r, s in pairs for _ in range(8)])
        return found

    assert entry()["interval_95"] == [0.0, 1.0] and wilson(8, 16)[0] > 0.2
    assert entry()["texts"] == 2 and entry()["n"] == 16
    # two haystacks that agree prove little
    assert entry(scores=(1.0, 1.0))["interval_95"] == [round(x, 3) for x in wilson(16, 16)]
    assert entry(repeats=(0, 0))["interval_95"] == [round(x, 3) for x in wilson(8, 16)]
    cells = [result_of(repeat=i, score=i, depth=d) for d in range(8) for i in (0, 1)]
    intervals = [c["interval_95"] for c in summarise(cells, ("model", "task", "depth"))]
    assert intervals == [[round(x, 3) for x in wilson(1, 2)]] * 8
    assert resampled([[1.0, 0.0]] * 50) == (0.5, 0.5)


def test_niah_m_is_the_mean_of_its_three_tasks():
    """[E21]"""
    scores = {"multikey": (1.0, 1.0), "multivalue": (0.5, 0.0), "multiquery": (0.25, 0.25)}
    rows = [
        result_of(task=task, repeat=i, score=s, answers=2)
        for task, pair in scores.items()
        for i, s in enumerate(pair)
    ]
    entry = summarise(rows)[-1]
    assert entry["task"] == "NIAH(M)" and entry["mean"] == 0.5 and entry["n"] == 12
    assert not any(e["task"] == "NIAH(M)" for e in summarise(rows[:4]))


def test_gain_by_hand():
    """[E24] Two answers in a prompt: -3 nats with their needles and -9 without are 3 an answer;
    alone in a short text 4, so three quarters of the gain survive the distance."""
    rows = [
        result_of(label, repeat, 0.0, nats - 2 * repeat, answers=2)
        for label, nats in (("m", -3.0), ("none", -9.0), ("alone", -1.0), ("other", -2.0))
        for repeat in (0, 1)
    ]
    assert gain(rows[0], rows[2]) == 3.0
    whole, alone = gains(rows, "m", "none", "alone")
    assert whole["mean"] == 3.0 and alone["mean"] == 4.0 and whole["share_of_short_text"] == 0.75
    assert whole["interval_95"] == [3.0, 3.0] and whole["texts"] == 2


def test_models_are_compared_text_by_text_on_the_same_prompts():
    """[E30] Differences by hand: 1, 2, 3 nats (mean 2, standard deviation 1, t = 4.303 for three
    texts); the prompt that only one was asked counts for neither."""
    rows = [result_of("a", i, 1.0, -1.0) for i in range(4)]
    rows += [result_of("b", i, float(i > 0), -2.0 - i) for i in range(3)]
    rows += [result_of("b", 3, 1.0, -99.0, prompt="another")]
    (pair,) = versus(rows, "a")
    assert (pair["model"], pair["against"], pair["nats"]["texts"]) == ("a", "b", 3)
    assert pair["nats"]["mean"] == 2.0 and pair["nats"]["verdict"] == "not told apart"
    half = 4.303 / 3**0.5
    assert pair["nats"]["interval_95"] == pytest.approx([2 - half, 2 + half])
    assert pair["nats"]["texts_needed"] == 4  # 3.182 / 2 < 2
    assert pair["found"]["mean"] == pytest.approx(1 / 3)
    assert paired([-1.0, -2.0, -3.0, -2.0])["verdict"] == "below"
    assert paired([1.0])["interval_95"] is None and paired([1.0])["verdict"] == "not told apart"
    assert paired([0.0, 0.0])["texts_needed"] is None
    assert [student(n) for n in (5, 30)] == pytest.approx([2.571, 2.042], abs=4e-3)


# ---- running -----------------------------------------------------------------------------------


def test_text_loss_equals_the_plain_way(toy_dir):
    model = load_pretrained(toy_dir)
    ids = torch.randint(300, (251,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids[None, :-1])[0]
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").split(100)
    means, counts = zip(*text_loss(model, ids, 100), strict=True)
    assert means == pytest.approx([float(x.mean()) for x in losses], abs=1e-5)
    assert counts == (100, 100, 50)


@pytest.mark.parametrize("name", TASKS)
def test_shared_prefixes_change_nothing(name, toy_dir, haystack, monkeypatch):
    """Deep to shallow through one cache: nats are those of one pass of transformers over prompt and
    answer, answers those of each prompt alone, and less is prefilled."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(toy_dir, dtype=torch.float32).eval()
    model, task = load_pretrained(toy_dir), TASKS[name]
    depths = (0.9, 0.6, 0.3) if task.ask == "each" else (1.0, 0.75, 0.5)
    length = 5000 if name == "common_words" else 1500
    samples = [make_sample(task, haystack, length, d, "0") for d in depths]
    shared, prefilled = SharedPrefix(model), []

    def counting(ids, *args, original=model.hidden, **kwargs):
        prefilled.append(ids.shape[1])
        return original(ids, *args, **kwargs)

    monkeypatch.setattr(model, "hidden", counting)
    nats, answers = [], []
    for s in samples:
        nats.append(shared.log_probability(s.ids, s.answer_ids))
        answers.append(shared.answer(s.ids, 6, ()))
    assert sum(prefilled) < 0.75 * sum(len(s.ids) for s in samples)
    assert answers == [generate(model, s.ids, 6) for s in samples]
    for s, found in zip(samples, nats, strict=True):
        assert s.answer_ids.tolist() == haystack.tokenizer.encode(f" {listed(s.expected)}")
        with torch.no_grad():
            scores = theirs(torch.cat([s.ids, s.answer_ids])[None]).logits[0].log_softmax(-1)
        pairs = enumerate(s.answer_ids.tolist(), len(s.ids) - 1)
        assert found == pytest.approx(sum(float(scores[i, token]) for i, token in pairs), abs=1e-4)


@pytest.fixture
def figures(monkeypatch) -> list[Figure]:
    """The figures of a test. Their files are empty: nothing is laid out."""
    drawn: list[Figure] = []

    def savefig(figure, path, **options):
        drawn.append(figure)
        Path(path).touch()

    monkeypatch.setattr(Figure, "savefig", savefig)
    return drawn


GRID = "--lengths 300 400 --depths 0 1 --n 2"


@pytest.fixture
def judge(toy_dir, prose_file, tmp_path, capsys, figures):
    """judge(flags) -> the results in needle.jsonl, the report, and what was said on both streams.
    Of a flag given twice the last one counts."""

    def run(flags="", model=toy_dir, out=tmp_path / "out"):
        eval_needle.main(
            f"--model {model} --haystack {prose_file} --out {out} {GRID} {flags}".split()
        )
        said = capsys.readouterr()
        lines = (out / "needle.jsonl").read_text().removesuffix("\n").split("\n")
        rows = [json.loads(line) for line in lines]
        report = json.loads((out / "needle_results.json").read_text())
        return SimpleNamespace(rows=rows, report=report, out=said.out, err=said.err)

    return run


@pytest.fixture
def refused(toy_dir, prose_file, tmp_path, error_of):
    """refused(flags) -> the one error line; nothing is written."""

    def run(flags, model=toy_dir):
        argv = f"--model {model} --haystack {prose_file} --out {tmp_path}/out {GRID} {flags}"
        return error_of(eval_needle.main, argv.split(), tmp_path)

    return run


def template(folder, **fields) -> str:
    """The flag for a template with these fields."""
    path = folder / "needle.json"
    path.write_text(json.dumps(fields))
    return f"--template {path}"


def test_the_command_writes_results_tables_and_figures(judge, toy_dir, tmp_path):
    """Several tasks and the loss; flags that repeat a task or a length."""
    tasks = ["multikey", "multivalue", "multiquery", "needles_8"]
    found = judge(
        f"--loss --tasks {' '.join(tasks)} multikey --n 1 --lengths 900 800 800 --depths 1 0 0"
    )
    prompts = {"multikey": 4, "multivalue": 4, "multiquery": 4, "needles_8": 16, "loss": 2}
    assert Counter(r["task"] for r in found.rows) == prompts
    parts = {(i + 0.5) / 8 for i in range(8)}
    assert {r["depth"] for r in found.rows if r["task"] == "needles_8"} == parts
    for r in found.rows:
        assert r["seconds"] >= 0 and r["seed"] == 0 and r["model"] == toy_dir.name
        if r["task"] == "loss":
            assert 4 < r["score"] < 15  # a random model: about ln 400 = 6 or worse
        else:
            assert r["score"] == score(r["expected"], r["output"])
            assert r["answer_logprob"] < 0 < r["answer_tokens_scored"]
    n = Counter({e["task"]: e["n"] for e in found.report["table"] if e["length"] == 900})
    answers = {"multikey": 2, "multivalue": 8, "multiquery": 8, "NIAH(M)": 18, "needles_8": 8}
    assert n == answers | {"loss": 1}
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {
        f"{kind}_{task}.png" for task in tasks for kind in ("needle", "nats", "curves")
    }
    for part in (
        "\nmultiquery (found, 95 % interval; n answers)\n",
        "\nneedles_8, each in turn (log-probability of an answer, nats)\n",
        "NIAH(M): the mean of multikey, multivalue and multiquery\n",
        "\nloss (nats per token; number of texts)\n",
        "theta   window  ",
        "key-value cache at 900 tokens: 0.00 GiB (float32)",
        "to do: 30 prompts of 25,500 tokens together",
        "--depths is not for needles_8: the needles divide the text among them",
        "tokens are read at",
    ):
        assert part in found.out + found.err
    assert "so it repeats" not in found.err


def test_settings_are_resolved_without_a_file():
    """From the flags, the windows, a template and the device alone: here what a GPU would get."""
    flags = parse(["--n_beyond", "1", "--needle_alone"], "")
    shape = (97, 64, 192, 2, 4, 2, 16)
    configs = {"old": LlamaConfig(*shape, 100), "new": LlamaConfig(*shape, 900)}
    models, fields = ("new", ("old",), "old"), {"n": 3, "task": "passkey", "haystack": "noise"}
    args = (flags, eval_needle.TASKS, models, configs, Path("needle.json"), fields)
    found, tasks = resolve(*args, "cuda")
    assert (found.lengths, found.n, found.n_beyond) == ((100, 300, 900), 3, 1)
    assert (found.dtype, found.tasks, found.out) == ("torch.bfloat16", ("passkey",), "new")
    assert len(found.controls) == 2 and found.haystack is None
    assert tasks["passkey"].haystack == "noise"
    assert resolve(*args, "cpu")[0].dtype == "torch.float32"


def test_results_survive_a_stop_and_are_not_measured_again(judge, tmp_path, monkeypatch, capsys):
    """Ctrl-C before the fourth; then a result of an older version and a line that a kill cut off.
    Answers may hold line separators."""
    path, measured, original = tmp_path / "out" / "needle.jsonl", [], eval_needle.measure
    stops = iter([False, False, False, True])

    def measure(*args) -> dict:
        if next(stops, False):
            signal.raise_signal(signal.SIGINT)
        measured.append(original(*args) | {"output": "a\u2028b\x85c\n", "seconds": 0})
        return measured[-1]

    monkeypatch.setattr(eval_needle, "measure", measure)
    with pytest.raises(SystemExit) as stop:
        judge("--lengths 300")
    assert stop.value.code == 130 and len(measured) == 3
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"interrupted; the results written are kept in {path}; the same command goes on from there"
    )
    lines, old = path.read_text().split("\n"), dict(measured[2])
    del old["answer_logprob"]  # which that version did not measure
    # the kill came in the middle of a character
    path.write_bytes("\n".join([*lines[:2], json.dumps(old), lines[0][:40] + "é"]).encode()[:-1])
    again = judge("--lengths 300 --n 3").rows
    assert len(measured) == 3 + 4  # the third again, the fourth, and the new texts
    assert again == [*measured[:2], old, *measured[3:]] and measured[3] == measured[2]
    path.write_text(path.read_text().removesuffix("\n"))  # of a whole line only its end is missing
    assert judge("--lengths 300 --n 3").rows == again and len(measured) == 7
    assert path.read_text().endswith("\n")
    path.write_text(json.dumps(measured[0] | {"answer_logprob": -math.inf}) + "\n")
    assert not Results(path.parent).known  # nor is one that overflowed taken


@pytest.mark.parametrize("rope", [(1e7, 512), (1e4, 512, yarn_scaling(64, 512)), (1e4, 512)])
def test_the_untrained_row_comes_by_itself_where_the_run_changed_the_rope(
    rope, judge, toy_dir, tmp_path
):
    """It has the original's weights under the result's theta and scaling: a model of its own."""
    other, result, changed = load_pretrained(toy_dir), tmp_path / "result", rope != (1e4, 512)
    other.config = other.config.with_rope(*rope)
    save_pretrained(other, result, tokenizer_from=toy_dir)
    (result / "run.json").write_text(json.dumps({"settings": {"model": str(toy_dir)}}))
    found = judge("--tasks --loss --lengths 300 --n 1", model=result)
    models, losses = found.report["models"], {e["model"]: e["mean"] for e in found.report["table"]}
    labels = ["original", *["untrained"] * changed, "result"]
    assert list(models) == labels
    assert (losses["result"] == losses["original"]) == (not changed)
    assert losses[labels[-2]] == losses["result"]  # the same weights, the same RoPE
    own = models["result"] | {"folder": str(toy_dir)}
    assert own["rope_theta"] == rope[0] and own["window"] == 512
    assert own["rope_scaling"] == (rope[2] if rope[2:] else None)
    assert not changed or models["untrained"] == own
    assert re.search(rf"\nresult +{rope[0]:,.0f} +512 ", found.out)


def test_any_of_several_end_tokens_stops_an_answer(judge, haystack, toy_dir, tmp_path):
    folder, flags = tmp_path / "m", "--lengths 300 --depths 0 --n 1"
    shutil.copytree(toy_dir, folder)
    (before,) = judge(flags, model=folder, out=tmp_path / "a").rows
    first = make_sample(TASKS["niah_single"], haystack, 300, 0.0, "0/niah_single/300/0").ids
    ends = [haystack.tokenizer.eos_id, generate(load_pretrained(folder), first, 1)[0]]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    (after,) = judge(flags, model=folder, out=tmp_path / "b").rows
    assert before["output"] and after["output"] == ""
    assert after["answer_logprob"] == before["answer_logprob"]


def test_the_grid_and_who_is_compared_come_from_the_template_and_the_run(
    judge, toy_dir, prose_file, tmp_path, figures
):
    """All defaults: the original beside the result, from the old window to the new one, with the
    template's n; the original gets --n_beyond texts past its window. Other models in its place are
    not taken silently."""
    model, window, result = load_pretrained(toy_dir), 256, tmp_path / "result"
    original = tmp_path / "first"
    for folder, length in ((original, window), (result, 4 * window)):
        model.config = model.config.with_rope(1e4, length)
        save_pretrained(model, folder, tokenizer_from=toy_dir)
    (result / "run.json").write_text(json.dumps({"settings": {"model": str(original)}}))
    template(result, n=2, n_beyond=9)
    eval_needle.main(f"--model {result} --haystack {prose_file} --depths 0.5 --n_beyond 1".split())
    rows = map(json.loads, (result / "needle.jsonl").read_text().splitlines())
    counts = Counter((r["model"], r["length"] // window) for r in rows)
    ours = {("result", times): 2 for times in (1, 2, 4)}
    assert counts == ours | {("original", 1): 2, ("original", 2): 1, ("original", 4): 1}
    found = judge(f"--compare {toy_dir} --lengths 300 --n_beyond 1", model=result)
    assert list(found.report["models"]) == [toy_dir.name, "result"]
    assert f"--compare leaves out the original, {original}, and so its row untrained" in found.err


def test_a_small_run_later_hides_nothing_of_a_larger_one(judge, tmp_path):
    """One folder, several runs: the rows of the same setup stay in table and figure; another seed
    is another setup, and said to be there."""
    table = judge().report["table"]
    later = judge("--lengths 350 --n 1 --depths 0.333").report
    assert [e for e in later["table"] if e["length"] != 350] == table
    cells = {(n, d) for n in (300, 400) for d in (0.0, 1.0)} | {(350, 0.333)}
    assert {(e["length"], e["depth"]) for e in later["cells"]} == cells
    assert later["overall"][0]["n"] == 9 and len(later["overall"]) == 1
    found = judge("--tasks passkey")
    assert {e["task"] for e in found.report["table"]} == {"passkey", "niah_single"}
    assert (tmp_path / "out" / "needle_passkey.png").is_file()
    found = judge("--seed 5 --lengths 300")
    assert [e["n"] for e in found.report["table"]] == [4]
    assert "17 results there are of other models or settings" in found.err


def test_controls_measure_the_gain_on_the_same_texts(judge, toy_dir, tmp_path):
    found = judge("--needle_alone --tasks niah_single common_words --lengths 5000 --depths 0.5")
    without, report = [r for r in found.rows if r["model"] == "no needles"], found.report
    assert [r["score"] for r in without] == [0.0, 0.0]  # one a text, none for common words
    assert list(report["models"]) == [toy_dir.name]  # a control is not a model
    whole, alone = report["gains"]
    assert (whole["model"], alone["model"]) == (toy_dir.name, "needle alone")
    nats = {e["model"]: e["nats"] for e in report["overall"] if e["task"] == "niah_single"}
    for entry in (whole, alone):
        expected = nats[entry["model"]] - nats["no needles"]
        assert entry["mean"] == pytest.approx(expected, abs=2e-4)
    assert whole["share_of_short_text"] == whole["mean"] / alone["mean"]
    assert "with its needles" in found.out
    drawn = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert drawn == {"needle.png", "nats.png", "curves.png"}  # common words have no depth
    found = judge("--controls --lengths 300")
    assert "the original is not known" in found.err


def test_a_result_of_a_model_changed_anywhere_is_measured_again(judge, toy_dir, tmp_path):
    """One element of one small norm; the same bytes at another time are the same model."""
    folder, flags = tmp_path / "m", "--lengths 300 --depths 0 --n 1"
    shutil.copytree(toy_dir, folder)
    assert len(judge(flags, model=folder).rows) == 1
    model = load_pretrained(folder)
    model.model.norm.weight.data[7] += 1e-3
    save_pretrained(model, tmp_path / "changed")
    for source in (tmp_path / "changed", toy_dir):
        shutil.copy(source / "model.safetensors", folder)
        assert len(judge(flags, model=folder).rows) == 2
    assert not list(folder.glob("needle*"))  # nothing is kept in the folder of another's model


def test_a_haystack_that_repeats_is_announced(judge, toy_dir, tmp_path):
    (tmp_path / "short.txt").write_text(PROSE[:1000])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "needle.jsonl").touch()  # an empty file of results is fine
    tokens = len(load_tokenizer(toy_dir).encode(PROSE[:1000]))
    for longest in (tokens, tokens + 1):
        found = judge(f"--haystack {tmp_path}/short.txt --tasks --loss --n 1 --lengths {longest}")
        assert ("so it repeats" in found.err) == (longest > tokens)


def test_the_default_haystack_is_found_from_any_folder(essays_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, source = load_haystack(None)
    assert source == "data/essays" and sorted(essays_dir.glob("*.txt"))[0].read_text() in text


def test_flops_of_a_prompt_add_up_to_those_of_training():
    whole = forward_flops(LLAMA3_8B, 0, 4096)
    head = 2 * 4096 * LLAMA3_8B.vocab_size * LLAMA3_8B.hidden_size
    assert training_flops(LLAMA3_8B, 4096) == 3 * (whole + head)
    assert forward_flops(LLAMA3_8B, 0, 1000) + forward_flops(LLAMA3_8B, 1000, 4096) == whole


def test_smollm2_finds_a_needle_inside_its_window(smollm2_dir, essays_dir):
    """All parts at once on a real model and text: two needles at 512 tokens, both found."""
    shared, tokenizer = SharedPrefix(load_pretrained(smollm2_dir)), load_tokenizer(smollm2_dir)
    essays = Haystack(sorted(essays_dir.glob("*.txt"))[0].read_text(), tokenizer)
    for repeat in range(2):
        sample = make_sample(TASKS["niah_single"], essays, 512, 0.5, f"0/{repeat}")
        answer = shared.answer(sample.ids, sample.answer_tokens, (2,))
        assert score(sample.expected, tokenizer.decode(answer)) == 1


def test_made_up_keys_that_the_haystack_holds_are_made_up_again(haystack):
    task, row_seed = change("niah_single", keys="letters"), "0/niah_single/300/0"
    word = MADE_UP["letters"](random.Random(row_seed))
    text = Haystack(PROSE.replace("Nobody", word), haystack.tokenizer)
    asked = re.findall(
        "for ([A-Z]+) that", text_of(text, make_sample(task, text, 300, 0, row_seed))
    )
    assert [len(key) for key in asked] == [5] and asked != [word]


# ---- templates, and what is refused ------------------------------------------------------------


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
    (row,) = judge(f"{flags} --lengths 900 --depths 0.333 --n 1").rows
    assert row["depth"] == 0.333 and len(row["true_depths"]) == 3
    task = change("multiquery", **own | {"keys": tuple(own["keys"])})
    sample = make_sample(task, haystack, 900, 0.333, "0/multiquery/900/0")
    assert hashlib.sha256(sample.ids.numpy().tobytes()).hexdigest()[:12] == row["prompt"]
    text = text_of(haystack, sample)
    assert len(sample.ids) == 900 - 128 and text.startswith(own["intro"])
    assert text.count("The lamp is lit.") > 4 and "says that" not in text  # noise, not the prose
    uuid = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    keys = {value: key for key, value in re.findall(rf"A code for (\w+ \w+) is: ({uuid})\.", text)}
    asked = listed([keys[value] for value in row["expected"]])
    assert len(keys) == 3 and set(keys.values()) == set(own["keys"])
    assert text.endswith(f"\nWhat are all the codes for {asked}? The codes for {asked} are")


def test_a_template_is_for_its_own_task_or_else_for_all(judge, tmp_path):
    """Its needles may be asked for in turn; what is not used is not lost in silence."""
    fields = {"needle": "The code of {key} is {value}!", "intro": "", "task": "multiquery"}
    fields |= {"keys": ["Anna", "Bert"], "values": ["zyx", "wvu"], "ask": "each", "needles": 2}
    flags = f"{template(tmp_path, **fields)} --lengths 500 --n 1"
    found = judge(flags)
    depths = [(r["task"], r["depth"]) for r in found.rows]
    assert depths == [("multiquery", 0.75), ("multiquery", 0.25)]
    assert {r["expected"][0] for r in found.rows} == {"zyx", "wvu"}
    assert "\nmultiquery, each in turn (found" in found.out
    told = "needle.json is for its task multiquery, and not for --tasks multikey"
    assert told in judge(f"{flags} --tasks multikey").err
    template(tmp_path, needles=3)
    found = judge(f"{flags} --tasks multikey")
    assert Counter(len(r["true_depths"]) for r in found.rows)[3] == 2
    assert "and not for --tasks" not in found.err


BAD = [  # flags (more of them are in test_bad_input.py), or the fields of a template
    ("--lengths 300 50", "--lengths 50 is too short: with its keys this prompt takes at least"),
    ("--lengths 1", "--lengths 1 must be at least 2 tokens"),
    ("--haystack nowhere.txt", "nowhere.txt does not exist"),
    ("--depths 0.5 nan", "--depths nan must be within 0..1"),
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
    ({"values": ["ab", "tea", "cab"]}, "values: 'ab' is part of 'cab'"),
    ({"n": True}, "n is True, expected: int"),
    ({"needles": 0}, "needles is 0, expected: int"),
    ({"values": ["zyx"], "needles": 2, "task": "multiquery"}, "haystack lacks only 1 of theirs"),
    ({"keys": ["Anna"], "needles": 2, "task": "multiquery"}, "needs 2 keys or more, and has 1"),
    ({"values": ["zyx"], "haystack": "needles"}, "needs more values than its needles have"),
    ({"keys": ["Anna"], "task": "multikey_hard"}, "needs 2 keys or more, and has 1"),
    ({"values": ["zyx", "for"]}, "value 'for' occurs in its own wording or keys"),
    ({"values": ["lim", "zyx"], "task": "multikey_hard"}, "value 'lim' occurs in"),
    ({"task": "multivalue", "ask": "each"}, "ask 'each' is for needles with a key of their own"),
    ({"task": "variable_tracking", "ask": "each"}, "is for needles with a key of their own"),
    ({"task": "variable_tracking", "needle": "{value}"}, "needle must hold {key} and {value}"),
    ({"task": "common_words", "needles": 3}, "hides no needles, found: needles 3"),
    ({"task": "sing"}, "task 'sing' is none of"),
    ({"ask": "none"}, "ask 'none' is none of first, each, all"),
]


@pytest.mark.parametrize(("flags", "match"), BAD)
def test_bad_input_is_one_line(flags, match, refused, tmp_path):
    flags = template(tmp_path, **flags) if isinstance(flags, dict) else flags
    assert match in refused(flags)


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


def test_a_model_that_cannot_be_judged_is_refused(refused, toy_dir, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    shutil.copytree(toy_dir, other)
    write_tokenizer(other, PROSE[:700], 300)
    error = refused(f"--compare {other}")
    assert "its tokenizer or vocabulary is not that of --model" in error
    shutil.copy(toy_dir / "tokenizer.json", other)
    edit_config(other, model_type="mistral", sliding_window=350)
    error = refused("", model=other)
    assert "sliding_window 350 is shorter than --lengths 400" in error
    model = load_pretrained(toy_dir)
    model.model.norm.weight.data *= 1e37
    save_pretrained(model, tmp_path / "loud", tokenizer_from=toy_dir)
    assert "loud gives -inf nats, so its numbers overflow in torch.float32" in refused(
        "", model=tmp_path / "loud"
    )
    assert "loud gives inf nats" in refused("--tasks --loss", model=tmp_path / "loud")
    (tmp_path / "link").symlink_to(other)
    assert "link is --model itself" in refused(f"--compare {tmp_path}/link", model=other)
    monkeypatch.chdir(tmp_path)  # where no run has been
    with pytest.raises(SystemExit):
        eval_needle.main([])
    assert "error: folder out, which train.py makes, does not exist" in capsys.readouterr().err


# ---- the figures -------------------------------------------------------------------------------


@pytest.fixture
def heatmap(figures, tmp_path):
    """heatmap(lengths) -> the figure of three models: nothing, half, all found."""
    windows = {
        "base": 512,
        "a/very/long/folder/name/of/a/model": 9999,
        "in quite a few words": 9999,
    }

    def draw(lengths, **options):
        rows = [
            result_of(m, j, float((i, j % 2) > (1, 0)), -float(i), length=n, depth=d)
            for m in windows
            for n in lengths
            for i, d in enumerate((0.0, 0.5, 1.0))
            for j in range(4)
        ]
        cells = summarise(rows, ("model", "task", "length", "depth"))
        draw_heatmap(tmp_path / "h.png", cells, windows, **options)
        return figures[-1]

    return draw


@pytest.mark.parametrize("lengths", [(300,), (300, 600), (300, 500, 600, 700, 800, 900, 131072)])
def test_labels_of_the_heatmap_do_not_overlap(lengths, heatmap):
    figure = heatmap(lengths)
    figure.draw_without_rendering()
    axes = figure.axes[:-1]  # the last is the colour bar
    titles = [a.title.get_window_extent() for a in axes]
    ticks = [t.get_window_extent() for a in axes for t in a.get_xticklabels()]
    for boxes in (titles, ticks):
        assert all(a.x1 < b.x0 for a, b in zip(boxes, boxes[1:], strict=False))
    assert titles[0].x0 > 0 and max(t.y1 for t in titles) <= figure.bbox.y1


def test_the_heatmap_can_be_read(heatmap):
    """Panels in the given order; black on each cell's colour has a contrast of at least 4.5 (WCAG);
    the line at the end of the trained window only where it is, and explained; nats on their own
    scale."""
    figure = heatmap((300, 600))
    axes = figure.axes[:-1]
    first_lines = [a.get_title().split("\n")[0] for a in axes]
    assert first_lines == ["base", "a/very/long/folder", "in quite a few"]
    assert [len(a.lines) for a in axes] == [1, 0, 0]
    assert "dashed line: end of the trained window" in figure.get_supxlabel()
    assert "n = 4 answers a cell" in axes[0].get_title()
    cells = {t.get_position(): t.get_text() for t in axes[0].texts}
    assert cells == {(x, y): mean for x in (0, 1) for y, mean in enumerate(("0%", "50%", "100%"))}
    for step in range(11):
        red, green, blue = (c**2.2 for c in axes[0].images[0].cmap(step / 10)[:3])
        assert (0.2126 * red + 0.7152 * green + 0.0722 * blue + 0.05) / 0.05 > 4.5
    assert "dashed" not in heatmap((300, 400)).get_supxlabel()
    *axes, bar = heatmap((300, 600), in_nats=True).axes
    cells = {(t.get_position()[1], t.get_text()) for a in axes for t in a.texts}
    assert cells == {(0, "0.00"), (1, "-1.00"), (2, "-2.00")}
    assert axes[0].images[0].get_clim() == (-2.0, 0.0) and "nats" in bar.get_ylabel()


def test_no_needle_is_drawn_farther_than_the_text_is_long(tmp_path, figures):
    needle = result_of(length=1024) | {"expected": ["7"], "output": "7"}
    draw_curves(tmp_path / "c.png", [needle | {"true_depth": d} for d in (0.0, 1.0)], "t")
    assert figures[0].axes[0].lines[0].get_xdata().tolist() == [0.5 / 8, 7.5 / 8]


def test_a_model_has_one_colour_in_both_panels_of_the_curves(tmp_path, figures):
    """Also where the loss of another, drawn before it, was not measured."""
    needles = [result_of(m, length=1024, output="", true_depth=0.5) for m in ("a", "b")]
    loss = {"model": "b", "task": "loss", "length": 1024, "loss_by_1024": [3.0]}
    draw_curves(tmp_path / "c.png", [*needles, loss], "t")
    left, right = figures[0].axes
    assert right.lines[0].get_color() == left.lines[1].get_color() != left.lines[0].get_color()
