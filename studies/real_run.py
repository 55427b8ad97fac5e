"""The real run behind README's first table: SmolLM2-135M from its window of 8,192 to 16,384 tokens.

    python studies/real_run.py                 # hours on 2 cores; killed and restarted it goes on
    python studies/real_run.py --redraw        # only figure and intervals, from the rows in assets/
    python studies/real_run.py --smallest      # README's first commands: time, memory and disk

Trains longrecipe first, then the control `--method none` on the same tokens, judges the rows on
essays that no training has seen (needles and loss), and copies table, figure and JSON to
assets/results/smollm2_16k. The smallest run leaves assets/results/smallest_run.json and no model.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from update_readme import plain_name, table_order

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from support.needles.figures import draw_heatmap  # noqa: E402
from support.needles.summary import summarise  # noqa: E402
from support.system.whole_files import write_atomically  # noqa: E402

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
# README's "Try it"; tests/test_readme.py compares
SMALLEST_TRAIN = (
    f"train.py --model {BASE} --target_len 16384 --train_len 1024 --steps 4 --probe_steps 1"
    " --replay_steps 1 --batch_sequences 2 --analysis_samples 2 --lr 1e-4"
)
SMALLEST_EVAL = "eval_needle.py --lengths 1024 2048 --depths 0.5 --n 2"


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
    shutil.copyfile(out / "needle_results.json", RESULTS / name / "needle_results.json")


def panels(models: dict) -> tuple[dict, dict]:
    """Titles and trained windows of the heat-map, as README's table names and orders the models."""
    order = table_order(models)
    # the control has the base's weights: trained for the base's window
    windows = {m: models[m.removesuffix(" (new base)")]["window"] for m in order}
    return {m: plain_name(m) for m in order}, windows


def redraw() -> None:
    """Figure and intervals from the rows in assets/."""
    rows = [json.loads(line) for line in (RESULTS / "needle.jsonl").read_text().splitlines()]
    file = RESULTS / "rows" / "needle_results.json"
    found = json.loads(file.read_text())
    needles = [r for r in rows if r["task"] == "niah_single" and r["model"] in found["models"]]
    losses = [e for e in found["table"] if e["task"] == "loss"]
    found["table"] = summarise(needles) + losses
    write_atomically(file, json.dumps(found, indent=2) + "\n")
    names, windows = panels(found["models"])
    draw_heatmap(RESULTS / "rows" / "needle.png", rows, "niah_single", windows, names)


def gigabytes(path: Path) -> float:
    """Size of a file or folder in GB; what disappears meanwhile counts nothing."""
    total = 0
    for file in [path, *path.rglob("*")]:
        with contextlib.suppress(FileNotFoundError):
            total += file.lstat().st_size if not file.is_dir() else 0
    return total / 1e9


def smallest() -> None:
    """Run README's first commands in a folder of their own; keep what they needed."""
    with tempfile.TemporaryDirectory() as tmp:
        out, most, state = Path(tmp) / "out", 0.0, 0.0
        training = subprocess.Popen([sys.executable, *SMALLEST_TRAIN.split(), "--out", str(out)])
        while training.poll() is None:
            most, state = max(most, gigabytes(out)), max(state, gigabytes(out / "state.pt"))
            time.sleep(0.5)
        if training.returncode:
            raise SystemExit(f"train.py ended with exit code {training.returncode}")
        size = gigabytes(out)
        run(f"{SMALLEST_EVAL} --model {out}")
        trained, judged = (
            json.loads((out / f).read_text()) for f in ("run.json", "needle_results.json")
        )
    keep = ("seconds", "peak_GiB")
    found = {
        "train": {"command": SMALLEST_TRAIN} | {k: trained[k] for k in keep},
        "eval": {"command": SMALLEST_EVAL} | {k: judged[k] for k in keep},
        "disk_GB": {
            "environment": gigabytes(Path(sys.prefix)),
            "model_and_essays": gigabytes(Path(BASE)) + gigabytes(Path("data/essays")),
            "out": size,
            "out_at_most": most,
            "state_pt": state,
        },
        "dtype": trained["settings"]["dtype"],
        **{k: trained[k] for k in ("commit", "torch", "python", "hardware", "threads")},
    }
    found["disk_GB"] = {k: round(v, 2) for k, v in found["disk_GB"].items()}
    Path("assets/results/smallest_run.json").write_text(json.dumps(found, indent=2) + "\n")


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--dtype", default="bfloat16", help="float32 on CPUs without bf16 instructions")
    p.add_argument(
        "--redraw", action="store_true", help="figure and intervals, from the rows in assets/"
    )
    p.add_argument("--smallest", action="store_true", help="only README's first commands, measured")
    args = p.parse_args(argv)
    os.chdir(ROOT)
    if args.redraw or args.smallest:
        redraw() if args.redraw else smallest()
        return
    started = time.time()
    longrecipe = train("longrecipe", args.dtype)
    judge("rows", longrecipe, BASE, EVAL, args.dtype)  # kept as soon as it is there
    none = train("none", args.dtype)
    stages = f"{longrecipe}/extended {longrecipe}/replayed"
    judge("rows", longrecipe, f"{BASE} {none}", f"{EVAL} --controls", args.dtype)
    judge("stages", longrecipe, stages, "--tasks --lengths 2048 16384 --ppl", args.dtype)
    redraw()
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
