"""SmolLM2-135M from 8,192 to 16,384 tokens on a CPU: every method on the same tokens of prose.

    python examples/smollm2.py && python examples/prose.py
    nohup nice -n 10 python studies/real_study.py --out DIR >> DIR.log 2>&1 &    # many hours
    python studies/real_study.py --report    # the table of the rows that are there

Killed at any time, the same command goes on where it was: training from its last save, judging from
its last answer. Rows come in order of worth (ORDER), and each goes to
assets/results/smollm2_study.json at once; a row that is there is not made again, even if the models
in --out are gone. Start it in a checkout that nobody edits (`git worktree add DIR`), so that all
rows come from one version.

Trained on Django's documentation, for each theta and seed on the very same tokens (the impactful
types are those of longrecipe's run). Judged by 8 questions a text in essays that no training has
seen. Rate 2e-4: after so few steps at 1e-4 the merge gives back most of what was learnt (LOG.md),
and 3e-4 cost what the original could do at 8,192.
"""

import argparse
import json
import os
from pathlib import Path

from common import (
    OF_RUN,
    RESULTS,
    ROOT,
    Table,
    measured,
    read_json,
    read_lines,
    recipe_in,
    retheta,
    run,
    same_recipe,
    train_into,
    write_json,
)

from model import LlamaConfig
from recipe import ntk_rope_base
from support.system.console import log, report_errors

ORIGINAL, WINDOW, TARGET = "models/smollm2", 8192, 16384
TRAIN = (
    f"--model {ORIGINAL} --target_len {TARGET} --data data/prose --join --batch_sequences 1"
    " --steps 32 --probe_steps 4 --analysis_samples 4 --log_softmax --rebased_analysis"
    " --replay_steps 4 --lr 2e-4 --replay_lr 2e-5 --dtype bfloat16 --save_minutes 10"
)
JUDGE = f"--tasks needles_8 --haystack data/essays --lengths {WINDOW} {TARGET} --dtype bfloat16"
UNTRAINED = ("original", "untrained")
# name, training seed. Theta is the original's x 2 unless the name says that it is the paper's.
ORDER = [
    ("longrecipe", 0),
    ("none", 0),
    ("untrained", 0),
    ("longrecipe", 1),
    ("none", 1),
    ("original", 0),
    ("pose", 0),
    ("rpes", 0),
    ("untrained, paper's theta", 0),
    ("longrecipe, paper's theta", 0),
    ("none, paper's theta", 0),
    ("longrecipe, paper's theta", 1),
    ("none, paper's theta", 1),
    ("pose, paper's theta", 0),
    ("rpes, paper's theta", 0),
]
TABLE = Table(
    RESULTS / "smollm2_study.json", (WINDOW, TARGET), list(dict.fromkeys(name for name, _ in ORDER))
)


def folder(out: Path, name: str, seed: int) -> Path:
    return out / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"


def theta_of(name: str) -> float:
    config = LlamaConfig.from_dir(ORIGINAL)
    if "paper's" in name:
        return ntk_rope_base(config.rope_theta, config.head_dim, WINDOW, TARGET)
    return config.rope_theta * (1 if name == "original" else TARGET / WINDOW)


def types_of(out: Path, name: str, seed: int) -> Path:
    """impactful.json of longrecipe's run under the same theta; from its row, if the run is gone."""
    analyst = TABLE.reference(name)
    file, row = folder(out, analyst, seed) / "impactful.json", TABLE.row(analyst, seed)
    if not file.is_file() and row:
        file = folder(out, analyst, seed).with_suffix(".json")
        write_json(file, row["impactful"])
    return file


def flags_of(out: Path, name: str, seed: int) -> str:
    method = name.partition(",")[0]
    flags = f"{TRAIN} --method {method} --rope_base {theta_of(name)} --seed {seed}"
    if method != "longrecipe":
        flags += f" --impactful {types_of(out, name, seed)}"
    return flags


def make_model(out: Path, name: str, seed: int) -> dict:
    """Train the model of a row, or only give the original another theta; what that took."""
    here, about = folder(out, name, seed), {"rope_theta": theta_of(name)}
    if name.partition(",")[0] in UNTRAINED:
        retheta(ORIGINAL, here, theta_of(name), WINDOW if name == "original" else TARGET)
        return about
    if not name.startswith("longrecipe") and not types_of(out, name, seed).is_file():
        make_model(out, TABLE.reference(name), seed)
    made = train_into(here, flags_of(out, name, seed))
    about |= {"recipe": recipe_in(made["settings"]), **{k: made[k] for k in OF_RUN}}
    if name.startswith("longrecipe"):
        about["impactful"] = json.loads((here / "impactful.json").read_text())
    return about


def is_done(out: Path, name: str, seed: int, texts: int) -> bool:
    row = TABLE.row(name, seed)
    if row.get("texts") != texts:
        return False
    return "recipe" not in row or same_recipe(row["recipe"], flags_of(out, name, seed))


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path("runs/smollm2_study"), help="for the models")
    p.add_argument("--texts", type=int, default=12, help="essay texts a length, 8 questions each")
    p.add_argument("--rows", type=int, default=len(ORDER), help="only the first so many")
    p.add_argument("--report", action="store_true", help="only the table of what is there")
    with report_errors():
        args = p.parse_args(argv)
        os.chdir(ROOT)
        for name, seed in ORDER[: 0 if args.report else args.rows]:
            if is_done(args.out, name, seed, args.texts):
                continue
            row, here = make_model(args.out, name, seed), folder(args.out, name, seed)
            judged = args.out / "judged"
            run(f"eval_needle.py --model {here} --compare --out {judged} --n {args.texts} {JUDGE}")
            results = [r for r in read_lines(judged / "needle.jsonl") if r["model"] == str(here)]
            row |= measured(results) | {"texts": args.texts}
            TABLE.keep(name, seed, row, train=TRAIN, judge=JUDGE)
            TABLE.draw("SmolLM2-135M")
        if read_json(TABLE.file):
            TABLE.report()
        log(f"{sum(map(len, TABLE.read()['runs'].values()))} of {len(ORDER)} rows: {TABLE.file}")


if __name__ == "__main__":
    main()
