"""SmolLM2-135M from 8,192 tokens to a longer window: every method on the same tokens of prose.

    python examples/smollm2.py && python examples/prose.py
    nohup nice -n 10 python studies/real_study.py --out DIR >> DIR.log 2>&1 &    # many hours
    python studies/real_study.py --report    # the table of the rows that are there

Killed at any time, the same command goes on where it was: training from its last save, judging from
its last answer. Rows come in order of worth (ORDER, or the order of --only), and each goes to a
JSON file in assets/results at once; a row that is there is not made again, even if the models in
--out are gone. Start it in a checkout that nobody edits (`git worktree add DIR`), so that all rows
come from one version.

Trained on Django's documentation, for each theta and seed on the very same tokens (the impactful
types are those of longrecipe's run). Judged by 8 questions a text in essays that no training has
seen. Rate 2e-4: after so few steps at 1e-4 the merge gives back most of what was learnt (LOG.md),
and 3e-4 cost what the original could do at 8,192.

On a GPU (not run yet), 5 million tokens a row; the same command goes on where --minutes ended it:

    python studies/real_study.py --target 32768 --samples 512 --minutes 5 --save_minutes 2 \\
        --only longrecipe none untrained pose rpes endprompt cream
    python studies/real_study.py --target 131072 --samples 128 --minutes 3 --save_minutes 1 \\
        --only longrecipe none untrained
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
    check_rows,
    file_name,
    make_rows,
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
from recipe import METHODS, ntk_rope_base
from support.system.bad_input import BadInput
from support.system.console import log, report_errors

WINDOW, TARGET, PAPER = 8192, 16384, ", paper's theta"
UNTRAINED = ("original", "untrained")
# name, training seed. Theta is the original's x target / 8,192 unless the name says that it is the
# paper's.
ORDER = [
    ("longrecipe", 0),
    ("none", 0),
    ("untrained", 0),
    ("longrecipe", 1),
    ("none", 1),
    ("original", 0),
    ("pose", 0),
    ("rpes", 0),
    (f"untrained{PAPER}", 0),
    (f"longrecipe{PAPER}", 0),
    (f"none{PAPER}", 0),
    (f"longrecipe{PAPER}", 1),
    (f"none{PAPER}", 1),
    (f"pose{PAPER}", 0),
    (f"rpes{PAPER}", 0),
]
NAMES = [name for name, _ in ORDER] + [m + theta for theta in ("", PAPER) for m in METHODS]
NAMES = [name for name in dict.fromkeys(NAMES) if not name.startswith("full")]  # other samples


def table_of(target: int) -> Table:
    more = "" if target == TARGET else f"_{target}"
    return Table(RESULTS / f"smollm2_study{more}.json", (WINDOW, target), NAMES)


TABLE = table_of(TARGET)


# ---- a row's flags and its model ----


def train_flags(args) -> str:
    """What all trained rows share. --samples go into 32 to 64 steps, where there are as many."""
    batch = max(1, args.samples // 64)
    steps = max(2, args.samples // batch)
    eighth = max(1, steps // 8)
    return (
        f"--model {args.model} --target_len {args.target} --data {args.data} --join"
        f" --batch_sequences {batch} --steps {steps} --probe_steps {eighth}"
        f" --analysis_samples {eighth} --log_softmax --rebased_analysis --replay_steps {eighth}"
        f" --lr 2e-4 --replay_lr 2e-5 --dtype {args.dtype} --save_minutes {args.save_minutes:g}"
    )


def judge_flags(args) -> str:
    lengths = f"--lengths {WINDOW} {args.target}"
    return f"--tasks {args.task} --haystack {args.haystack} {lengths} --dtype {args.dtype}"


def folder(name: str, seed: int, args) -> Path:
    return args.out / file_name(name, seed)


def theta_of(name: str, args) -> float:
    config = LlamaConfig.from_dir(args.model)
    if "paper's" in name:
        return ntk_rope_base(config.rope_theta, config.head_dim, WINDOW, args.target)
    return config.rope_theta * (1 if name == "original" else args.target / WINDOW)


def types_of(name: str, seed: int, args) -> Path:
    """impactful.json of longrecipe's run under the same theta; from its row, if the run is gone."""
    analyst = Table.reference(name)
    file, row = folder(analyst, seed, args) / "impactful.json", args.table.row(analyst, seed)
    if not file.is_file() and row:
        file = folder(analyst, seed, args).with_suffix(".json")
        write_json(file, row["impactful"])
    return file


def flags_of(name: str, seed: int, args) -> str:
    method = name.partition(",")[0]
    flags = f"{train_flags(args)} --method {method} --rope_base {theta_of(name, args)}"
    flags += f" --seed {seed}"
    if method != "longrecipe":
        flags += f" --impactful {types_of(name, seed, args)}"
    return flags


def make_model(name: str, seed: int, args) -> dict:
    """Train the model of a row, or only give the original another theta; what that took."""
    here, about = folder(name, seed, args), {"rope_theta": theta_of(name, args)}
    if name.partition(",")[0] in UNTRAINED:
        window = WINDOW if name == "original" else args.target
        retheta(args.model, here, theta_of(name, args), window)
        return about
    if not name.startswith("longrecipe") and not types_of(name, seed, args).is_file():
        make_model(Table.reference(name), seed, args)
    made = train_into(here, flags_of(name, seed, args))
    about |= {"recipe": recipe_in(made["settings"]), **{k: made[k] for k in OF_RUN}}
    if name.startswith("longrecipe"):
        about["impactful"] = json.loads((here / "impactful.json").read_text())
    return about


# ---- what is measured of it ----


def is_done(row: dict, name: str, seed: int, args) -> bool:
    """A version of this file kept rows without any answer; these are judged again."""
    if row.get("texts") != args.texts or str(args.target) not in row.get("scores", {}):
        return False
    return "recipe" not in row or same_recipe(row["recipe"], flags_of(name, seed, args))


def measure(name: str, seed: int, args) -> dict:
    row, here = make_model(name, seed, args), folder(name, seed, args)
    judged = args.out / "judged"
    what = f"--model {here} --compare --out {judged} --n {args.texts} {judge_flags(args)}"
    run(f"eval_needle.py {what}")
    results = [r for r in read_lines(judged / "needle.jsonl") if r["model"] == here.name]
    return row | measured(results) | {"texts": args.texts}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path("runs/smollm2_study"), help="for the models")
    p.add_argument("--target", type=int, default=TARGET, help="window to reach, tokens")
    p.add_argument("--samples", type=int, default=32, help="of 30 %% of it, in the extension")
    p.add_argument("--texts", type=int, default=12, help="essay texts a length, 8 questions each")
    p.add_argument("--only", nargs="+", metavar="ROW", help="these rows, in this order")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the rows of --only")
    p.add_argument("--minutes", type=float, help="begin no row that may end after so many")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--save_minutes", type=float, default=10, help="between saves of the training")
    p.add_argument("--model", default="models/smollm2", metavar="DIR", help="window 8,192 tokens")
    p.add_argument("--data", default="data/prose", metavar="PATH", help="to train on")
    p.add_argument("--haystack", default="data/essays", metavar="PATH", help="to be judged by")
    p.add_argument("--task", default="needles_8", help="of eval_needle.py")
    p.add_argument("--report", action="store_true", help="only the table of what is there")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    with report_errors():
        args = parse(argv)
        if args.texts < 2:
            raise BadInput(f"--texts {args.texts}: an interval needs two texts or more")
        os.chdir(ROOT)
        args.table = table_of(args.target)
        rows = [(name, seed) for seed in args.seeds for name in args.only or ()] or ORDER
        check_rows(args.only or (), NAMES)
        if not args.report:
            about = {"train": train_flags(args), "judge": judge_flags(args)}
            make_rows(args.table, rows, is_done, measure, args, "SmolLM2-135M", **about)
        if read_json(args.table.file):
            args.table.report()
        there = sum(bool(args.table.row(*row)) for row in rows)
        log(f"{there} of {len(rows)} rows: {args.table.file}")


if __name__ == "__main__":
    main()
