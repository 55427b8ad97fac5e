"""Needles by this project and by transformers.generate: seconds, answers, memory.

    python studies/bench_eval.py --out assets/results/eval_cost.json     # minutes; resumable

The same prompts, 4 lengths x 5 depths, in turns within one run: a row (5 depths) of ours, then the
same row by transformers, then the next row the other way round, so that a machine that is shared
and noisy affects both equally. Ours is what eval_needle.py does (prefill in chunks, the common
beginning of the depths once); transformers prefills each prompt, with SDPA attention and its own
cache. Both in worker processes of their own, so that each has its own peak of memory.
"""

import argparse
import time
from pathlib import Path

import torch
from common import in_processes, read_json, write_json

from eval_needle import TASKS, Haystack, SharedPrefix, make_sample
from model import load_pretrained, load_tokenizer
from support.needles.haystack import load_haystack
from support.system.console import peak_gib, provenance, report_errors


def ours(folder: str, stop: int):
    model = load_pretrained(folder, torch.float32).eval()

    def answer_row(samples):
        shared = SharedPrefix(model)  # nothing is kept from an earlier row
        return [shared.answer(s.ids, s.answer_tokens, (stop,)) for s in samples]

    return answer_row


def transformers(folder: str, stop: int):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def answer_row(samples):
        rows = []
        for s in samples:
            out = model.generate(
                s.ids[None],
                attention_mask=torch.ones_like(s.ids[None]),
                max_new_tokens=s.answer_tokens,
                do_sample=False,
                eos_token_id=stop,
                pad_token_id=stop,
            )
            new = out[0, len(s.ids) :].tolist()
            rows.append(new[: new.index(stop)] if stop in new else new)
        return rows

    return answer_row


def worker(kind: str, folder: str, pipe) -> None:
    """Answers rows (length, depths) from the pipe until None comes."""
    haystack = Haystack(load_haystack(None)[0], load_tokenizer(folder))
    make = {"ours": ours, "transformers": transformers}[kind]
    answer_row = make(folder, haystack.tokenizer.eos_id)
    while (row := pipe.recv()) is not None:
        length, depths = row
        samples = [
            make_sample(TASKS["niah_single"], haystack, length, d, f"0/niah_single/{length}/0")
            for d in sorted(depths, reverse=True)
        ]
        started = time.perf_counter()
        answers = answer_row(samples)
        seconds = time.perf_counter() - started
        pipe.send({"seconds": seconds, "answers": answers, "peak_GiB": peak_gib()})


def same_run(args) -> list:
    """Rows of another commit, model or depths do not go into one table."""
    return [args.model, args.depths, provenance(0)["commit"]]


def measure(args, done: dict) -> dict:
    """Rows by length: what each of the two needed. Written after each row; those there stay."""
    pipes = in_processes(worker, ("ours", "transformers"), args.model)
    for pipe in pipes.values():
        pipe.send((512, [0.5]))  # warms up
        pipe.recv()
    for i, length in enumerate(args.lengths):
        if str(length) in done:
            continue
        row = {}
        for kind in list(pipes)[:: 1 if i % 2 == 0 else -1]:
            pipes[kind].send((length, args.depths))
            row[kind] = pipes[kind].recv()
            print(f"{length} tokens, {kind}: {row[kind]['seconds']:.1f} s", flush=True)
        done[str(length)] = row
        write_json(args.out.with_suffix(".rows"), {"of": same_run(args), "rows": done})
    for pipe in pipes.values():
        pipe.send(None)
    return done


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", default="models/smollm2", help="Hugging Face folder")
    p.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    p.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    p.add_argument("--out", type=Path, required=True, help="JSON file to write")
    with report_errors():
        args, started = p.parse_args(argv), time.time()
        kept = args.out.with_suffix(".rows")
        before = read_json(kept)
        done = measure(args, before["rows"] if before.get("of") == same_run(args) else {})
        rows = [done[str(length)] for length in args.lengths]
        seconds = {k: round(sum(r[k]["seconds"] for r in rows), 1) for k in rows[0]}
        pairs = [
            ours == theirs
            for r in rows
            for ours, theirs in zip(r["ours"]["answers"], r["transformers"]["answers"], strict=True)
        ]
        result = {
            "settings": {"model": args.model, "lengths": args.lengths, "depths": args.depths},
            "dtype": "float32",
            "seconds_of_all_rows": seconds,
            "ratio": round(seconds["ours"] / seconds["transformers"], 3),
            "ratio_by_length": {
                n: round(r["ours"]["seconds"] / r["transformers"]["seconds"], 3)
                for n, r in zip(args.lengths, rows, strict=True)
            },
            "answers": len(pairs),
            "answers_equal": sum(pairs),
            "peak_GiB_of": {k: round(max(r[k]["peak_GiB"] for r in rows), 2) for k in seconds},
            **provenance(started),
        }
        write_json(args.out, result, indent=2)
        kept.unlink()
        print(args.out.read_text())


if __name__ == "__main__":
    main()
