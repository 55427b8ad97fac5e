"""Needle in a haystack: can the model find a sentence hidden far back in a long text?

    python eval_needle.py    # judge the model in out/ and the one that train.py started from

Sentences such as "One of the special magic numbers for Lima is: 4821906." are hidden in a long
text; at the end the model is asked for one or more of them. Each prompt is scored twice: by the
share of the expected answers in the model's greedy continuation, and by the log-probability, in
nats, of the expected answer. Models that find equally many can still be told apart in nats.

The structure (task text, haystack, question, beginning of the answer) and the first score are
those of RULER (Hsieh et al., 2404.06654), the grid of lengths and depths that of gkamradt's test;
the wording is ours, and --template replaces it.

What is exact here: prompt and answer budget together are `length` tokens, asserted; the prompt is
built from token ids and never encoded again as a whole; a BOS is put in front once, and only if
the checkpoint's own tokenizer does so; needles go in at sentence ends found in the decoded text;
their keys and values occur nowhere else in the haystack, asserted.

Files, by default in the folder of --model: needle.jsonl (a result per line; what is there is not
run again), needle_results.json, needle.png, nats.png, curves.png.
Does NOT do: chat templates, sampling. Glossary: see model.py.
"""

import bisect
import dataclasses
import functools
import hashlib
import math
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from model import (
    KVCache,
    Llama,
    LlamaConfig,
    generate,
    linear_cross_entropy,
    load_pretrained,
    load_tokenizer,
    prefill,
)
from recipe import split_segments
from support.data.segments import CLOSERS, STOPS, WIDE_STOPS
from support.memory.kernels import use_flash_package
from support.needles import tasks as task_table
from support.needles.cost import LAYOUT, announce, prompt_flops, tell_time
from support.needles.haystack import CITIES, NOISE, Hidden, fold, listed, load_haystack
from support.needles.report import write_report
from support.needles.results import Results, setup_of
from support.needles.settings import (
    NEEDLE_ALONE,
    NO_NEEDLES,
    SHORT_TEXT,
    Candidate,
    cells,
    judged,
    parse,
    read_settings,
)
from support.system.bad_input import BadInput
from support.system.console import progress, report_errors

# ---- 1. Tasks ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """What is hidden in a text, in which words, and what is asked about it (RULER's axes).

    The first needle goes to the depth that is measured and the others anywhere; where each needle
    is asked for in turn, they divide the text among them."""

    needles: int = 1
    ask: str = "first"  # needle; or "all" in one question; or "each" in turn after the same text
    one_key: bool = False  # the needles are several values of one key
    in_order: bool = False  # the needles after the first come behind it, one after the other
    haystack: str = "text"  # --haystack; "noise"; "needles": lines that differ in key and value
    intro: str = "Some special magic numbers are hidden in the text below. Remember them.\n\n"
    needle: str = "One of the special magic numbers for {key} is: {value}."
    question: str = "\n\nWhat is the special magic number for {key} that the text above mentions?"
    answer: str = " The special magic number for {key} is:"
    keys: tuple[str, ...] | str = CITIES  # or a kind of made-up words: "letters", "uuids"
    values: tuple[str, ...] | str = "numbers"  # of seven digits; or another kind
    answer_tokens: int | None = None  # None: what the answers need, and some more
    hide: Callable = task_table.hide_pairs  # (task, haystack, length, rng) -> Hidden

    def depths(self, grid: list[float]) -> list[float]:
        """The depths measured in one text: those of the grid, or the middle of each part."""
        if self.ask == "each":
            return [(i + 0.5) / self.needles for i in range(self.needles)]
        return list(grid) if self.needles else [0.0]

    def asked(self, depth: float) -> int:
        """Which of the text's questions is asked at this depth."""
        return min(int(depth * self.needles), self.needles - 1) if self.ask == "each" else 0

    def spread(self, depth: float, uniform: list[float]) -> list[float]:
        """Depth of each needle, 0..1; uniform: a random number in 0..1 for each."""
        if self.ask == "each":
            return [(i + u) / self.needles for i, u in enumerate(uniform)]
        if self.in_order:
            return [depth, *sorted(depth + (1 - depth) * u for u in uniform[1:])]
        return [depth, *uniform[1:]] if self.needles else []


TASKS = {name: Task(**fields) for name, fields in task_table.TASKS.items()}


def score(expected: list[str], output: str) -> float:
    """Share of the expected answers that occur in the output, case-insensitive (RULER's rule).
    ValueError if none is expected, or one is empty."""
    if not expected or not all(expected):
        raise ValueError(f"no answer to look for: {expected}")
    # [E19] score = (expected answers that occur in the output) / (expected answers)
    return sum(fold(answer) in fold(output) for answer in expected) / len(expected)


# ---- 2. Prompts, in token space ----------------------------------------------------------------


def needle_places(ids: Tensor, tokenizer, at: str = "sentences") -> Tensor:
    """Places in ids (T,) where a needle may go: 0, and after each sentence (or at="lines", after
    each line; at="spaces", at each token that begins with white space); increasing, below T.

    A line break inside a sentence (hard-wrapped text) is a segment border for training, but no
    place here. ValueError if ids are empty."""
    starts = split_segments(ids, tokenizer)
    if at == "spaces":
        space = [tokenizer.token_bytes(i)[:1].isspace() for i in ids.tolist()]
        return torch.tensor([True, *space[1:]]).nonzero()[:, 0]
    before = [tokenizer.decode(ids[max(0, s - 8) : s].tolist()) for s in starts[1:].tolist()]
    ended = [text.endswith("\n") for text in before]
    if at == "sentences":
        stops = tuple(STOPS + WIDE_STOPS)
        ended = [text.rstrip().rstrip(CLOSERS).endswith(stops) for text in before]
    return starts[torch.tensor([True, *ended])]


class Haystack:
    """A text as tokens, encoded once, repeated if it is too short, and where needles may go in it.

    at: after its "sentences"; after "lines" or "spaces" in a text with hardly any sentence ends."""

    def __init__(self, text: str, tokenizer):
        self.text, self.tokenizer = fold(text), tokenizer
        self.ids = torch.tensor(tokenizer.encode(text, continued=True), dtype=torch.int64)
        if len(self.ids) == 0:
            raise BadInput("the haystack holds no tokens (--haystack)")
        repeated = self.ids.repeat(1 + 1024 // len(self.ids))
        for at in ("sentences", "lines", "spaces"):
            self.at, self.starts = at, needle_places(repeated, tokenizer, at)
            if len(self.starts) > len(repeated) / 128:  # a place every 128 tokens, on average
                break
        else:
            raise BadInput("the haystack has hardly any sentence ends, line breaks or spaces")

    def cut(self, tokens: int, rng: random.Random) -> Tensor:
        """`tokens` ids, from a random sentence start on."""
        begin = int(self.starts[rng.randrange(len(self.starts))])
        repeats = math.ceil((begin + tokens) / len(self.ids))
        return self.ids.repeat(repeats)[begin : begin + tokens]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt. Depths are shares of the haystack, 0..1, where the needles really are."""

    ids: Tensor  # (length - answer_tokens,)
    expected: list[str]  # the answers
    answer_ids: Tensor | None  # the answers, as ids that would follow the prompt
    true_depth: float  # of the needle that is asked for (of several: the first)
    true_depths: list[float]  # of all needles
    answer_tokens: int  # budget of the answer


@dataclasses.dataclass(frozen=True)
class Prompts:
    """What all prompts of one (task, length, repeat) share; they differ in depth and question."""

    hidden: Hidden  # ids of the haystack; needles, questions, answers in words; below all as ids
    head: list[int]  # BOS and task text
    places: list[int]  # in the haystack, where a needle may go
    room: int  # haystack tokens beside the longest question: the same places for every question
    needles: list[tuple[list[int], list[int]]]  # each as in running text, and on a line of its own
    uniform: list[float]  # see Task.spread
    questions: list[list[int]]  # each with the beginning of its answer
    answer_ids: list[Tensor]  # " 4821906"; where several are asked for, " 4821906, and 1234567"
    answer_tokens: int


@functools.lru_cache(maxsize=128)
def make_prompts(task: Task, haystack: Haystack, length: int, row_seed: str) -> Prompts:
    """See make_sample. BadInput if `length` leaves no room for a haystack."""
    tokenizer, rng = haystack.tokenizer, random.Random(row_seed)
    encode = functools.partial(tokenizer.encode, continued=True)  # all texts after the intro
    haystack = Haystack(NOISE, tokenizer) if task.haystack == "noise" else haystack
    hidden = task.hide(task, haystack, length, rng)
    head = ([tokenizer.bos_id] if tokenizer.adds_bos else []) + tokenizer.encode(task.intro)
    # " needle" in running text, "needle\n" on a line of its own
    needles = [(encode(" " + text), encode(text + "\n")) for text in hidden.needles]
    questions = [encode(text) for text in hidden.questions]
    answer_ids = [torch.tensor(encode(" " + listed(words))) for words in hidden.expected]
    if not all(map(len, answer_ids)) or not all(all(words) for words in hidden.expected):
        raise BadInput(f"an expected answer is empty: {hidden.expected}")

    def budget(words: list[str]) -> int:
        between = 6 if len(words) > 1 else 0  # tokens, for ", and" or whatever a model writes there
        return 8 + sum(len(encode(f" {word}.")) + between for word in words)

    answer_tokens = task.answer_tokens or max(map(budget, hidden.expected))
    longest = max(map(len, questions)) + sum(max(map(len, needle)) for needle in needles)
    room = length - answer_tokens - len(head) - longest
    if room < 1:
        least = f"with its keys this prompt takes at least {length - room + 1} tokens"
        raise BadInput(f"--lengths {length} is too short: {least}")
    at = "lines" if task.haystack == "needles" else haystack.at
    places = needle_places(hidden.hay[:room], tokenizer, at).tolist()
    uniform = [rng.random() for _ in needles]
    return Prompts(
        hidden, head, places, room, needles, uniform, questions, answer_ids, answer_tokens
    )


def make_sample(
    task: Task | dict,
    haystack: Haystack,
    length: int,
    depth: float,
    row_seed: str,
    control: str | None = None,
) -> Sample:
    """Build one prompt of exactly `length` tokens, answer budget included (NEEDLE_ALONE: shorter).

    task: a Task or its fields. row_seed names (seed, task, length, repeat): all depths of a text
    share haystack, keys and values, so that their prompts share their beginning too. control:
    NO_NEEDLES or NEEDLE_ALONE. BadInput if `length` leaves no room for a haystack."""
    task = task if isinstance(task, Task) else Task(**task)
    p = make_prompts(task, haystack, length, row_seed)
    asked, room, hay = task.asked(depth), p.room, p.hidden.hay.tolist()
    shown = range(len(p.needles)) if control != NO_NEEDLES else []
    if control == NEEDLE_ALONE:
        room = min(room, SHORT_TEXT)
        shown = [asked] if task.ask == "each" else shown
    # [E11] place = the last sentence end at or before token depth * room
    places = [
        p.places[bisect.bisect_right(p.places, d * room) - 1] for d in task.spread(depth, p.uniform)
    ]
    inserted = []  # (place, ids of a needle), in the order of the text
    for i in sorted(shown, key=lambda i: places[i]):
        before = haystack.tokenizer.decode(hay[max(0, places[i] - 4) : places[i]])
        in_running_text, on_its_own_line = p.needles[i]
        begins_line = places[i] == 0 or before[-1:].isspace()
        inserted.append((places[i], on_its_own_line if begins_line else in_running_text))
    frame = len(p.head) + len(p.questions[asked]) + sum(len(needle) for _, needle in inserted)
    end = room if control == NEEDLE_ALONE else length - p.answer_tokens - frame  # of the haystack
    ids, done = list(p.head), 0
    for place, needle in inserted:
        ids += hay[done:place] + needle
        done = place
    ids += hay[done:end] + p.questions[asked]
    assert len(ids) == end + frame, "a prompt of the wrong length"
    depths = [round(place / room, 4) for place in places]
    return Sample(
        ids=torch.tensor(ids),
        expected=p.hidden.expected[asked],
        answer_ids=p.answer_ids[asked],
        true_depth=depths[asked] if depths else 0.0,
        true_depths=depths,
        answer_tokens=p.answer_tokens,
    )


# ---- 3. Running a text: its prompts share the prefill of their common beginning ----------------


def common_prefix(a: Tensor, b: Tensor) -> int:
    """Number of leading ids that a and b share.

    >>> common_prefix(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 5]))
    2
    """
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).long().cumprod(0).sum())


class SharedPrefix:
    """Prefills the common beginning of consecutive prompts once. The prompt with the deepest needle
    comes first: the next one begins with the same tokens, up to its own needle."""

    def __init__(self, model: Llama):
        self.model, self.cache, self.seen = model, KVCache(), torch.empty(0, dtype=torch.int64)

    def read(self, ids: Tensor) -> None:
        """Prefill the prompt ids (T,) but for its last token."""
        if len(ids) == 0:
            raise ValueError("a prompt must have at least one token")
        keep = min(common_prefix(self.seen, ids), len(ids) - 1)
        self.cache.truncate(keep)
        if keep < len(ids) - 1:
            prefill(self.model, ids[keep:-1], self.cache)
        self.seen = ids

    @torch.no_grad()
    def log_probability(self, ids: Tensor, answer_ids: Tensor) -> float:
        """log p(answer | prompt) in nats, summed over answer_ids: one forward pass over the last
        token of the prompt and all of the answer but its last, which the cache then forgets."""
        self.read(ids)
        inputs, head = torch.cat([ids[-1:], answer_ids[:-1]]), self.model.lm_head.weight
        hidden = self.model.hidden(inputs[None].to(head.device), cache=self.cache)[0]
        loss, _ = linear_cross_entropy(hidden, head, answer_ids.to(head.device))
        self.cache.truncate(len(ids) - 1)
        return -float(loss)

    def answer(self, ids: Tensor, max_new_tokens: int, stop_ids) -> list[int]:
        """The greedy continuation."""
        self.read(ids)
        return generate(self.model, ids[-1:], max_new_tokens, self.cache, stop_ids)


@torch.no_grad()
def text_loss(model: Llama, ids: Tensor, bin_tokens: int = 1024) -> list[tuple[float, int]]:
    """(mean loss in nats per token, number of tokens) of ids (T,), once for every bin_tokens."""
    hidden = model.hidden(ids[None, :-1].to(model.lm_head.weight.device))[0]
    targets = ids[1:].to(hidden.device)
    losses = []
    for h, y in zip(hidden.split(bin_tokens), targets.split(bin_tokens), strict=True):
        loss, n = linear_cross_entropy(h, model.lm_head.weight, y)
        losses.append((float(loss) / n, n))
    return losses


# ---- 4. From cells to results ------------------------------------------------------------------


def sample_of(cell: dict, tasks: dict[str, Task], haystack: Haystack, control) -> Sample:
    name, length = cell["task"], cell["length"]
    row_seed = f"{cell['seed']}/{name}/{length}/{cell['repeat']}"
    if name == "loss":
        return Sample(haystack.cut(length, random.Random(row_seed)), [], None, 0.0, [], 0)
    return make_sample(tasks[name], haystack, length, cell["depth"], row_seed, control)


def queue(
    candidate: Candidate, tasks: dict[str, Task], haystack: Haystack, setups: dict, settings
) -> list[tuple[dict, float]]:
    """(cell, FLOPs) of all prompts of one candidate; a cell is a dict, what is known of a result
    before the model has answered. The prompts are not kept; those that are run are made again.
    setups: task -> hash of its wording and haystack, by which results of other runs are told apart.
    Raises BadInput for a prompt that cannot be made."""
    found, before = [], torch.empty(0, dtype=torch.int64)
    for name, length, repeat, depth in cells(candidate, tasks, settings):
        cell = {
            "model": candidate.label,
            "identity": candidate.identity,
            "task": name,
            "length": length,
            "depth": depth,
            "repeat": repeat,
            "seed": settings.seed,
            "dtype": settings.dtype,
            "setup": setups[name],
        }
        sample = sample_of(cell, tasks, haystack, candidate.control)
        cell["true_depth"], cell["true_depths"] = sample.true_depth, sample.true_depths
        cell["prompt"] = hashlib.sha256(sample.ids.numpy().tobytes()).hexdigest()[:12]
        cell["expected"] = sample.expected
        kept = common_prefix(before, sample.ids)
        work = prompt_flops(candidate.config, kept, len(sample.ids), sample.answer_tokens)
        found.append((cell, work))
        before = sample.ids
    return found


def measure(cell: dict, sample: Sample, shared: SharedPrefix, tokenizer) -> dict:
    """The result: the cell, the model's answer and its scores (task loss: nats per token)."""
    started, result = time.monotonic(), dict(cell)
    if cell["task"] == "loss":
        bins = text_loss(shared.model, sample.ids)
        result["loss_by_1024"] = [round(loss, 5) for loss, _ in bins]
        result["score"] = sum(loss * n for loss, n in bins) / (len(sample.ids) - 1)
    else:
        nats = shared.log_probability(sample.ids, sample.answer_ids)
        result["answer_logprob"] = round(nats, 6)
        result["answer_tokens_scored"] = len(sample.answer_ids)
        answer = shared.answer(sample.ids, sample.answer_tokens, tokenizer.eos_ids)
        result["output"] = tokenizer.decode(answer)
        result["score"] = score(sample.expected, result["output"])
    return result | {"seconds": round(time.monotonic() - started, 2)}


def run_candidate(
    candidate: Candidate, queued: list, tasks, haystack: Haystack, results: Results, bar, settings
) -> list[dict]:
    """The results of one candidate; the model is loaded only if one of them is missing."""
    shared, found = None, []
    for cell, work in queued:
        result = results.find(cell)
        if result is None:
            if shared is None:
                dtype = getattr(torch, settings.dtype.removeprefix("torch."))
                model = load_pretrained(candidate.folder, dtype, settings.device).eval()
                model.config = candidate.config
                shared = SharedPrefix(model)
                if bar.n == 0 and settings.device == "cpu":  # a GPU needs little time
                    read = functools.partial(prefill, model)
                    tell_time(bar.total, model.config, read, settings.lengths[-1])
            sample = sample_of(cell, tasks, haystack, candidate.control)
            result = results.add(measure(cell, sample, shared, haystack.tokenizer))
            bar.set_description(candidate.label, refresh=False)
            bar.update(work)
        found.append(result | {"model": candidate.label})
    return found


# ---- 5. The command ----------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    with report_errors():
        started = time.time()
        flags = parse(argv, __doc__)
        if flags.attention == "flash":
            use_flash_package()
        settings, tasks, configs = read_settings(flags, TASKS, LlamaConfig.from_dir)
        text, source = load_haystack(settings.haystack)
        haystack = Haystack(text, load_tokenizer(settings.model))
        results = Results(Path(settings.out))
        candidates = judged(settings, configs, results.hashes)
        setups = {n: setup_of(task, haystack.text) for n, task in (tasks | {"loss": None}).items()}
        queued = [queue(c, tasks, haystack, setups, settings) for c in candidates]
        missing = [(cell, work) for q in queued for cell, work in q if not results.find(cell)]
        announce(source, haystack, candidates, [cell for cell, _ in missing], settings)
        # it counts FLOPs, not prompts: a long one takes hundreds of times as long as a short one
        bar = progress(None, "needles", total=sum(work for _, work in missing), bar_format=LAYOUT)
        found = []
        with results.writing():
            for candidate, q in zip(candidates, queued, strict=True):
                found += run_candidate(candidate, q, tasks, haystack, results, bar, settings)
            bar.close()
            found = results.add_earlier(found, setups, candidates, settings)
            write_report(found, candidates, tasks, source, settings, started)


if __name__ == "__main__":
    main()
