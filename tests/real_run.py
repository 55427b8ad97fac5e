"""The real run behind README's first table: SmolLM2-135M from its window of 8,192 to 16,384 tokens.

    python tests/real_run.py                 # hours on 2 cores; killed and restarted it goes on

Trains longrecipe first, then the control `--method none` on the same tokens, judges the rows on
essays that no training has seen (needles and loss), and copies table, figure and JSON to
assets/results/smollm2_16k.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RUNS = Path("runs/smollm2_16k")  # relative, so that no JSON names a machine's folders
RESULTS = Path("assets/results/smollm2_16k")
BASE = "models/smollm2"

TRAIN = (
    f"--model {BASE} --target_len 16384 --batch_sequences 1 --steps 64 --probe_steps 6"
    " --replay_steps 8 --lr 2e-4 --replay_lr 2e-5 --keep_stages --save_minutes 5"
)
METHODS = {
    "longrecipe": "--method longrecipe",
    "none": f"--method none --impactful {RUNS}/longrecipe/impactful.json",
}
EVAL = "--lengths 2048 8192 16384 --n 2 --ppl"


def run(command: str) -> None:
    print("$ python", command, flush=True)
    subprocess.run([sys.executable, *command.split()], check=True)


def train(method: str, dtype: str) -> Path:
    out = RUNS / method
    state = json.loads((out / "run.json").read_text()) if (out / "run.json").is_file() else {}
    if state.get("status") != "done":
        resume = "--resume" if state else ""
        run(f"train.py {TRAIN} {METHODS[method]} --dtype {dtype} --out {out} {resume}")
    return out


def judge(name: str, model: Path, others: str, flags: str, dtype: str) -> None:
    out = RUNS / "eval"  # one folder: what one table measured, the next one need not
    run(f"eval_needle.py --model {model} --compare {others} {flags} --dtype {dtype} --out {out}")
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    shutil.copyfile(out / "needle.jsonl", RESULTS / "needle.jsonl")
    for file in ["needle_results.json", *([] if "--tasks" in flags else ["needle.png"])]:
        shutil.copyfile(out / file, RESULTS / name / file)


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--dtype", default="bfloat16", help="float32 on CPUs without bf16 instructions")
    args = p.parse_args(argv)
    os.chdir(ROOT)
    started = time.time()
    longrecipe = train("longrecipe", args.dtype)
    judge("rows", longrecipe, BASE, EVAL, args.dtype)  # kept as soon as it is there
    none = train("none", args.dtype)
    stages = f"{longrecipe}/extended {longrecipe}/replayed"
    judge("rows", longrecipe, f"{BASE} {none}", f"{EVAL} --controls", args.dtype)
    judge("stages", longrecipe, stages, "--tasks --lengths 2048 16384 --ppl", args.dtype)
    for method in METHODS:
        for file in (
            "run.json",
            "metrics.jsonl",
            *(["impactful.json"] if method != "none" else []),
        ):
            (RESULTS / method).mkdir(parents=True, exist_ok=True)
            shutil.copyfile(RUNS / method / file, RESULTS / method / file)
    print(f"all rows there after {(time.time() - started) / 60:.0f} more minutes: {RESULTS}")


if __name__ == "__main__":
    main()
