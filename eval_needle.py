"""Needle in a haystack: can the model find a sentence hidden far back in a long text?

    python eval_needle.py --model out --compare models/smollm2 --lengths 2048 8192 16384

Sentences such as "One of the special magic numbers for Lima is: 4821906." are hidden in a long
text; at the end the model is asked for one of them and continues greedily. A cell of the heat-map
is (length, depth). The structure (task text, haystack, question, beginning of the answer; share
of the expected answers found, case-insensitive) is that of RULER (Hsieh et al., 2404.06654), the
grid that of gkamradt's test; the wording is ours.

What is exact here: prompt and answer budget together are `length` tokens, asserted; the prompt is
built from token ids and never encoded again as a whole; a BOS is put in front once, and only if
the checkpoint's own tokenizer does so; needles go in at sentence ends found in the decoded text.

Results, by default in the folder of --model: needle.jsonl (one line per sample; what is there is
not run again), needle_results.json, needle.png.
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
from support.cli import check_ranges, log, on_ctrl_c, progress, provenance, report_errors
from support.figures import draw_heatmap
from support.haystack import CITIES, fingerprint, load_haystack
from support.hub import local_folder
from support.results import Results
from support.run_state import write_atomically

# ---- 1. Tasks ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Task:
    """Wording and number of the needles; the first one is the one that is asked for."""

    keys: int = 1
    intro: str = "Some special magic numbers are hidden in the text below. Remember them.\n\n"
    needle: str = "One of the special magic numbers for {key} is: {value}."
    question: str = "\n\nWhat is the special magic number for {key} that the text above mentions?"
    answer: str = " The special magic number for {key} is:"


TASKS = {"niah_single": Task(keys=1), "multikey": Task(keys=4)}


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
    """The text as tokens, encoded once, with its sentence ends; it repeats when a sample needs
    more."""

    def __init__(self, text: str, tokenizer):
        self.text, self.tokenizer = text, tokenizer
        self.ids = torch.tensor(tokenizer.encode(text))
        self.starts = sentence_ends(self.ids, tokenizer)

    def cut(self, tokens: int, rng: random.Random) -> Tensor:
        """`tokens` ids from a random sentence start on."""
        begin = int(self.starts[rng.randrange(len(self.starts))])
        repeats = math.ceil((begin + tokens) / len(self.ids))
        return self.ids.repeat(repeats)[begin : begin + tokens]


def make_sample(task: Task, haystack: Haystack, length: int, depth: float, row_seed: str) -> Sample:
    """Build one prompt of exactly `length` tokens, answer budget included. row_seed names (seed,
    task, length, repeat): all depths of a row share haystack, keys and values, so that they share
    their beginning too.

    ValueError if the frame alone is longer than `length`."""
    tokenizer, rng = haystack.tokenizer, random.Random(row_seed)
    keys = rng.sample(CITIES, task.keys)
    values = []
    while len(values) < task.keys:
        value = str(rng.randint(1_000_000, 9_999_999))
        if value not in haystack.text and value not in values:  # an answer never occurs elsewhere
            values.append(value)
    head = [tokenizer.bos_id] if tokenizer.adds_bos else []
    head += tokenizer.encode(task.intro)
    tail = tokenizer.encode(task.question.format(key=keys[0]) + task.answer.format(key=keys[0]))
    answer_tokens = len(tokenizer.encode(f" {values[0]}.")) + 8
    texts = [task.needle.format(key=k, value=v) for k, v in zip(keys, values, strict=True)]
    # in running text " needle", at the beginning of a line "needle\n"
    needles = [(tokenizer.encode(" " + t), tokenizer.encode(t + "\n")) for t in texts]
    longest = sum(max(map(len, pair)) for pair in needles)
    room = length - answer_tokens - len(head) - len(tail) - longest
    if room < 1:
        raise ValueError(
            f"--lengths {length} is too short: with its keys this prompt takes at least"
            f" {length - room + 1} tokens"
        )
    hay = haystack.cut(length, rng)  # more than `room`: one form of a needle may be shorter
    ends = sentence_ends(hay[:room], tokenizer)
    fractions = [depth] + [rng.random() for _ in needles[1:]]
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
    return Sample(ids, values[:1], places[0] / room, answer_tokens)


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
    rope: tuple[float, int] | None = None  # (base, window)

    def load(self, args) -> Llama:
        model = load_pretrained(self.folder, args.torch_dtype, args.device)
        if self.rope:
            model.config = model.config.with_rope(*self.rope)
        return model.eval()

    @functools.cached_property
    def identity(self) -> str:
        return fingerprint(self.folder) + (f"/rope{self.rope[0]:.6g}" if self.rope else "")


def run_candidate(candidate: Candidate, haystack: Haystack, results: Results, args) -> list[dict]:
    """All cells of one candidate -> their rows; the model is loaded only if some cell is
    missing."""
    model, chosen = None, []
    cells = [(t, n, r) for t in args.tasks for n in args.lengths for r in range(args.n)]
    cells += [("loss", n, r) for n in args.lengths for r in range(args.n)] if args.ppl else []
    for task, length, repeat in progress(cells, candidate.label, unit="row"):
        row_seed = f"{args.seed}/{task}/{length}/{repeat}"
        shared = None
        for depth in sorted(args.depths, reverse=True) if task != "loss" else [0.0]:
            if task == "loss":
                sample = Sample(haystack.cut(length, random.Random(row_seed)), [], 0.0, 0)
            else:
                sample = make_sample(TASKS[task], haystack, length, depth, row_seed)
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


# ---- 5. Tables ---------------------------------------------------------------------------------


def wilson(successes: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share. Unlike the textbook one it is right at 0 and 1 and for
    small n.

    >>> [round(x, 3) for x in wilson(10, 10)]
    [0.722, 1.0]
    """
    p, z2 = successes / n, z * z
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = z * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def summarise(rows: list[dict], args) -> list[dict]:
    """One entry per (model, task, length): n, mean score, 95 % interval (loss: mean only)."""
    table = []
    for model in dict.fromkeys(r["model"] for r in rows):
        for task in dict.fromkeys(r["task"] for r in rows):
            for length in args.lengths:
                scores = [
                    r["score"]
                    for r in rows
                    if (r["model"], r["task"], r["length"]) == (model, task, length)
                ]
                if not scores:
                    continue
                entry = {"model": model, "task": task, "length": length, "n": len(scores)}
                entry["mean"] = round(sum(scores) / len(scores), 4)
                if task != "loss":
                    entry["interval_95"] = [round(x, 3) for x in wilson(sum(scores), len(scores))]
                table.append(entry)
    return table


def print_table(table: list[dict], lengths: list[int]) -> None:
    for task in dict.fromkeys(e["task"] for e in table):
        unit = "nats per token" if task == "loss" else "found, 95 % interval"
        print(f"\n{task} ({unit})\n{'':24}" + "".join(f"{n:>20,}" for n in lengths))
        for model in dict.fromkeys(e["model"] for e in table):
            line = f"{model[-23:]:24}"
            for n in lengths:
                e = next(
                    e for e in table if (e["model"], e["task"], e["length"]) == (model, task, n)
                )
                if task == "loss":
                    text = f"{e['mean']:.3f} (n={e['n']})"
                else:
                    low, high = e["interval_95"]
                    text = f"{e['mean']:.0%} [{low:.0%},{high:.0%}] n={e['n']}"
                line += f"{text:>20}"
            print(line)


# ---- 6. The command ----------------------------------------------------------------------------

RESULT = "out"  # where train.py puts its result
NEW_BASE = " (new base)"  # ends the label of the control: old weights, new RoPE base


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(
        prog="eval_needle.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = p.add_argument
    add("--model", default=RESULT, metavar="DIR", help="Hugging Face folder to judge")
    add("--compare", nargs="+", default=[], metavar="DIR", help="others beside it, e.g. the base")
    add("--controls", action="store_true", help="also the base under the new RoPE base")
    add("--tasks", nargs="*", choices=sorted(TASKS), default=["niah_single"], help="may be none")
    depths = [0.0, 0.25, 0.5, 0.75, 1.0]
    lengths = [2048, 8192, 16384]
    add("--lengths", nargs="+", type=int, default=lengths, help="tokens, answer included")
    add("--depths", nargs="+", type=float, default=depths, help="0: start, 1: end")
    add("--n", type=int, default=2, help="samples per length and depth")
    add("--ppl", action="store_true", help="also the loss per token on n haystack texts per length")
    add("--haystack", metavar="PATH", help="text or folder (None: data/essays, else Python docs)")
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
        candidates, configs = resolve(args)
        text, source = load_haystack(args.haystack)
        haystack = Haystack(text, load_tokenizer(args.model))
        # refuse before anything is run; which keys come, and their tokens, depends on the length
        for task, length, r in itertools.product(args.tasks, args.lengths, range(args.n)):
            make_sample(TASKS[task], haystack, length, 0.0, f"{args.seed}/{task}/{length}/{r}")
        out = Path(args.out or args.model)
        out.mkdir(parents=True, exist_ok=True)
        results = Results(out / "needle.jsonl")
        log(f"haystack: {source}, {len(haystack.ids):,} tokens, {len(haystack.starts):,} sentences")
        if len(haystack.ids) < args.lengths[-1]:
            log(f"warning: shorter than --lengths {args.lengths[-1]}, so it repeats (--haystack)")
        with on_ctrl_c(results.what_is_saved):
            rows = [row for c in candidates for row in run_candidate(c, haystack, results, args)]
        report(rows, configs, source, out, args, started)


def resolve(args: argparse.Namespace) -> tuple[list[Candidate], dict[str, LlamaConfig]]:
    """Who is judged, and their configs by label. Writes nothing."""
    check_ranges(args, at_least_1=("n",))
    args.lengths, args.depths = sorted(set(args.lengths)), sorted(set(args.depths))
    args.tasks = list(dict.fromkeys(args.tasks))
    if args.model == RESULT and not Path(RESULT).exists():
        raise ValueError(f"folder {RESULT}, which train.py makes, does not exist (or give --model)")
    args.model = local_folder(args.model)
    args.compare = list(dict.fromkeys(map(local_folder, args.compare)))
    if args.lengths[0] < 2:
        raise ValueError(f"--lengths {args.lengths[0]} must be at least 2 tokens")
    if outside := [d for d in args.depths if not 0 <= d <= 1]:
        raise ValueError(f"--depths {outside[0]:g} must be within 0..1")
    if args.out and Path(args.out).exists() and not Path(args.out).is_dir():
        raise ValueError(f"--out {args.out} is a file; a folder for the results is needed")
    if args.controls and not args.compare:
        raise ValueError("--controls needs the base model: --compare DIR")
    if args.model in args.compare:
        raise ValueError(f"--compare {args.model} is --model itself")
    # the base first, as in every table and figure; what is judged against the others last
    candidates = [Candidate(folder, folder) for folder in (*args.compare, args.model)]
    configs = {c.label: LlamaConfig.from_dir(c.folder) for c in candidates}
    tokenizer = load_tokenizer(args.model)
    for folder, config in configs.items():
        if config.sliding_window is not None and config.sliding_window < args.lengths[-1]:
            raise ValueError(
                f"{folder}: sliding_window {config.sliding_window} is shorter than"
                f" --lengths {args.lengths[-1]}"
            )
        if tokenizer.vocab_size > config.vocab_size or tokenizer != load_tokenizer(folder):
            raise ValueError(
                f"{folder}: its tokenizer or vocabulary is not that of --model {args.model}"
            )
    if args.controls:
        new = configs[args.model]
        rope = (new.rope_theta, new.max_position_embeddings)
        base = args.compare[0]
        candidates.insert(1, Candidate(base + NEW_BASE, base, rope))
        configs[base + NEW_BASE] = new
    return candidates, {c.label: configs[c.label] for c in candidates}


def report(rows: list[dict], configs: dict, source: str, out: Path, args, started: float) -> None:
    table = summarise(rows, args)
    print_table(table, args.lengths)
    settings = {k: str(v) if k == "torch_dtype" else v for k, v in vars(args).items()}
    measured = {"seconds_of_all_rows": round(sum(r["seconds"] for r in rows), 1)}
    models = {
        label: {"rope_theta": c.rope_theta, "window": c.max_position_embeddings}
        for label, c in configs.items()
    }
    summary = {
        "settings": settings,
        "haystack": source,
        "models": models,
        "table": table,
        **measured,
        **provenance(started),
    }
    write_atomically(out / "needle_results.json", json.dumps(summary, indent=2) + "\n")
    trained = {c: configs[c.removesuffix(NEW_BASE)].max_position_embeddings for c in configs}
    for task in args.tasks:
        name = "needle.png" if len(args.tasks) == 1 else f"needle_{task}.png"
        draw_heatmap(out / name, rows, task, trained, names={})
        log(f"figure: {out / name}")


if __name__ == "__main__":
    main()
