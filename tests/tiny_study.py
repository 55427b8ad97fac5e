"""Which part of the recipe does what? The tiny model from 8,192 to 32,768 tokens, many times.

    python tests/tiny_study.py --seeds 0 1 2     # resumable: what is there is not run again
    python tests/tiny_study.py --report          # only the table, from the JSON in assets/results

Every run sees the same number of tokens: 30 % of the target x STEPS, whatever its method and
share. Judged on 8 haystacks x 8 questions at 32,768 and 4 x 8 at 8,192 (eval_needle.py).
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from recipe import ntk_rope_base, train_length  # noqa: E402
from support.cli import log, provenance  # noqa: E402
from support.results import resampled  # noqa: E402
from support.run_state import write_atomically  # noqa: E402

TARGET, STEPS = 32_768, 40
RUNS = Path("runs/tiny_study")
RESULT = Path("assets/results/tiny_study.json")
TIMES_4 = "--rope_base 40000"  # theta x T / L, where the paper's formula gives x 14
SETTINGS = {
    "longrecipe": "",
    "none": "--method none --impactful {impactful}",
    "pose": "--method pose",
    "rpes": "--method rpes",
    "full": "--method full",
    "select random": "--select random",
    "select first": "--select first",
    "select digits": "--select digits",
    "share 10 %": "--train_len 3328",
    "share 60 %": "--train_len 19712",
    "prefix": "--prefix",
    "longrecipe, base x 4": TIMES_4,
    "none, base x 4": f"--method none --impactful {{impactful}} {TIMES_4}",
    "pose, base x 4": f"--method pose {TIMES_4}",
    "rpes, base x 4": f"--method rpes {TIMES_4}",
    "full, base x 4": f"--method full {TIMES_4}",
    "longrecipe, base x 1": "--rope_base 10000",
    "no replay": "--replay_steps 0",
    "no merge": "--merge_weight 1",
}


def steps_for(flags: str) -> int:
    """As many as make the same number of tokens."""
    words = flags.split()
    length = train_length(TARGET)
    if "full" in words:
        length = TARGET
    if "--train_len" in words:
        length = int(words[words.index("--train_len") + 1])
    return max(2, round(STEPS * train_length(TARGET) / length))


def run(command: str) -> None:
    log(f"$ python {command}")
    subprocess.run([sys.executable, *command.split()], check=True, stderr=subprocess.DEVNULL)


def judge(folder: str, out: Path, more: str = "") -> list[dict]:
    for lengths, n in ((8192, 4), (TARGET, 8)):
        run(
            f"eval_needle.py --model {folder} --compare --template assets/tiny/needle.json"
            f" --lengths {lengths} --n {n} --out {out} {more}"
        )
    rows = [json.loads(line) for line in (out / "needle.jsonl").read_text().splitlines()]
    return [{k: r[k] for k in ("model", "length", "repeat", "depth", "score")} for r in rows]


def measure(name: str, seed: int) -> dict:
    out = RUNS / f"{name.replace(' ', '_').replace(',', '').replace('%', '')}_{seed}"
    impactful = RUNS / f"longrecipe_{seed}" / "impactful.json"
    if not (out / "config.json").is_file():
        flags = SETTINGS[name].format(impactful=impactful)
        resume = "--resume" if (out / "run.json").is_file() else ""
        run(
            f"train.py --target_len {TARGET} --steps {steps_for(flags)} --seed {seed} {flags}"
            f" --out {out} {resume}"
        )
    record = json.loads((out / "run.json").read_text())
    rows = judge(str(out), out)
    return {"seconds": record["seconds"], "commit": record["commit"], "scores": by_length(rows)}


def by_length(rows: list[dict]) -> dict:
    """length -> one list of scores per haystack."""
    table: dict[str, dict[int, list[float]]] = {}
    for r in rows:
        table.setdefault(str(r["length"]), {}).setdefault(r["repeat"], []).append(r["score"])
    return {length: list(haystacks.values()) for length, haystacks in table.items()}


def report(found: dict) -> None:
    """Mean over seeds; the interval draws (seed, haystack) clusters again."""
    print(f"{'':24}{'seeds':>6}{'8,192':>20}{'32,768':>20}")
    for name in found["runs"]:
        seeds = found["runs"][name]
        line = f"{name:24}{len(seeds):>6}"
        for length in ("8192", str(TARGET)):
            clusters = [c for one in seeds.values() for c in one["scores"][length]]
            scores = [s for c in clusters for s in c]
            low, high = resampled(clusters)
            line += f"{sum(scores) / len(scores):>8.1%} [{low:.0%},{high:.0%}]".rjust(20)
        print(line)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=SETTINGS, help="settings to run")
    p.add_argument("--report", action="store_true")
    args = p.parse_args()
    os.chdir(ROOT)
    found = json.loads(RESULT.read_text()) if RESULT.is_file() else {"runs": {}}
    if args.report:
        report(found)
        return
    found |= {"target": TARGET, "steps": STEPS, "paper_base": ntk_rope_base(1e4, 64, 8192, TARGET)}
    for seed in args.seeds:
        for name in args.only or SETTINGS:
            if str(seed) in found["runs"].setdefault(name, {}):
                continue
            found["runs"][name][str(seed)] = measure(name, seed)
            keep = ("torch", "python", "hardware", "threads")
            found |= {k: v for k, v in provenance(0).items() if k in keep}
            write_atomically(RESULT, json.dumps(found) + "\n")
    report(found)


if __name__ == "__main__":
    main()
