"""SmolLM2-135M from 8,192 to 16,384 tokens on a CPU: every method on the same prose tokens.

    python examples/smollm2.py && python examples/prose.py
    nohup nice -n 10 python studies/real_study.py --out DIR >> DIR.log 2>&1 &    # many hours
    python studies/real_study.py --out DIR --report    # the table of what is there by now

Stopped at any time (kill PID), the same command goes on where it was: training from its last save,
judging from the last answer. Run it in a checkout that nobody edits (`git worktree add DIR`), so
that all rows come from one commit. Each row goes to assets/results/smollm2_study.json as soon as
it is there, in order of worth; models and answers stay in --out.

What is trained on: the documentation of Django, the same tokens for every row of a theta and seed
(the probe's random sentences, then the analysis of longrecipe's run). Judged by 8 questions a text
in essays that no training has seen. 2e-4: at 1e-4 the merge gives back what so few steps learn
(LOG.md), and 3e-4 broke what the original could do at 8,192.
"""

import argparse
import os
from pathlib import Path

from common import (
    RESULTS,
    ROOT,
    by_text,
    read_json,
    read_lines,
    rebase,
    train_into,
    write_json,
)
from common import run as run_command

from model import LlamaConfig
from recipe import ntk_rope_base
from support.system.console import log, provenance, report_errors

ORIGINAL, PROSE, ESSAYS = "models/smollm2", "data/prose", "data/essays"
WINDOW, TARGET = 8192, 16384
TRAIN = (
    f"--model {ORIGINAL} --target_len {TARGET} --data {PROSE} --join --batch_sequences 1"
    " --steps 32 --probe_steps 4 --analysis_samples 4 --log_softmax --rebased_analysis"
    " --replay_steps 4 --lr 2e-4 --replay_lr 2e-5 --dtype bfloat16 --save_minutes 10"
)
JUDGE = f"--tasks needles_8 --haystack {ESSAYS} --lengths {WINDOW} {TARGET} --dtype bfloat16"
# (method, theta, seed of the training): the rows in order of worth
ORDER = [
    ("longrecipe", "x 2", 0),
    ("none", "x 2", 0),
    ("untrained", "x 2", 0),
    ("longrecipe", "x 2", 1),
    ("none", "x 2", 1),
    ("original", "x 1", 0),
    ("pose", "x 2", 0),
    ("rpes", "x 2", 0),
    ("untrained", "paper's", 0),
    ("longrecipe", "paper's", 0),
    ("none", "paper's", 0),
    ("longrecipe", "paper's", 1),
    ("none", "paper's", 1),
    ("pose", "paper's", 0),
    ("rpes", "paper's", 0),
]


def theta_of(name: str) -> float:
    config = LlamaConfig.from_dir(ORIGINAL)
    if name == "paper's":
        return ntk_rope_base(config.rope_theta, config.head_dim, WINDOW, TARGET)
    return config.rope_theta * float(name.removeprefix("x "))


def folder(out: Path, method: str, theta: str, seed: int) -> Path:
    return out / f"{method}_{theta.replace(' ', '').replace(chr(39), '')}_{seed}"


def make_model(out: Path, method: str, theta: str, seed: int) -> dict:
    """Train the model of a row, or only change the original's theta; what that took."""
    here, value = folder(out, method, theta, seed), theta_of(theta)
    if method in ("original", "untrained"):
        rebase(ORIGINAL, here, value, WINDOW if method == "original" else TARGET)
        return {"rope_theta": value}
    flags = f"{TRAIN} --method {method} --rope_base {value} --seed {seed}"
    if method != "longrecipe":
        make_model(out, "longrecipe", theta, seed)
        flags += f" --impactful {folder(out, 'longrecipe', theta, seed)}/impactful.json"
    made = train_into(here, flags)
    keep = ("seconds", "peak_GiB", "commit", "hardware", "threads")
    return {"rope_theta": value} | {k: made[k] for k in keep}


def judge(out: Path, method: str, theta: str, seed: int, texts: int) -> dict:
    """Answers of a row in the first `texts` essay texts: found, and nats, a list a text."""
    here = folder(out, method, theta, seed)
    run_command(f"eval_needle.py --model {here} --compare --out {out}/judged --n {texts} {JUDGE}")
    results = [r for r in read_lines(out / "judged" / "needle.jsonl") if r["model"] == str(here)]
    fields = {"scores": "score", "nats": "answer_logprob"}
    return {
        name: {str(length): by_text(results, length, field) for length in (WINDOW, TARGET)}
        for name, field in fields.items()
    }


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, required=True, help="folder for models and answers")
    p.add_argument("--texts", type=int, default=12, help="essay texts a length, 8 questions each")
    p.add_argument("--only_train", action="store_true", help="judge later")
    p.add_argument("--report", action="store_true", help="only the table of what is there")
    with report_errors():
        args = p.parse_args(argv)
        os.chdir(ROOT)
        file = RESULTS / "smollm2_study.json"
        found = read_json(file) or {"train": TRAIN, "judge": JUDGE, "rows": {}}
        for row in [] if args.report else ORDER:
            record = make_model(args.out, *row)
            if args.only_train:
                continue
            record |= judge(args.out, *row, args.texts)
            found["rows"]["{}, theta {}, seed {}".format(*row)] = record
            keep = ("torch", "python", "hardware", "commit")
            found |= {k: v for k, v in provenance(0).items() if k in keep}
            write_json(file, found, indent=1)
        log(f"{len(found['rows'])} of {len(ORDER)} rows: {file}")


if __name__ == "__main__":
    main()
