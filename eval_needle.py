"""Needle in a haystack: can the model find a sentence hidden far back in a long text?

    python eval_needle.py    # what train.py left in out/, beside the model it began with

Sentences such as "One of the special magic numbers for Lima is: 4821906." are hidden in a long
text; at the end the model is asked for one of them and continues greedily. A cell of the heat-map
is (length, depth). The structure (task text, haystack, question, beginning of the answer; share
of the expected answers found, case-insensitive) is that of RULER (Hsieh et al., 2404.06654), the
grid that of gkamradt's test; the wording is ours.

What is exact here: prompt and answer budget together are `length` tokens, asserted; the prompt is
built from token ids and never encoded again as a whole; a BOS is put in front once, and only if
the checkpoint's own tokenizer does so; needles go in at sentence ends found in the decoded text.

Results, by default in the folder of --model: needle.jsonl (one line per sample; what is there is
not run again), needle_results.json, needle.png, curves.png.
Does NOT do: chat templates, sampling, teacher-forced scores.
Glossary: see model.py.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
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
)
from recipe import CLOSERS, STOPS, WIDE_STOPS, split_segments
from support.atomic import write_atomically
from support.cli import check_ranges, log, progress, provenance, report_errors
from support.figures import draw_curves, draw_heatmap
from support.haystack import CITIES, fingerprint, load_haystack, read_template
from support.hub import local_folder
from support.results import Results, print_table, summarise
from support.run_settings import Parser, base_of_run

# ---- 1. Tasks ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """Wording, number and words of the needles. The first one stands at the cell's depth and is
    asked for; with ask_all they divide the depths among them and each is asked for in turn."""

    needles: int = 1
    ask_all: bool = False
    intro: str = "Some special magic numbers are hidden in the text below. Remember them.\n\n"
    needle: str = "One of the special magic numbers for {key} is: {value}."
    question: str = "\n\nWhat is the special magic number for {key} that the text above mentions?"
    answer: str = " The special magic number for {key} is:"
    keys: tuple[str, ...] = CITIES
    values: tuple[str, ...] = ()  # none: numbers of seven digits

    def depths(self, grid: list[float]) -> list[float]:
        """Depths of the cells of one haystack: those of the grid, or the middle of each part."""
        n = self.needles
        return [(i + 0.5) / n for i in range(n)] if self.ask_all else grid


TASKS = {
    "niah_single": Task(),
    "multikey": Task(needles=4),
    # RULER asks for all of them at once; one at a time, from one prefill, a tiny model can answer
    "multiquery": Task(needles=4, ask_all=True),
}


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt. ids (length - answer budget,), the expected answers, and where the needle
    really is."""

    ids: Tensor
    expected: list[str]
    true_depth: float
    answer_tokens: int


# ---- 2. Prompts, in token space ----------------------------------------------------------------


def sentence_ends(ids: Tensor, tokenizer) -> Tensor:
    """Places in ids (T,) where a needle may go: 0, and after each sentence; increasing, below T.

    A line break inside a sentence (hard-wrapped text) is a segment border for training, but no
    place here."""
    starts = split_segments(ids, tokenizer)
    before = [tokenizer.decode(ids[max(0, s - 8) : s].tolist()) for s in starts[1:].tolist()]
    ended = [text.rstrip().rstrip(CLOSERS).endswith(tuple(STOPS + WIDE_STOPS)) for text in before]
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


def draw_values(task: Task, text: str, rng: random.Random) -> list[str]:
    """A value for each needle, all different, none of which the haystack holds."""
    if task.values:
        free = [value for value in task.values if value.lower() not in text]
        if len(free) < task.needles:
            raise ValueError(f"the haystack holds all but {len(free)} of the needles' values")
        return rng.sample(free, task.needles)
    values: list[str] = []
    while len(values) < task.needles:
        value = str(rng.randint(1_000_000, 9_999_999))
        if value not in text and value not in values:
            values.append(value)
    return values


def make_sample(task: Task, haystack: Haystack, length: int, depth: float, row_seed: str) -> Sample:
    """Build one prompt of exactly `length` tokens, answer budget included. row_seed names (seed,
    task, length, repeat): all depths of a row share haystack, keys and values, so that they share
    their beginning too.

    ValueError if the frame alone is longer than `length`."""
    tokenizer, rng = haystack.tokenizer, random.Random(row_seed)
    keys = rng.sample(task.keys, task.needles)
    values = draw_values(task, haystack.text, rng)
    asked = min(int(depth * task.needles), task.needles - 1) if task.ask_all else 0
    head = [tokenizer.bos_id] if tokenizer.adds_bos else []
    head += tokenizer.encode(task.intro)
    tails = [tokenizer.encode((task.question + task.answer).format(key=key)) for key in keys]
    tail = tails[asked]
    answer_tokens = max(len(tokenizer.encode(f" {value}.")) for value in values) + 8
    texts = [task.needle.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    # in running text " needle", at the beginning of a line "needle\n"
    needles = [(tokenizer.encode(" " + t), tokenizer.encode(t + "\n")) for t in texts]
    longest = sum(max(map(len, pair)) for pair in needles)
    # for the haystack; the same whichever key is asked for, so that the needles stay in place
    room = length - answer_tokens - len(head) - len(max(tails, key=len)) - longest
    if room < 1:
        raise ValueError(
            f"--lengths {length} is too short: with its keys this prompt takes at least"
            f" {length - room + 1} tokens"
        )
    hay = haystack.cut(length, rng)  # more than `room`: one form of a needle may be shorter
    ends = sentence_ends(hay[:room], tokenizer)
    fractions = [rng.random() for _ in needles]
    if task.ask_all:
        fractions = [(i + u) / task.needles for i, u in enumerate(fractions)]
    else:
        fractions[0] = depth
    # [E11] depth d of M haystack tokens: the last sentence end at or before token d * M
    places = [int(ends[ends <= fraction * room][-1]) for fraction in fractions]

    parts, done = [head], 0
    for place, needle in sorted(zip(places, needles, strict=True), key=lambda pair: pair[0]):
        before = tokenizer.decode(hay[max(0, place - 4) : place].tolist())
        own_line = place == 0 or before[-1:].isspace()
        parts += [hay[done:place].tolist(), needle[own_line]]
        done = place
    used = sum(map(len, parts))
    parts += [hay[done : done + length - answer_tokens - len(tail) - used].tolist(), tail]
    ids = torch.tensor([i for part in parts for i in part])
    assert len(ids) + answer_tokens == length, "a prompt of the wrong length"
    return Sample(ids, [values[asked]], places[asked] / room, answer_tokens)


def score(expected: list[str], output: str) -> float:
    """Share of the expected answers that occur in the output, case-insensitive (RULER's rule)."""
    return sum(answer.lower() in output.lower() for answer in expected) / len(expected)


# ---- 3. Running a row: its depths share the prefill of their common beginning ------------------


def common_prefix(a: Tensor, b: Tensor) -> int:
    """Number of leading ids that a and b share.

    >>> common_prefix(torch.tensor([1, 2, 3]), torch.tensor([1, 2, 4, 5]))
    2
    """
    n = min(len(a), len(b))
    return int((a[:n] == b[:n]).long().cumprod(0).sum())


class SharedPrefix:
    """Greedy answers where prompts that begin alike are prefilled once. Deepest needle first:
    what stands before its needle stands at the start of every shallower prompt too, up to that
    prompt's own needle."""

    def __init__(self, model: Llama):
        self.model, self.cache, self.seen = model, KVCache(), torch.empty(0, dtype=torch.int64)

    def answer(self, ids: Tensor, max_new_tokens: int, stop_ids) -> list[int]:
        keep = min(common_prefix(self.seen, ids), len(ids) - 1)  # generate wants at least one id
        self.cache.truncate(keep)
        out = generate(self.model, ids[keep:], max_new_tokens, self.cache, stop_ids)
        self.seen = ids
        return out


@torch.no_grad()
def text_loss(model: Llama, ids: Tensor, bin_tokens: int = 1024) -> list[tuple[float, int]]:
    """(mean loss in nats per token, tokens) of ids (N,), for each run of bin_tokens positions."""
    hidden = model.hidden(ids[None, :-1].to(model.lm_head.weight.device))[0]
    targets = ids[1:].to(hidden.device)
    losses = []
    for i in range(0, len(targets), bin_tokens):
        loss, n = linear_cross_entropy(
            hidden[i : i + bin_tokens], model.lm_head.weight, targets[i : i + bin_tokens]
        )
        losses.append((float(loss) / n, n))
    return losses


# ---- 4. The grid -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row of the result: weights from a folder, under their own RoPE base or another one."""

    label: str
    folder: str
    config: LlamaConfig
    rope: tuple[float, int] | None = None  # (base, window)

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
        return fingerprint(self.folder) + (f"/rope{self.rope[0]:.6g}" if self.rope else "")


def run_candidate(
    candidate: Candidate, tasks: dict[str, Task], haystack: Haystack, results: Results, args
) -> list[dict]:
    """All cells of one candidate -> their rows; the model is loaded only if some cell is
    missing."""
    model, chosen = None, []
    names = [*tasks, "loss"] if args.ppl else [*tasks]
    cells = [(t, n, r) for t in names for n in args.lengths for r in range(args.n)]
    if candidate.folder != args.model:  # a model that is beyond its window is soon judged
        cells = [(t, n, r) for t, n, r in cells if n <= candidate.window or r < args.n_beyond]
    for task, length, repeat in progress(cells, candidate.label, unit="row"):
        row_seed = f"{args.seed}/{task}/{length}/{repeat}"
        shared = None
        depths = tasks[task].depths(args.depths) if task != "loss" else [0.0]
        for depth in sorted(depths, reverse=True):
            if task == "loss":
                sample = Sample(haystack.cut(length, random.Random(row_seed)), [], 0.0, 0)
            else:
                sample = make_sample(tasks[task], haystack, length, depth, row_seed)
            row = {
                "model": candidate.label,
                "identity": candidate.identity,
                "task": task,
                "length": length,
                "depth": depth,
                "true_depth": round(sample.true_depth, 4),
                "repeat": repeat,
                "seed": args.seed,
                "dtype": str(args.torch_dtype),
                "prompt": hashlib.sha256(sample.ids.numpy().tobytes()).hexdigest()[:12],
                "expected": sample.expected,
            }
            if (known := results.find(row)) is None:
                model = model or candidate.load(args)
                shared = shared or SharedPrefix(model)
                known = results.add(measure(row, sample, shared, haystack.tokenizer))
            chosen.append(known | {"model": candidate.label})
    return chosen


def measure(row: dict, sample: Sample, shared: SharedPrefix, tokenizer) -> dict:
    started = time.monotonic()
    if row["task"] == "loss":
        bins = text_loss(shared.model, sample.ids)
        row["loss_by_1024"] = [round(loss, 5) for loss, _ in bins]
        row["score"] = sum(loss * n for loss, n in bins) / (len(sample.ids) - 1)
    else:
        stop = () if tokenizer.eos_id is None else (tokenizer.eos_id,)
        row["output"] = tokenizer.decode(shared.answer(sample.ids, sample.answer_tokens, stop))
        row["score"] = score(sample.expected, row["output"])
    return row | {"seconds": round(time.monotonic() - started, 2)}


# ---- 5. The command ----------------------------------------------------------------------------

RESULT = "out"  # where train.py puts its result
NEW_BASE = " (new base)"  # ends the label of the control: old weights, new RoPE base


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser("eval_needle.py", __doc__)
    add = p.add_argument
    add("--model", default=RESULT, metavar="DIR", help="Hugging Face folder to judge")
    add("--compare", nargs="*", metavar="DIR", help="others beside it (None: base of the run)")
    add("--controls", action="store_true", help="also the base under the new RoPE base")
    add("--tasks", nargs="*", choices=sorted(TASKS), help="(None: template, or niah_single)")
    add("--template", metavar="FILE", help="wording of needles (None: --model's needle.json)")
    add("--lengths", nargs="+", type=int, help="tokens, answer included (None: old window .. new)")
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    add("--depths", nargs="+", type=float, default=depths, help="0: start, 1: end")
    add("--n", type=int, help="haystacks per length (None: 2, or what the template says)")
    add("--n_beyond", type=int, help="beyond a compared model's window (None: template, --n)")
    add("--ppl", action="store_true", help="also the loss per token on n haystack texts per length")
    add("--haystack", metavar="PATH", help="text, folder (None: template, essays, Python docs)")
    add("--out", metavar="DIR", help="folder for needle.* (None: INTO the model folder, --model)")
    add("--seed", type=int, default=0)
    add("--dtype", choices=("bfloat16", "float32"), help="(None: bfloat16 on CUDA, float32 on CPU)")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with report_errors():
        args, started = parse(argv), time.time()
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
        default = "bfloat16" if args.device == "cuda" else "float32"
        args.torch_dtype = getattr(torch, args.dtype or default)
        candidates, tasks = resolve(args)
        text, source = load_haystack(args.haystack)
        haystack = Haystack(text, load_tokenizer(args.model))
        # refuse before anything is run; which keys come, and their tokens, depends on the length
        for name, length, r in itertools.product(tasks, args.lengths, range(args.n)):
            make_sample(tasks[name], haystack, length, 0.0, f"{args.seed}/{name}/{length}/{r}")
        out = Path(args.out or args.model)
        results = Results(out)
        log(f"haystack: {source}, {len(haystack.ids):,} tokens, {len(haystack.starts):,} sentences")
        if len(haystack.ids) < args.lengths[-1]:
            log(f"warning: shorter than --lengths {args.lengths[-1]}, so it repeats (--haystack)")
        rows = []
        with results.writing():
            for candidate in candidates:
                rows += run_candidate(candidate, tasks, haystack, results, args)
        report(rows, candidates, source, out, args, started)


def resolve(args) -> tuple[list[Candidate], dict[str, Task]]:
    """Who is judged, and by which tasks. Writes nothing."""
    if args.model == RESULT and not Path(RESULT).exists():
        raise ValueError(f"folder {RESULT}, which train.py makes, does not exist (or give --model)")
    args.model = local_folder(args.model)
    if args.compare is None:
        args.compare = base_of_run(args.model)
    args.compare = list(dict.fromkeys(map(local_folder, args.compare)))
    if args.controls and not args.compare:
        raise ValueError("--controls needs the base model: --compare DIR")
    if args.model in args.compare:
        raise ValueError(f"--compare {args.model} is --model itself")
    folders = (*args.compare, args.model)  # the base first, as in every table and figure
    candidates = [Candidate(f, f, LlamaConfig.from_dir(f)) for f in folders]
    tasks = resolve_grid(args, [c.config.max_position_embeddings for c in candidates])
    tokenizer = load_tokenizer(args.model)
    for c in candidates:
        if c.config.sliding_window is not None and c.config.sliding_window < args.lengths[-1]:
            raise ValueError(
                f"{c.folder}: sliding_window {c.config.sliding_window} is shorter than"
                f" --lengths {args.lengths[-1]}"
            )
        if tokenizer.vocab_size > c.config.vocab_size or tokenizer != load_tokenizer(c.folder):
            raise ValueError(
                f"{c.folder}: its tokenizer or vocabulary is not that of --model {args.model}"
            )
    if args.controls:
        base, new = candidates[0], candidates[-1].config
        rope = (new.rope_theta, new.max_position_embeddings)
        candidates.insert(1, Candidate(base.folder + NEW_BASE, base.folder, base.config, rope))
    return candidates, tasks


def resolve_grid(args, windows: list[int]) -> dict[str, Task]:
    """Fill in lengths, depths, n and haystack -> the tasks by name. windows: of all candidates."""
    template = Path(args.template or Path(args.model) / "needle.json")
    wording, defaults = read_template(template) if args.template or template.is_file() else ({}, {})
    task = defaults.get("task", "niah_single")
    if task not in TASKS:
        raise ValueError(f"{template}: task {task!r} is none of {', '.join(TASKS)}")
    args.tasks = [task] if args.tasks is None else args.tasks
    tasks = {name: dataclasses.replace(TASKS[name], **wording) for name in args.tasks}
    if "needles" in defaults and task in tasks:
        tasks[task] = dataclasses.replace(tasks[task], needles=defaults["needles"])
    for name, t in tasks.items():
        if len(t.keys) < t.needles:
            raise ValueError(f"{name} has {t.needles} needles, but only {len(t.keys)} keys")
    args.haystack = args.haystack or defaults.get("haystack")
    if args.n is None:
        args.n = defaults.get("n", 2)
    if args.n_beyond is None:
        args.n_beyond = defaults.get("n_beyond", args.n)
    new = max(windows)
    args.lengths = sorted(set(args.lengths or [min(windows), new // 4, new // 2, new]))
    args.depths = sorted(set(args.depths))
    check_ranges(args, at_least_1=("n", "n_beyond"))
    if args.lengths[0] < 2:
        raise ValueError(f"--lengths {args.lengths[0]} must be at least 2 tokens")
    if outside := [d for d in args.depths if not 0 <= d <= 1]:
        raise ValueError(f"--depths {outside[0]:g} must be within 0..1")
    return tasks


def report(
    rows: list[dict], candidates: list[Candidate], source: str, out: Path, args, started: float
) -> None:
    table = summarise(rows)
    print_table(table)
    trained = {c.label: c.config.max_position_embeddings for c in candidates}
    thetas = {c.label: c.rope[0] if c.rope else c.config.rope_theta for c in candidates}
    models = {c.label: {"rope_theta": thetas[c.label], "window": c.window} for c in candidates}
    summary = {
        "settings": vars(args) | {"torch_dtype": str(args.torch_dtype)},
        "haystack": source,
        "models": models,
        "table": table,
        "seconds_of_all_rows": round(sum(r["seconds"] for r in rows), 1),
        **provenance(started),
    }
    write_atomically(out / "needle_results.json", json.dumps(summary, indent=2) + "\n")
    for task in args.tasks:
        name = "needle.png" if len(args.tasks) == 1 else f"needle_{task}.png"
        draw_heatmap(out / name, rows, task, trained, names={})
        draw_curves(out / name.replace("needle", "curves", 1), rows, task)
        log(f"figures: {out / name} and {name.replace('needle', 'curves', 1)}")


if __name__ == "__main__":
    main()
