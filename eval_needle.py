"""Needle in a haystack: can the model find a sentence hidden far back in a long text?

    python eval_needle.py    # what train.py left in out/, beside the model it began with

Sentences such as "One of the special magic numbers for Lima is: 4821906." are hidden in a long
text; at the end the model is asked for one of them and continues greedily. A cell of the heat-map
is (length, depth). The structure (task text, haystack, question, beginning of the answer; share
of the expected answers found, case-insensitive) is that of RULER (Hsieh et al., 2404.06654), the
grid that of gkamradt's test; the wording is ours, and --template takes another one.

What is exact here: prompt and answer budget together are `length` tokens, asserted; the prompt is
built from token ids and never encoded again as a whole; a BOS is put in front once, and only if
the checkpoint's own tokenizer does so; needles go in at sentence ends found in the decoded text;
their keys and values stand nowhere else in the haystack, asserted.

Results, by default in the folder of --model: needle.jsonl (one line per sample; what is there is
not run again), needle_results.json, needle.png, curves.png.
Does NOT do: chat templates, sampling.
Glossary: see model.py.
"""

import argparse
import bisect
import dataclasses
import functools
import hashlib
import math
import random
import time
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
from recipe import CLOSERS, STOPS, WIDE_STOPS, split_segments
from support.huggingface.hub import local_folder
from support.needles.cost import WorkBar, announce, prompt_flops
from support.needles.haystack import NOISE, draw_needles, draw_words, load_haystack, stands_in
from support.needles.judged import check_models, fingerprint
from support.needles.report import write_report
from support.needles.results import Results, setup_of
from support.needles.tasks import TASKS, Task
from support.needles.templates import resolve_grid, resolve_tasks
from support.runs.flags import Parser, base_of_run
from support.system.bad_input import BadInput
from support.system.console import log, report_errors

# ---- 1. Prompts, in token space ----------------------------------------------------------------

# A Task (support/needles/tasks.py has them all) says how many `needles` are hidden, in which words;
# whether they are values of `one_key`; which of them to `ask` for: the "first", "all" in one
# question, or "each" in turn after the same text; and what the `haystack` is: "text", "noise" (a
# few sentences that repeat) or "needles" (nothing but lines like the needle).


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt: ids (length - answer budget,), the expected answers, those as the ids that would
    follow the prompt, and where the needle that is asked for (of several: the first) and all
    needles really are, as shares of the haystack."""

    ids: Tensor
    expected: list[str]
    answer_ids: Tensor
    true_depth: float
    true_depths: list[float]
    answer_tokens: int


def sentence_ends(ids: Tensor, tokenizer, lines: bool = False) -> Tensor:
    """Places in ids (T,) where a needle may go: 0, and after each sentence (or each line);
    increasing, below T.

    A line break inside a sentence (hard-wrapped text) is a segment border for training, but no
    place here."""
    starts = split_segments(ids, tokenizer)
    before = [tokenizer.decode(ids[max(0, s - 8) : s].tolist()) for s in starts[1:].tolist()]
    stops = tuple(STOPS + WIDE_STOPS)
    if lines:
        ended = [text.endswith("\n") for text in before]
    else:
        ended = [text.rstrip().rstrip(CLOSERS).endswith(stops) for text in before]
    return starts[torch.tensor([True, *ended])]


class Haystack:
    """A text as tokens, encoded once, with its sentence ends; it repeats where it is short."""

    def __init__(self, text: str, tokenizer):
        self.text, self.tokenizer = text.lower(), tokenizer  # answers are compared in lower case
        self.ids = torch.tensor(tokenizer.encode(text))
        self.starts = sentence_ends(self.ids, tokenizer)

    def cut(self, tokens: int, rng: random.Random) -> Tensor:
        """`tokens` ids from a random sentence start on."""
        begin = int(self.starts[rng.randrange(len(self.starts))])
        repeats = math.ceil((begin + tokens) / len(self.ids))
        return self.ids.repeat(repeats)[begin : begin + tokens]


@functools.lru_cache(maxsize=1)
def noise_haystack(tokenizer) -> Haystack:
    return Haystack(NOISE, tokenizer)


def draw(task: Task, haystack: Haystack, length: int, rng) -> tuple[list[str], list[str], Tensor]:
    """(keys, values, haystack (length,)): neither keys nor values stand in that haystack."""
    tokenizer, wanted = haystack.tokenizer, 1 if task.one_key else task.needles
    if task.haystack == "needles":
        keys, values, ids = draw_needles(task, wanted, length, tokenizer, rng)
        hay = torch.tensor(ids)
    else:
        haystack = noise_haystack(tokenizer) if task.haystack == "noise" else haystack
        keys = draw_words(task.keys, wanted, rng)
        values = draw_words(task.values, task.needles, rng, haystack.text)
        hay = haystack.cut(length, rng)
    text = tokenizer.decode(hay.tolist()).lower()
    if any(stands_in(key, text) for key in keys):
        free = [key for key in task.keys if not stands_in(key, text)]
        keys = draw_words(free, wanted, rng)
    found = [key for key in keys if stands_in(key, text)] + [v for v in values if v.lower() in text]
    assert not found, f"the haystack holds {found}"
    return keys, values, hay


@dataclasses.dataclass(frozen=True)
class Row:
    """What the prompts of one (task, length, repeat) share: all but the depth, and who is asked."""

    head: list[int]  # BOS and task text
    hay: Tensor  # haystack (length,)
    ends: list[int]  # places in it where a needle may go
    room: int  # haystack tokens that are in every prompt of the row
    needles: list[tuple[list[int], list[int]]]  # as running text and on a line of its own
    fractions: list[float]  # where each needle shall stand
    tails: list[list[int]]  # question and beginning of the answer, for each that is asked
    expected: list[list[str]]
    answer_ids: list[Tensor]  # " 4821906"; where several are asked for, " 4821906, and 1234567"
    answer_tokens: int


def listed(words: list[str]) -> str:
    """
    >>> listed(["Lima"]), listed(["Lima", "Oslo", "Rome"])
    ('Lima', 'Lima, Oslo, and Rome')
    """
    return ", and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


@functools.lru_cache(maxsize=128)
def make_row(task: Task, haystack: Haystack, length: int, row_seed: str) -> Row:
    tokenizer, rng = haystack.tokenizer, random.Random(row_seed)
    keys, values, hay = draw(task, haystack, length, rng)
    encode = tokenizer.encode
    head = ([tokenizer.bos_id] if tokenizer.adds_bos else []) + encode(task.intro)
    named = keys * task.needles if task.one_key else keys
    # in running text " needle", at the beginning of a line "needle\n"
    texts = [task.needle.format(key=k, value=v) for k, v in zip(named, values, strict=True)]
    needles = [(encode(" " + text), encode(text + "\n")) for text in texts]
    asked, expected = {"first": keys[:1], "each": keys}.get(task.ask), [[v] for v in values]
    if task.ask == "all":
        asked, expected = [listed(keys)], [values]
    tails = [encode((task.question + task.answer).format(key=k, value="")) for k in asked]
    answer_ids = [torch.tensor(encode(" " + listed(answers))) for answers in expected]
    spoken = [len(encode(f" {value}.")) for value in values]
    answer_tokens = 8 + (sum(spoken) + 6 * len(spoken) if task.ask == "all" else max(spoken))
    answer_tokens = task.answer_tokens or answer_tokens
    # for the haystack; the same whichever key is asked for, so that the needles stay in place
    rest = answer_tokens + len(head) + max(map(len, tails)) + sum(max(map(len, n)) for n in needles)
    if (room := length - rest) < 1:
        raise BadInput(
            f"--lengths {length} is too short: with its keys this prompt takes at least"
            f" {rest + 1} tokens"
        )
    ends = sentence_ends(hay[:room], tokenizer, lines=task.haystack == "needles").tolist()
    fractions = [rng.random() for _ in needles]
    if task.ask == "each":
        fractions = [(i + u) / task.needles for i, u in enumerate(fractions)]
    return Row(
        head, hay, ends, room, needles, fractions, tails, expected, answer_ids, answer_tokens
    )


def make_sample(
    task: Task, haystack: Haystack, length: int, depth: float, row_seed: str, removed: bool = False
) -> Sample:
    """Build one prompt of exactly `length` tokens, answer budget included. row_seed names (seed,
    task, length, repeat): all depths of a row share haystack, keys and values, so that they share
    their beginning too. removed: without its needles, a control.

    ValueError if the frame alone is longer than `length`."""
    row, decode = make_row(task, haystack, length, row_seed), haystack.tokenizer.decode
    asked = min(int(depth * task.needles), task.needles - 1) if task.ask == "each" else 0
    fractions = row.fractions if task.ask == "each" else [depth, *row.fractions[1:]]
    # [E11] place = the last sentence end at or before token depth * room
    places = [row.ends[bisect.bisect_right(row.ends, d * row.room) - 1] for d in fractions]
    parts, done = [row.head], 0
    for place, needle in sorted(zip(places, row.needles, strict=True), key=lambda pair: pair[0]):
        before = decode(row.hay[max(0, place - 4) : place].tolist())
        own_line = place == 0 or before[-1:].isspace()
        if not removed:
            parts += [row.hay[done:place].tolist(), needle[own_line]]
            done = place
    tail, room = row.tails[asked], length - row.answer_tokens - sum(map(len, parts))
    parts += [row.hay[done : done + room - len(tail)].tolist(), tail]
    ids = torch.tensor([i for part in parts for i in part])
    assert len(ids) + row.answer_tokens == length, "a prompt of the wrong length"
    depths = [round(place / row.room, 4) for place in places]
    answers = row.expected[asked], row.answer_ids[asked]
    return Sample(ids, *answers, depths[asked], depths, row.answer_tokens)


def score(expected: list[str], output: str) -> float:
    """Share of the expected answers that occur in the output, case-insensitive (RULER's rule)."""
    # [E19] score = (expected answers that occur in the output) / (expected answers)
    return sum(answer.lower() in output.lower() for answer in expected) / len(expected)


# ---- 2. Running a row: its depths share the prefill of their common beginning ------------------


def common_prefix(a: Tensor, b: Tensor) -> int:
    """Number of leading ids that a and b share.

    >>> common_prefix(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 5]))
    2
    """
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).long().cumprod(0).sum())


class SharedPrefix:
    """Prompts that begin alike are prefilled once. Deepest needle first: what stands before its
    needle stands at the start of every shallower prompt too, up to that prompt's own needle."""

    def __init__(self, model: Llama):
        self.model, self.cache, self.seen = model, KVCache(), torch.empty(0, dtype=torch.int64)

    def read(self, ids: Tensor, room: int) -> None:
        """Prefill the prompt ids (T,) but for its last token, with room for `room` more."""
        keep = min(common_prefix(self.seen, ids), len(ids) - 1)
        self.cache.truncate(keep)
        self.cache.reserve(len(ids) + room)
        if keep < len(ids) - 1:
            prefill(self.model, ids[keep:-1], self.cache)
        self.seen = ids

    @torch.no_grad()
    def log_probability(self, ids: Tensor, answer_ids: Tensor, room: int = 0) -> float:
        """log p(answer | prompt) in nats, summed over the answer_ids: one forward pass
        over the prompt's last token and the answer but for its last, then forgotten again."""
        self.read(ids, max(room, len(answer_ids)))
        inputs, head = torch.cat([ids[-1:], answer_ids[:-1]]), self.model.lm_head.weight
        hidden = self.model.hidden(inputs[None].to(head.device), cache=self.cache)[0]
        loss, _ = linear_cross_entropy(hidden, head, answer_ids.to(head.device))
        self.cache.truncate(len(ids) - 1)
        return -float(loss)

    def answer(self, ids: Tensor, max_new_tokens: int, stop_ids) -> list[int]:
        """The greedy continuation."""
        self.read(ids, max_new_tokens)
        return generate(self.model, ids[-1:], max_new_tokens, self.cache, stop_ids)


@torch.no_grad()
def text_loss(model: Llama, ids: Tensor, bin_tokens: int = 1024) -> list[tuple[float, int]]:
    """(mean loss in nats per token, tokens) of ids (T,), for each run of bin_tokens positions."""
    hidden = model.hidden(ids[None, :-1].to(model.lm_head.weight.device))[0]
    targets = ids[1:].to(hidden.device)
    losses = []
    for i in range(0, len(targets), bin_tokens):
        loss, n = linear_cross_entropy(
            hidden[i : i + bin_tokens], model.lm_head.weight, targets[i : i + bin_tokens]
        )
        losses.append((float(loss) / n, n))
    return losses


# ---- 3. The grid -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row of the result: weights from a folder, under their own RoPE base or another one; or the
    control that gets the prompts without their needles."""

    label: str
    folder: str
    config: LlamaConfig
    rope: tuple[float, int] | None = None  # (base, window)
    removed: bool = False

    @property
    def window(self) -> int:
        """Up to where this candidate is meant to work, tokens."""
        return self.rope[1] if self.rope else self.config.max_position_embeddings

    def load(self, args) -> Llama:
        model = load_pretrained(self.folder, args.torch_dtype, args.device)
        if self.rope:
            model.config = model.config.with_rope(*self.rope)
        return model.eval()

    @functools.cached_property
    def identity(self) -> str:
        rope = f"/rope{self.rope[0]:.6g}" if self.rope else ""
        return fingerprint(self.folder) + rope + ("/removed" if self.removed else "")


def sample_of(row: dict, tasks: dict[str, Task], haystack: Haystack, removed: bool) -> Sample:
    name, length = row["task"], row["length"]
    row_seed = f"{row['seed']}/{name}/{length}/{row['repeat']}"
    if name == "loss":
        return Sample(haystack.cut(length, random.Random(row_seed)), [], None, 0.0, [], 0)
    return make_sample(tasks[name], haystack, length, row["depth"], row_seed, removed)


def plan(
    candidate: Candidate, tasks: dict[str, Task], haystack: Haystack, setups: dict, args
) -> list[tuple[dict, float]]:
    """All cells of one candidate, deepest needle first: (row without its output, FLOPs). setups:
    task -> fingerprint of its wording and haystack, by which rows of other runs are told apart.

    ValueError for what some cell would refuse, before anything is run."""
    names = [*args.tasks, "loss"] if args.ppl and not candidate.removed else args.tasks
    cells = [(t, n, r) for t in names for n in args.lengths for r in range(args.n)]
    if candidate.folder != args.model:  # a model that is beyond its window is soon judged
        cells = [(t, n, r) for t, n, r in cells if n <= candidate.window or r < args.n_beyond]
    rows, before = [], torch.empty(0, dtype=torch.int64)
    for name, length, repeat in cells:
        depths = [0.0] if name == "loss" else tasks[name].depths(args.depths)
        if candidate.removed:
            depths = depths[:1]  # nothing stands at any depth
        for depth in sorted(depths, reverse=True):
            row = {
                "model": candidate.label,
                "identity": candidate.identity,
                "task": name,
                "length": length,
                "depth": depth,
                "repeat": repeat,
                "seed": args.seed,
                "dtype": str(args.torch_dtype),
                "setup": setups[name],
            }
            sample = sample_of(row, tasks, haystack, candidate.removed)
            row["true_depth"], row["true_depths"] = sample.true_depth, sample.true_depths
            row["prompt"] = hashlib.sha256(sample.ids.numpy().tobytes()).hexdigest()[:12]
            row["expected"] = sample.expected
            kept = common_prefix(before, sample.ids)
            work = prompt_flops(candidate.config, kept, len(sample.ids), sample.answer_tokens)
            rows.append((row, work))
            before = sample.ids
    return rows


def measure(row: dict, sample: Sample, shared: SharedPrefix, tokenizer) -> dict:
    started = time.monotonic()
    if row["task"] == "loss":
        bins = text_loss(shared.model, sample.ids)
        row["loss_by_1024"] = [round(loss, 5) for loss, _ in bins]
        row["score"] = sum(loss * n for loss, n in bins) / (len(sample.ids) - 1)
    else:
        nats = shared.log_probability(sample.ids, sample.answer_ids, sample.answer_tokens)
        row["answer_logprob"] = round(nats, 6)
        row["answer_tokens_scored"] = len(sample.answer_ids)
        stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        row["output"] = tokenizer.decode(shared.answer(sample.ids, sample.answer_tokens, stop))
        row["score"] = score(sample.expected, row["output"])
    return row | {"seconds": round(time.monotonic() - started, 2)}


def run_candidate(
    candidate: Candidate, planned: list, tasks, haystack: Haystack, results: Results, bar, args
) -> list[dict]:
    """The rows of one candidate; the model is loaded only if some row is missing."""
    shared, rows = None, []
    for row, work in planned:
        if (known := results.find(row)) is None:
            if shared is None:
                shared = SharedPrefix(candidate.load(args))
                bar.tell_time(candidate, functools.partial(prefill, shared.model))
            sample = sample_of(row, tasks, haystack, candidate.removed)
            known = results.add(measure(row, sample, shared, haystack.tokenizer))
            bar.done(candidate.label, work)
        rows.append(known | {"model": candidate.label})
    return rows


# ---- 4. The command ----------------------------------------------------------------------------

RESULT = "out"  # where train.py puts its result
NEW_BASE = " (new base)"  # ends the label of the control: old weights, new RoPE base
NO_NEEDLE = " (needle removed)"  # another control: must score 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser("eval_needle.py", __doc__)
    add = p.add_argument
    add("--model", default=RESULT, metavar="DIR", help="Hugging Face folder to judge")
    add("--compare", nargs="*", metavar="DIR", help="others beside it (None: base of the run)")
    controls = "also without the needles, and the base under the new RoPE base"
    add("--controls", action="store_true", help=controls)
    add("--tasks", nargs="*", choices=TASKS, help="(None: template's, or niah_single)")
    add("--template", metavar="FILE", help="wording, JSON (None: --model's needle.json, if any)")
    add("--lengths", nargs="+", type=int, help="tokens, answer included (None: old window .. new)")
    depths = "of the needle, 0: start, 1: end (None: 0 0.25 0.5 0.75 1)"
    add("--depths", nargs="+", type=float, help=depths)
    add("--n", type=int, help="haystacks per length (None: 2, or what the template says)")
    add("--n_beyond", type=int, help="beyond a compared model's window (None: template, --n)")
    add("--ppl", action="store_true", help="also the loss per token on n haystack texts per length")
    add("--haystack", metavar="PATH", help="text, folder (None: template, essays, Python docs)")
    add("--out", metavar="DIR", help="folder for needle.* (None: INTO the model folder, --model)")
    add("--seed", type=int, default=0, help="of haystacks and needles")
    add("--dtype", choices=("bfloat16", "float32"), help="(None: bfloat16 on CUDA, float32 on CPU)")
    return p.parse_args(argv)


def resolve(args) -> tuple[list[Candidate], dict[str, Task]]:
    """Who is judged, and all tasks by name. Writes nothing."""
    if args.model == RESULT and not Path(RESULT).exists():
        raise BadInput(f"folder {RESULT}, which train.py makes, does not exist (or give --model)")
    args.model = local_folder(args.model)
    if args.compare is None:
        args.compare = base_of_run(args.model)
    args.compare = list(dict.fromkeys(map(local_folder, args.compare)))
    if args.model in args.compare:
        raise BadInput(f"--compare {args.model} is --model itself")
    folders = (*args.compare, args.model)  # the base first, as in every table and figure
    candidates = [Candidate(f, f, LlamaConfig.from_dir(f)) for f in folders]
    tasks, fields = resolve_tasks(args, TASKS)
    resolve_grid(args, fields, tasks, [c.config.max_position_embeddings for c in candidates])
    check_models({c.folder: c.config for c in candidates}, args.lengths[-1])
    if args.controls:
        base, result = candidates[0], candidates[-1]
        rope = (result.config.rope_theta, result.config.max_position_embeddings)
        if base is result:
            log("--controls: without --compare DIR only the one without needles")
        else:
            candidates.insert(1, Candidate(base.folder + NEW_BASE, base.folder, base.config, rope))
        label = result.folder + NO_NEEDLE
        candidates.append(Candidate(label, result.folder, result.config, removed=True))
    return candidates, tasks


def main(argv: list[str] | None = None) -> None:
    with report_errors():
        args, started = parse(argv), time.time()
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
        default = "bfloat16" if args.device == "cuda" else "float32"
        args.torch_dtype = getattr(torch, args.dtype or default)
        candidates, tasks = resolve(args)
        text, source = load_haystack(args.haystack)
        haystack = Haystack(text, load_tokenizer(args.model))
        setups = {
            name: setup_of(task, haystack.text) for name, task in (tasks | {"loss": None}).items()
        }
        planned = [plan(c, tasks, haystack, setups, args) for c in candidates]
        out = Path(args.out or args.model)
        results = Results(out)
        missing = [cell for cells in planned for cell in cells if results.find(cell[0]) is None]
        announce(source, haystack, candidates, [row for row, _ in missing], args)
        bar, rows = WorkBar(sum(work for _, work in missing)), []
        with results.writing():
            for candidate, cells in zip(candidates, planned, strict=True):
                rows += run_candidate(candidate, cells, tasks, haystack, results, bar, args)
            bar.close()
            rows = results.of_setup(rows, setups, [(c.identity, c.label) for c in candidates], args)
            write_report(rows, candidates, tasks, source, out, args, started)


if __name__ == "__main__":
    main()
