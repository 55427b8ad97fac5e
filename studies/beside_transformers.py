"""This project beside transformers on a CPU, with the same model, dtype and input.

    python studies/beside_transformers.py step      # a training step on 4,992 tokens -> cost.json
    python studies/beside_transformers.py lengths   # its seconds by length -> cost_by_length.json
    python studies/beside_transformers.py needles   # answers to 20 prompts -> eval_cost.json

Two processes hold one model each and work in turns (A B A B ...), so that a machine that is shared
and noisy affects both equally. A step is forward, backward, clipping and AdamW on one sample with
gapped position ids; transformers runs it with its own gradient checkpointing, its own loss and SDPA
attention. The memory of a step is what it needs above weights, gradients and optimizer state: peak
resident size during the step minus resident size before it, when those three already exist.
Prompts are answered as eval_needle.py does it (the common beginning of the depths once), and by
transformers' generate, one by one. Linux only (/proc).
"""

import argparse
import contextlib
import ctypes
import itertools
import multiprocessing
import os
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import torch
from common import RESULTS, write_json

from eval_needle import TASKS, Haystack, SharedPrefix, make_sample
from model import linear_cross_entropy, load_pretrained, load_tokenizer
from support.memory.activations import set_levers
from support.memory.optimizer import MasterAdamW
from support.needles.haystack import load_haystack
from support.system.bad_input import BadInput
from support.system.console import provenance, report_errors
from train import Settings, next_token_targets


class Ours:
    """An engine: a training step in two parts, and the ids of greedy answers to prompts."""

    def __init__(self, folder: str, dtype: torch.dtype):
        self.model = load_pretrained(folder, dtype)
        set_levers(self.model, Settings(keep_attention=True))
        self.optimizer = MasterAdamW(self.model, 1e-5, 0.1)

    def forward_backward(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        weight, targets = self.model.lm_head.weight, next_token_targets(ids)
        loss, n = linear_cross_entropy(self.model.hidden(ids, positions), weight, targets)
        (loss / n).backward()

    def step(self) -> None:
        self.optimizer.step(1e-5, 1.0)

    def answers(self, prompts: list[torch.Tensor], new_tokens: int, stop: int) -> list:
        shared = SharedPrefix(self.model)  # nothing is kept from earlier prompts
        return [shared.answer(ids, new_tokens, (stop,)) for ids in prompts]


class Transformers:
    """The same by transformers' own means."""

    def __init__(self, folder: str, dtype: torch.dtype):
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        parameters = self.model.parameters()
        self.optimizer = torch.optim.AdamW(parameters, 1e-5, weight_decay=0.1, fused=True)

    def forward_backward(self, ids: torch.Tensor, positions: torch.Tensor) -> None:
        ones = torch.ones_like(ids)
        inputs = {"position_ids": positions, "attention_mask": ones, "labels": ids}
        self.model.train()(ids, **inputs, use_cache=False).loss.backward()

    def step(self) -> None:
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def answers(self, prompts: list[torch.Tensor], new_tokens: int, stop: int) -> list:
        options = {"max_new_tokens": new_tokens, "do_sample": False}
        options |= {"eos_token_id": stop, "pad_token_id": stop}
        rows = []
        for ids in prompts:
            mask = torch.ones_like(ids[None])
            out = self.model.eval().generate(ids[None], attention_mask=mask, **options)
            new = out[0, len(ids) :].tolist()
            rows.append(new[: new.index(stop)] if stop in new else new)
        return rows


ENGINES = {"ours": Ours, "transformers": Transformers}


# ---- measuring ---------------------------------------------------------------------------------


def resident_gib(field: str) -> float:
    """VmRSS: now; VmHWM: at the peak since reset_peak."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) / 2**20


def reset_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still holds is not state
    Path("/proc/self/clear_refs").write_text("5")


def start(kind: str, folder: str, dtype: torch.dtype) -> None:
    """In a process of its own: the engine that the work there is done with."""
    global engine
    torch.manual_seed(0)
    engine = ENGINES[kind](folder, dtype)


def timed_step(tokens: int) -> dict:
    short, positions = torch.randint(0, 256, (1, 64)), torch.arange(64)[None]
    engine.forward_backward(short, positions)
    engine.step()  # the optimizer state exists from here on
    engine.forward_backward(short, positions)  # and so do the gradients
    ids, spread = torch.randint(0, 256, (1, tokens)), torch.arange(tokens) * 16384 // tokens
    reset_peak()
    before, started = resident_gib("VmRSS"), time.perf_counter()
    engine.forward_backward(ids, spread[None])
    peak = resident_gib("VmHWM")
    engine.step()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_GiB": peak, "above_state_GiB": peak - before}


def timed_answers(prompts: list[list[int]], new_tokens: int, stop: int) -> dict:
    started = time.perf_counter()
    answers = engine.answers([torch.tensor(ids) for ids in prompts], new_tokens, stop)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "answers": answers, "peak_GiB": resident_gib("VmHWM")}


def in_turns(folder: str, dtype: torch.dtype, work, tasks: list[tuple]) -> dict[str, list[dict]]:
    """What each of the two found for each task but the first, which warms up."""
    found: dict[str, list[dict]] = {kind: [] for kind in ENGINES}
    spawn, processes = multiprocessing.get_context("spawn"), {}
    with contextlib.ExitStack() as both:
        for kind in ENGINES:
            pool = ProcessPoolExecutor(1, spawn, start, (kind, folder, dtype))
            processes[kind] = both.enter_context(pool)
        for task, (kind, process) in itertools.product(tasks, processes.items()):
            try:
                found[kind].append(process.submit(work, *task).result())
            except BrokenProcessPool:
                raise BadInput(f"the process of {kind} was killed: too little memory?") from None
            print(f"{kind}: {found[kind][-1]['seconds']:.2f} s", flush=True)
    return {kind: rows[1:] for kind, rows in found.items()}


def steps(args, tokens: int, n: int) -> dict[str, list[dict]]:
    """n steps of each on samples of this length, after a short one."""
    return in_turns(args.model, args.dtype, timed_step, [(max(64, tokens // 8),), *[(tokens,)] * n])


# ---- a step ------------------------------------------------------------------------------------


def step(args) -> dict:
    timed = steps(args, args.tokens, args.n)
    # Memory is measured in a second run, whose allocator returns freed tensors at once: otherwise
    # the peak would include its free lists. (That costs time, so those steps are not timed.)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    held = {kind: rows[0] for kind, rows in steps(args, args.tokens, 1).items()}
    seconds = {kind: [row["seconds"] for row in rows] for kind, rows in timed.items()}
    ratios = [ours / theirs for ours, theirs in zip(*seconds.values(), strict=True)]
    ours, theirs = (held[kind]["above_state_GiB"] for kind in ENGINES)
    return {
        "median": {k: held[k] | {"seconds": statistics.median(seconds[k])} for k in ENGINES},
        "all_seconds": seconds,
        "time_ratio": statistics.median(ratios),
        "memory_ratio": ours / theirs,
    }


# ---- a step by length --------------------------------------------------------------------------


def lengths(args) -> dict:
    """Pairs of steps of each length. What is measured is written and drawn after each length, so
    that one for which the memory is too small takes nothing away."""
    rows, about = [], {"model": args.model, "dtype": str(args.dtype)[6:]}
    for tokens in args.lengths:
        found = steps(args, tokens, 1 if tokens >= 8192 else args.n)
        for pair in zip(*found.values(), strict=True):
            seconds = [step["seconds"] for step in pair]
            rows.append({"tokens": tokens, **dict(zip(ENGINES, seconds, strict=True))})
        made = about | {"rows": rows, **by_length(rows)}
        write_json(args.out, made, indent=2)
        draw(made | provenance(0), args.out.with_suffix(".png"))
    return made


def by_length(rows: list[dict]) -> dict:
    """The fits, and the ratio of the medians of each length."""
    ratios = {}
    for tokens in sorted({r["tokens"] for r in rows}):
        same = [r for r in rows if r["tokens"] == tokens]
        ours, theirs = (statistics.median(r[kind] for r in same) for kind in ENGINES)
        ratios[tokens] = round(ours / theirs, 3)
    return {"fit": {kind: fit(rows, kind) for kind in ENGINES}, "ratio_by_length": ratios}


def fit(rows: list[dict], kind: str) -> dict:
    """seconds = a T + b T^2, least squares of the relative error. No constant: the
    optimizer's step is too short to show beside points that scatter by several percent."""
    T, s = (torch.tensor([r[k] for r in rows], dtype=torch.float64) for k in ("tokens", kind))
    design = torch.stack((T / s, T**2 / s), dim=1)
    solution = torch.linalg.lstsq(design, torch.ones(len(s), 1, dtype=torch.float64)).solution
    worst = float((design @ solution - 1).abs().max())
    a, b = solution[:, 0].tolist()
    return {"s_per_token": a, "s_per_token_squared": b, "largest_error": worst}


def draw(found: dict, path: Path) -> None:
    """Milliseconds a token: every length has the same weight, and the fit is a + b T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes, measured = figure.subplots(), [r["tokens"] for r in found["rows"]]
    T = torch.linspace(min(measured), max(measured), 200)
    for (kind, f), colour in zip(found["fit"].items(), ("tab:blue", "tab:orange"), strict=True):
        times = [1e3 * r[kind] / r["tokens"] for r in found["rows"]]
        axes.plot(measured, times, "o", color=colour, label=f"{kind}, a step each")
        a, b = f["s_per_token"], f["s_per_token_squared"]
        label = f"fit: {a * 1e3:.2f} ms + {b * 1e6:.2f} µs x T"
        axes.plot(T, 1e3 * (a + b * T), color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(set(measured)), [f"{n:,}" for n in sorted(set(measured))])
    axes.set(xlabel="T: length of the sample, tokens", ylim=(0, None))
    axes.set_ylabel("time of a training step, milliseconds a token")
    machine = f"{found['threads']} cores of {found['hardware']}"
    about = f"{found['model']}, {found['dtype']}, {machine}"
    axes.set_title(f"{about}\n{len(measured)} pairs of steps", fontsize=10)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)


# ---- needles -----------------------------------------------------------------------------------


def needles(args) -> dict:
    tokenizer, depths = load_tokenizer(args.model), (1.0, 0.75, 0.5, 0.25, 0.0)
    haystack, tasks = Haystack(load_haystack(None)[0], tokenizer), []
    for length in (512, *args.lengths):
        seed = f"0/niah_single/{length}/0"
        samples = [make_sample(TASKS["niah_single"], haystack, length, d, seed) for d in depths]
        prompts = [sample.ids.tolist() for sample in samples]
        tasks.append((prompts, samples[0].answer_tokens, tokenizer.eos_id))
    found = in_turns(args.model, args.dtype, timed_answers, tasks)
    seconds = {kind: [row["seconds"] for row in rows] for kind, rows in found.items()}
    ours, theirs = ([x for row in rows for x in row["answers"]] for rows in found.values())
    pairs = zip(args.lengths, *seconds.values(), strict=True)
    return {
        "seconds_of_all_rows": {kind: sum(each) for kind, each in seconds.items()},
        "ratio_by_length": {n: a / b for n, a, b in pairs},
        "answers": len(ours),
        "answers_equal": sum(a == b for a, b in zip(ours, theirs, strict=True)),
        "peak_GiB_of": {kind: rows[-1]["peak_GiB"] for kind, rows in found.items()},
    }


WORK = {  # what to measure -> function, file in assets/results
    "step": (step, "cost"),
    "lengths": (lengths, "cost_by_length"),
    "needles": (needles, "eval_cost"),
}


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("work", choices=WORK)
    p.add_argument("--model", default="models/smollm2", help="Hugging Face folder")
    p.add_argument("--tokens", type=int, default=4992, help="step: length of the sample")
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    p.add_argument("--n", type=int, default=2, help="counted steps of each (from 8,192 on: 1)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--out", type=Path, help="JSON file to write (None: in assets/results)")
    with report_errors():
        args, started = p.parse_args(argv), time.time()
        settings = {k: v for k, v in vars(args).items() if k != "out"}
        measure, name = WORK[args.work]
        args.out = args.out or RESULTS / f"{name}.json"
        args.dtype = getattr(torch, args.dtype)
        found = {"settings": settings, **measure(args), **provenance(started)}
        write_json(args.out, found, indent=2)
        print(args.out.read_text())


if __name__ == "__main__":
    main()
