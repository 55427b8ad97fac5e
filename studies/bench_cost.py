"""Cost of one training step: transformers and this project on the same model, tokens and dtype.

    python studies/bench_cost.py    # SmolLM2, 4,992 tokens -> assets/results/cost.json

Two worker processes hold one model each and take steps in turn (A B A B ...), so that a machine
that is shared and noisy affects both equally. A step is forward, backward, clipping and AdamW on
one sample with gapped position ids. transformers runs with its own gradient checkpointing, its own
loss and SDPA attention. Memory is what a step needs above weights, gradients and optimizer state:
peak resident size during the step minus resident size before it, when those three already exist.
Linux only (/proc).

    python studies/bench_cost.py --lengths 1024 2048 4096 8192    # -> cost_by_length.json, .png

measures time against length instead, a pair of steps per length and round. A length that is in the
JSON already is not measured again; with all of them there, only fit and figure are made anew.
"""

import argparse
import ctypes
import math
import os
import statistics
import time
from pathlib import Path

import torch
from common import RESULTS, in_processes, read_json, write_json

from model import linear_cross_entropy, load_pretrained
from support.memory.optimizer import MasterAdamW
from support.system.bad_input import BadInput
from support.system.console import provenance, report_errors
from train import next_token_targets

KINDS = ("ours", "transformers")


def resident_gib(peak: bool = False) -> float:
    field = "VmHWM" if peak else "VmRSS"
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) / 2**20


def reset_peak() -> None:
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the allocator still holds is not state
    Path("/proc/self/clear_refs").write_text("5")


def ours(folder: str, dtype: torch.dtype):
    model = load_pretrained(folder, dtype)
    model.activation_checkpointing = model.keep_attention = True
    optimizer = MasterAdamW(model, 1e-5, 0.1)

    def forward_backward(ids, positions):
        hidden = model.hidden(ids, positions)
        loss, n = linear_cross_entropy(hidden, model.lm_head.weight, next_token_targets(ids))
        (loss / n).backward()
        return loss.item() / n

    return forward_backward, lambda: optimizer.step(1e-5, 1.0)


def transformers(folder: str, dtype: torch.dtype):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, weight_decay=0.1, fused=True)

    def forward_backward(ids, positions):
        out = model(
            ids,
            position_ids=positions,
            attention_mask=torch.ones_like(ids),
            labels=ids,
            use_cache=False,
        )
        out.loss.backward()
        return out.loss.item()

    def step():
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return forward_backward, step


def worker(kind: str, folder: str, dtype: torch.dtype, pipe) -> None:
    torch.manual_seed(0)
    forward_backward, step = {"ours": ours, "transformers": transformers}[kind](folder, dtype)
    short, positions = torch.randint(0, 256, (1, 64)), torch.arange(64)[None]
    forward_backward(short, positions)
    step()  # the optimizer state exists from here on
    while tokens := pipe.recv():
        ids = torch.randint(0, 256, (1, tokens))
        spread = (torch.arange(tokens) * 16384 // tokens)[None]
        forward_backward(short, positions)  # makes the gradients
        reset_peak()
        before = resident_gib()
        started = time.perf_counter()
        loss = forward_backward(ids, spread)
        peak = resident_gib(peak=True)
        step()
        row = {"seconds": time.perf_counter() - started, "loss": loss}
        pipe.send(row | {"peak_GiB": peak, "above_state_GiB": peak - before})


def in_turns(model: str, dtype: torch.dtype, rounds: list[int]) -> dict[str, list[dict]]:
    """A step of each per round, A B A B ...; rounds holds the tokens of each."""
    pipes, rows = in_processes(worker, KINDS, model, dtype), {kind: [] for kind in KINDS}
    for tokens in rounds:
        for kind, pipe in pipes.items():
            pipe.send(tokens)
            rows[kind].append(pipe.recv())
            print(f"{tokens} tokens, {kind}: {rows[kind][-1]}", flush=True)
    for pipe in pipes.values():
        pipe.send(0)
    return rows


def measure(model: str, tokens: int, dtype: torch.dtype, steps: int) -> dict:
    warm_up = max(64, tokens // 8)
    timed = in_turns(model, dtype, [warm_up, *[tokens] * steps])
    # Memory is measured in a second run, whose allocator returns freed tensors at once: otherwise
    # the peak would include its free lists. (That costs time, so those steps are not timed.)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(1 << 20)
    held = {kind: rows[-1] for kind, rows in in_turns(model, dtype, [warm_up, tokens]).items()}
    seconds = {kind: [r["seconds"] for r in rows[1:]] for kind, rows in timed.items()}
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    table = {
        kind: {
            "seconds": round(statistics.median(seconds[kind]), 2),
            "peak_GiB": round(held[kind]["peak_GiB"], 3),
            "above_state_GiB": round(held[kind]["above_state_GiB"], 3),
        }
        for kind in timed
    }
    memory = held["ours"]["above_state_GiB"] / held["transformers"]["above_state_GiB"]
    return {
        "median": table,
        "all_seconds": seconds,
        "time_ratio": round(statistics.median(ratios), 3),
        "time_ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        "memory_ratio": round(memory, 3),
    }


# ---- time against length -----------------------------------------------------------------------


def fit(rows: list[dict], kind: str) -> dict:
    """seconds = a T + b T^2, least squares of the relative error. No constant: the
    optimizer's step is too short to show beside points that scatter by several percent."""
    points = [(r["tokens"], r[kind]) for r in rows]
    T, s = (torch.tensor(x, dtype=torch.float64) for x in zip(*points, strict=True))
    design = torch.stack((T / s, T**2 / s), dim=1)
    solution = torch.linalg.lstsq(design, torch.ones(len(s), 1, dtype=torch.float64)).solution
    worst = float((design @ solution - 1).abs().max())
    a, b = solution[:, 0].tolist()
    return {"s_per_token": a, "s_per_token_squared": b, "largest_error": worst}


def by_length(model: str, lengths: list[int], dtype: torch.dtype, rounds: int, out: Path) -> dict:
    """One pair of steps per length and round. Rows that `out` holds already are kept, and so are
    their commit and machine if nothing is measured."""
    found = read_json(out) or {"rows": []}
    rows, notes, started = found["rows"], found.setdefault("notes", []), time.time()
    for tokens in lengths:
        n = 1 if tokens >= 8192 else rounds
        if sum(r["tokens"] == tokens for r in rows) >= n:
            continue
        try:
            timed = in_turns(model, dtype, [max(64, tokens // 8), *[tokens] * n])
        except EOFError:  # a worker died, most likely out of memory
            notes.append(f"{tokens} tokens: a worker was killed; not run")
            continue
        for ours, theirs in zip(*(timed[k][1:] for k in KINDS), strict=True):
            rows.append(
                {"tokens": tokens, "ours": ours["seconds"], "transformers": theirs["seconds"]}
            )
        found = {"rows": rows, "notes": notes, "model": model, "dtype": str(dtype)[6:]}
        found |= provenance(started)
        write_json(out, found, indent=2)
    if not rows:
        raise BadInput(f"no length was measured: {'; '.join(notes)}")
    measured = sorted({r["tokens"] for r in rows})
    median = {
        k: {n: statistics.median(r[k] for r in rows if r["tokens"] == n) for n in measured}
        for k in KINDS
    }
    found["fit"] = {k: fit(rows, k) for k in KINDS}
    found["ratio_by_length"] = {
        n: round(median["ours"][n] / median["transformers"][n], 3) for n in measured
    }
    return found


def draw(found: dict, path: Path) -> None:
    """Milliseconds a token: every length has the same weight, and the fit is a + b T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes, rows = figure.subplots(), found["rows"]
    lengths = sorted({r["tokens"] for r in rows})
    T = torch.logspace(math.log2(lengths[0]), math.log2(lengths[-1]), 100, base=2)
    for (kind, f), colour in zip(found["fit"].items(), ("tab:blue", "tab:orange"), strict=True):
        points = [(r["tokens"], 1e3 * r[kind] / r["tokens"]) for r in rows]
        axes.plot(*zip(*points, strict=True), "o", color=colour, label=f"{kind}, a step each")
        a, b = f["s_per_token"], f["s_per_token_squared"]
        label = f"fit: {a * 1e3:.2f} ms + {b * 1e6:.2f} µs x T"
        axes.plot(T, 1e3 * (a + b * T), color=colour, label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_xlabel("T: length of the sample, tokens")
    axes.set_ylabel("time of a training step, milliseconds a token")
    axes.set_ylim(bottom=0)
    n = ", ".join(str(sum(r["tokens"] == tokens for r in rows)) for tokens in lengths)
    machine = f"{found['threads']} cores of {found['hardware']}"
    about = f"{found['model']}, {found['dtype']}, {machine}"
    axes.set_title(f"{about}\npairs of steps by length: n = {n}", fontsize=10)
    axes.legend(fontsize=9)
    figure.savefig(path, dpi=120)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", default="models/smollm2", help="Hugging Face folder")
    p.add_argument("--tokens", type=int, default=4992, help="length of the sample")
    p.add_argument("--steps", type=int, default=5, help="counted steps of each")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    p.add_argument("--lengths", type=int, nargs="+", help="time against length instead")
    p.add_argument("--out", type=Path, help="JSON file to write")
    with report_errors():
        args, started = p.parse_args(argv), time.time()
        dtype = getattr(torch, args.dtype)
        if args.lengths:
            out = args.out or RESULTS / "cost_by_length.json"
            found = by_length(args.model, args.lengths, dtype, min(args.steps, 2), out)
            write_json(out, found, indent=2)
            draw(found, out.with_suffix(".png"))
            return
        settings = {k: str(v) for k, v in vars(args).items() if k != "out"}
        result = measure(args.model, args.tokens, dtype, args.steps)
        out = args.out or RESULTS / "cost.json"
        write_json(out, {"settings": settings, **result, **provenance(started)}, indent=2)
        print(out.read_text())


if __name__ == "__main__":
    main()
