"""Which part of the recipe does what? The tiny model is extended again and again, with changes.

    python studies/tiny_study.py                   # to 32,768; resumable: rows that are there stay
    python studies/tiny_study.py --report          # only the table, from the JSON in assets/
    python studies/tiny_study.py --score METHOD    # a method of your own: its row, and the board

With the same seed every run sees the same number of tokens: 30 % of the target x steps, whatever
its method and share, and (but for `no replay`) the same replay. Judged by eval_needle.py with 8
questions a text, and by its loss at the old window; a seed has texts of its own, the same for all
rows. The rows `untrained` are the tiny model under another rope_theta ("base" in their names: the
file that holds them is older than our words).

--score: give your method a name in METHODS of recipe.py and its lines in sample_position_ids (or
`git apply` a patch that does, as examples/exercises/own_method.patch). Trained on the very tokens
of longrecipe with seed 0: two runs of train.py and an evaluation, minutes on two cores.
"""

import argparse
import functools
import os
from pathlib import Path

import torch
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
    resolved,
    retheta,
    run,
    same_recipe,
    settings_of,
    train_into,
)

import train
from model import load_tokenizer
from recipe import METHODS, merge, ntk_rope_base, train_length
from support.data.sources import load_toy_text
from support.data.toy import ToyCorpus, answerable
from support.huggingface.config import yarn_scaling
from support.runs.analysis import read_impactful
from support.system.console import report_errors

RUNS = Path("runs/tiny_study")
ORIGINAL, WINDOW, THETA = "assets/tiny", 8192, 10_000.0
OTHERS = {m: f"--method {m} {{same}}" for m in METHODS if m not in ("longrecipe", "full")}
# Theta is the original's x T* / L0 where nothing else is said. With the paper's (x 14 at four times
# the window) the tiny model finds nearly everything untrained, so nothing could be told apart.
# With yarn it stays that of the original, and the pairs that turn rarely slow down.
# {same}: the probe and the impactful types of longrecipe under that theta, so the very same tokens.
SETTINGS = {
    "untrained": None,
    "longrecipe": "",
    **OTHERS,
    "prefix": "--prefix {same}",
    "full": "--method full --select first",  # all of a text: nothing to select
    "select random": "--select random",
    # its own probe and analysis come out as longrecipe's: the same steps and seeds
    "select digits": "--select digits",
    "select first": "--select first",
    "min_count 5": "--min_count 5",
    "segments of 32 tokens": "--min_segment_tokens 32",
    "analysis against the old base": "--no-log_softmax --no-rebased_analysis",
    "share 10 %": "--train_len {tenth} --replay_len {window}",
    "share 60 %": "--train_len {more}",
    "merge weight 0.25": "--merge_weight 0.25 {same}",  # longrecipe: 0.5; no merge: 1
    "merge weight 0.75": "--merge_weight 0.75 {same}",
    "no merge": "--merge_weight 1 {same}",
    "no replay": "--replay_steps 0 {same}",
    "untrained with yarn": None,
    "yarn": "--rope yarn {same}",
    "untrained, paper's base": None,
    "longrecipe, paper's base": "--rope_base {paper}",
    **{
        f"{name}, paper's base": f"--method {name} {{same}} --rope_base {{paper}}"
        for name in OTHERS
    },
    "untrained with yarn, paper's base": None,
    "yarn, paper's base": "--rope yarn {same} --rope_base {paper}",
    "untrained, old base": None,
    "longrecipe, old base": "--rope_base {old}",
}


def table_of(target: int) -> Table:
    return Table(RESULTS / f"tiny_study_{target}.json", (WINDOW, target), list(SETTINGS))


# ---- a row's flags and its model ----


def same_tokens(flags: str, target: int, steps: int) -> int:
    """Number of steps that make as many tokens as `steps` of 30 % of the target."""
    words, length = flags.split(), train_length(target)
    if "full" in words:
        length = target
    if "--train_len" in words:
        length = int(words[words.index("--train_len") + 1])
    return max(2, round(steps * train_length(target) / length))


def folder(name: str, seed: int, args) -> Path:
    return RUNS / str(args.target) / file_name(name, seed)


def theta_of(name: str, target: int) -> float:
    """The theta of a row whose flags do not name it."""
    if "paper" in name:
        return ntk_rope_base(THETA, 64, WINDOW, target)
    stays = "yarn" in name or "old base" in name.partition(",")[2]
    return THETA if stays else THETA * target / WINDOW


def flags_of(name: str, seed: int, args) -> str:
    """All flags that train.py is given for a row, but for --out and --resume."""
    short = f"--target_len {args.target} --steps {args.steps}"
    flags = SETTINGS[name].format(
        same=f"--impactful {types_of(name, seed, args)}"
        f" --probe_steps {settings_of(short)['probe_steps']}",
        tenth=args.target // 1280 * 128,
        more=2 * train_length(args.target),
        window=WINDOW,
        paper=theta_of("paper's base", args.target),
        old=THETA,
    )
    flags += "" if "--rope_base" in flags else f" --rope_base {theta_of(name, args.target)}"
    steps = same_tokens(flags, args.target, args.steps)
    samples = max(2, same_tokens(flags, args.target, 2))  # in the analysis: as many tokens
    more = f"--steps {steps} --analysis_samples {samples} --seed {seed}"
    more += " --keep_stages" * (name == "longrecipe")  # for the rows that merge it otherwise
    return f"--target_len {args.target} {flags} {more}"


def types_of(name: str, seed: int, args) -> Path:
    """The analysis that a row with {same} takes."""
    return folder(Table.reference(name), seed, args) / "impactful.json"


def make_model(name: str, seed: int, args) -> dict:
    """Train the model of one row (or only change its theta); the flags and what that took."""
    out = folder(name, seed, args)
    if SETTINGS[name] is None:
        theta, yarn = theta_of(name, args.target), "yarn" in name
        scaling = yarn_scaling(WINDOW, args.target) if yarn else None
        retheta(ORIGINAL, out, theta, args.target, scaling)
        return {"flags": f"--rope_base {theta}{' --rope yarn' * yarn}", "seconds": 0}
    flags = flags_of(name, seed, args)
    if "--impactful" in flags and not types_of(name, seed, args).is_file():
        make_model(Table.reference(name), seed, args)  # the run left this machine
    if "--merge_weight" in flags:  # longrecipe's training: only the last stage is another
        trained, recipe = folder("longrecipe", seed, args), recipe_in(settings_of(flags))
        if not (trained / "replayed").is_dir():
            make_model("longrecipe", seed, args)
        merge(ORIGINAL, trained / "replayed", out, recipe["merge_weight"])
        made = read_json(trained / "run.json")
    else:
        made = train_into(out, flags)
        recipe = recipe_in(made["settings"])
    return {"flags": flags, "recipe": recipe, **{k: made[k] for k in OF_RUN}}


# ---- what is measured of it ----


def is_done(row: dict, name: str, seed: int, args) -> bool:
    """Rows of an older version, without nats, are complete; they get them when made again."""
    if row.get("haystacks") != args.n or (args.again and "nats" not in row):
        return False
    return SETTINGS[name] is None or same_recipe(row["recipe"], flags_of(name, seed, args))


def measure(name: str, seed: int, args) -> dict:
    out, record = folder(name, seed, args), make_model(name, seed, args)
    judge = f"eval_needle.py --model {out} --compare --n {args.n} --seed {seed} --lengths"
    run(f"{judge} {WINDOW} --loss")
    run(f"{judge} {args.target}")
    results = read_lines(out / "needle.jsonl")
    if SETTINGS[name] is not None:
        merged = "merge_weight" in record["flags"]
        record |= selected(folder("longrecipe", seed, args) if merged else out)
    losses = [r["score"] for r in results if r["task"] == "loss" and r["length"] == WINDOW]
    return record | {"haystacks": args.n, **measured(results), "losses": losses}


@functools.cache
def toy_text() -> tuple:
    tokenizer = load_tokenizer(ORIGINAL)
    return tokenizer, load_toy_text(tokenizer)


def selected(out: Path, samples: int = 8) -> dict:
    """What selection left of the toy's task in a run: of the questions woven into the texts that
    the first samples of the extension were made from, the share that is kept; and of those kept
    the share whose pair is kept."""
    settings, _ = resolved(["--resume", "--out", str(out)])
    _, extend, _ = train.plan_stages(settings)
    tokenizer, tokens = toy_text()
    corpus = ToyCorpus(tokens, settings.train_len, tokenizer)
    impactful = None
    if settings.select == "impact":
        file = settings.impactful or out / "impactful.json"
        impactful = read_impactful(file, tokenizer.vocab_size)
    known = asked = woven = 0
    for i in range(samples):
        seed = settings.seed * 1_000_003 + settings.probe_steps + i
        generator = torch.Generator().manual_seed(seed)
        ids, _ = train.sample(extend, corpus, tokenizer, impactful, generator)
        counts = answerable(tokenizer.decode(ids.tolist()))
        known, asked, woven = known + counts[0], asked + counts[1], woven + corpus.pairs
    return {"questions_kept": asked / woven, "their_pair_kept": known / max(1, asked)}


def main(argv=None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--target", type=int, default=32_768, help="window to reach, tokens")
    p.add_argument("--steps", type=int, default=40, help="optimizer steps of 30 %% of the target")
    p.add_argument("--n", type=int, default=8, help="texts a length, 8 questions each")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", metavar="ROW", help="rows to run")
    p.add_argument("--again", action="store_true", help="also rows that have no nats yet")
    p.add_argument("--report", action="store_true", help="run nothing")
    p.add_argument("--score", metavar="METHOD", help="one row with seed 0, and the board")
    with report_errors():
        args = p.parse_args(argv)
        os.chdir(ROOT)
        names, seeds = args.only or list(SETTINGS), args.seeds
        if args.score:
            names, seeds = [args.score], [0]
        check_rows(names, SETTINGS)
        table, title = table_of(args.target), f"tokens of {args.steps} steps"
        rows = [(name, seed) for seed in seeds for name in names]
        if not args.report:
            about = {"target": args.target, "steps": args.steps, "haystacks": args.n}
            make_rows(table, rows, is_done, measure, args, title, **about)
        table.report(table.best_first(table.read()["runs"]) if args.score else None)
        table.draw(title)


if __name__ == "__main__":
    main()
