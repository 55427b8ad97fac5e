"""Which part of the recipe does what? The tiny model from 8,192 tokens to a longer window, often.

    python studies/tiny_study.py --seeds 0 1 2         # to 32,768; resumable: what is there stays
    python studies/tiny_study.py --report              # only the table, from the JSON in assets/
    python studies/tiny_study.py --default --methods none pose rpes    # README's first pair of
                                # commands, kept, and other methods; --target: to another window

With the same seed every run sees the same number of tokens: 30 % of the target x steps, whatever
its method and share, and (but for `no replay`) the same replay. Judged by eval_needle.py with 8
questions a haystack, and by its loss at the old window; a seed has haystacks of its own, the same
for all rows. The rows `untrained` are the tiny model under another RoPE base.
"""

import argparse
import functools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from model import load_pretrained, load_tokenizer, save_pretrained  # noqa: E402
from recipe import ntk_rope_base, train_length  # noqa: E402
from support.data.toy import ToyCorpus, answerable, load_toy_text  # noqa: E402
from support.needles.intervals import clustered, mean_of  # noqa: E402
from support.runs.flags import read_impactful  # noqa: E402
from support.system.console import log, provenance  # noqa: E402
from support.system.whole_files import write_atomically  # noqa: E402

RUNS, RESULTS = Path("runs/tiny_study"), Path("assets/results")
BASE, WINDOW, THETA = "assets/tiny", 8192, 10_000.0
# The RoPE base is theta x T* / L0 where nothing else is said. With the paper's (x 14 at four times
# the window) the tiny model finds nearly everything untrained, so nothing could be told apart.
# {same}: the probe and the impactful types of longrecipe under that base, so the very same tokens.
SETTINGS = {
    "untrained": None,
    "longrecipe": "",
    "none": "--method none {same}",
    "pose": "--method pose {same}",
    "rpes": "--method rpes {same}",
    "prefix": "--prefix {same}",
    "full": "--method full --select first",  # all of a text: nothing to select
    "select random": "--select random",
    "select digits": "--select digits",
    "select first": "--select first",
    "analysis against the old base": "--no-log_softmax --no-rebased_analysis",
    "share 10 %": "--train_len {tenth} --replay_len {window}",
    "share 60 %": "--train_len {more}",
    "no merge": "--merge_weight 1 {same}",
    "no replay": "--replay_steps 0 {same}",
    "untrained, paper's base": None,
    "longrecipe, paper's base": "--rope_base {paper}",
    "none, paper's base": "--method none {same} --rope_base {paper}",
    "pose, paper's base": "--method pose {same} --rope_base {paper}",
    "rpes, paper's base": "--method rpes {same} --rope_base {paper}",
    "untrained, old base": None,
    "longrecipe, old base": "--rope_base {old}",
}


def same_tokens(flags: str, target: int, steps: int) -> int:
    """Number of steps that make as many tokens as `steps` of 30 % of the target."""
    words, length = flags.split(), train_length(target)
    if "full" in words:
        length = target
    if "--train_len" in words:
        length = int(words[words.index("--train_len") + 1])
    return max(2, round(steps * train_length(target) / length))


def run(command: str) -> None:
    log(f"$ python {command}")
    done = subprocess.run([sys.executable, *command.split()], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-2000:]}\nerror: that command failed")


def folder(name: str, seed: int, args) -> Path:
    return RUNS / str(args.target) / f"{''.join(c if c.isalnum() else '_' for c in name)}_{seed}"


def flags_of(name: str, seed: int, args) -> str:
    """What train.py is given for a row (its RoPE base alone where nothing is trained)."""
    bases = {"paper": ntk_rope_base(THETA, 64, WINDOW, args.target), "old": THETA}
    linear = THETA * args.target / WINDOW
    if SETTINGS[name] is None:
        base = bases["paper"] if "paper" in name else bases["old"] if "old" in name else linear
        return f"--rope_base {base}"
    probe = settings_of(f"--target_len {args.target} --steps {args.steps}")["probe_steps"]
    flags = SETTINGS[name].format(
        same=f"--impactful {types_of(name, seed, args)} --probe_steps {probe}",
        tenth=args.target // 1280 * 128,
        more=2 * train_length(args.target),
        window=WINDOW,
        **bases,
    )
    flags += "" if "--rope_base" in flags else f" --rope_base {linear}"
    steps = same_tokens(flags, args.target, args.steps)
    samples = max(2, same_tokens(flags, args.target, 2))  # in the analysis: as many tokens
    return f"{flags} --steps {steps} --analysis_samples {samples} --seed {seed}"


def analyst(name: str) -> str:
    """The row whose analysis a row with {same} takes: longrecipe under the same RoPE base."""
    return "longrecipe" + "".join(name.partition(",")[1:])


def types_of(name: str, seed: int, args) -> Path:
    return folder(analyst(name), seed, args) / "impactful.json"


def settings_of(flags: str) -> dict:
    """All settings that these flags come to with train.py as it is now."""
    args = train.parse(flags.split())
    train.resolve(args)
    return vars(args)


def make_model(name: str, seed: int, args) -> dict:
    """Train (or only re-base) the model of one row; the flags and their cost."""
    out, flags = folder(name, seed, args), flags_of(name, seed, args)
    if SETTINGS[name] is None:
        model = load_pretrained(BASE)
        model.config = model.config.with_rope(float(flags.split()[1]), args.target)
        save_pretrained(model, out, tokenizer_from=BASE)
        return {"flags": flags, "seconds": 0}
    if "--impactful" in flags and not types_of(name, seed, args).is_file():
        make_model(analyst(name), seed, args)  # its analysis is wanted: the run left this machine
    made = read_record(out)
    if made and recipe_in(made["settings"]) != recipe_of(args, flags):
        shutil.rmtree(out)  # by an older version
        made = None
    run(f"train.py --target_len {args.target} {flags} --out {out} {'--resume' if made else ''}")
    made = read_record(out)
    keep = ("seconds", "peak_GiB", "commit", "hardware", "threads")
    return {"flags": flags, "recipe": recipe_in(made["settings"]), **{k: made[k] for k in keep}}


def read_record(out: Path) -> dict | None:
    file = out / "run.json"
    return json.loads(file.read_text()) if file.is_file() else None


def recipe_in(settings: dict) -> dict:
    """Of all settings those that a result depends on, wherever it was made."""
    own = ("impactful", "model", "out", "plan", "resume", "device", "save_minutes", "no_saves")
    own += ("optimizer", "keep_attention", "offload_inputs")  # the plan's, by the machine
    return {k: v for k, v in settings.items() if k not in own}


def recipe_of(args, flags: str) -> dict:
    """The same of these flags, with train.py as it is now."""
    return recipe_in(settings_of(f"--target_len {args.target} {flags}"))


def is_done(row: dict | None, name: str, seed: int, args) -> bool:
    if row is None or row.get("haystacks") != args.n:
        return False
    if "losses" not in row and (folder(name, seed, args) / "config.json").is_file():
        return False  # made by an older version; its model is still here, only the losses are new
    flags = flags_of(name, seed, args)
    return SETTINGS[name] is None or row.get("recipe") == recipe_of(args, flags)


def measure(name: str, seed: int, args) -> dict:
    out, record = folder(name, seed, args), make_model(name, seed, args)
    judge = f"eval_needle.py --model {out} --compare --n {args.n} --seed {seed} --lengths"
    run(f"{judge} {WINDOW} --ppl")
    run(f"{judge} {args.target}")
    rows = [json.loads(line) for line in (out / "needle.jsonl").read_text().splitlines()]
    if SETTINGS[name] is not None:
        record |= selected(out)
    losses = [r["score"] for r in rows if r["task"] == "loss" and r["length"] == WINDOW]
    scores = by_length([r for r in rows if r["task"] != "loss"])
    return record | {"haystacks": args.n, "scores": scores, "losses": losses}


@functools.cache
def toy_text() -> tuple:
    tokenizer = load_tokenizer(BASE)
    return tokenizer, load_toy_text(tokenizer)


def selected(out: Path, samples: int = 8) -> dict:
    """What selection left of the toy's task in a run: of the questions woven into the texts that
    the first samples of the extension were made from, the share that is kept; and of those kept
    the share whose pair is kept."""
    args = train.parse(["--resume", "--out", str(out)])
    train.resolve(args)
    _, extend, _ = train.plan_stages(args)
    tokenizer, tokens = toy_text()
    corpus = ToyCorpus(tokens, args.train_len, tokenizer)
    impactful = None
    if args.select == "impact":
        file = args.impactful or out / "impactful.json"
        impactful = read_impactful(file, tokenizer.vocab_size)
    known = asked = woven = 0
    for i in range(samples):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + args.probe_steps + i)
        ids, _ = train.sample(extend, corpus, tokenizer, args, impactful, generator)
        counts = answerable(tokenizer.decode(ids.tolist()))
        known, asked, woven = known + counts[0], asked + counts[1], woven + corpus.pairs
    return {"questions_kept": asked / woven, "their_pair_kept": known / max(1, asked)}


def by_length(rows: list[dict]) -> dict:
    """length -> one list of scores per haystack."""
    table: dict[str, dict[int, list[float]]] = {}
    for r in rows:
        table.setdefault(str(r["length"]), {}).setdefault(r["repeat"], []).append(r["score"])
    return {length: list(haystacks.values()) for length, haystacks in table.items()}


def lead(ours: dict, other: dict, length: int) -> dict:
    """By how much `ours` is above `other` (seed -> row, both) on the same haystacks: mean of the
    differences, haystack by haystack, in the seeds that both have, and its 95 % interval
    (Student's t for n haystacks); and the mean of each seed: what training owes to chance is in no
    interval."""
    by_seed = []
    for seed in sorted(ours.keys() & other.keys()):
        pairs = zip(*(row[seed]["scores"][str(length)] for row in (ours, other)), strict=True)
        by_seed.append([statistics.mean(a) - statistics.mean(b) for a, b in pairs])
    gains = [gain for one in by_seed for gain in one]
    mean, n = statistics.mean(gains), len(gains)
    half = student(n - 1) * statistics.stdev(gains) / math.sqrt(n)
    return {
        "mean": mean,
        "interval_95": (mean - half, mean + half),
        "n": n,
        "by_seed": [statistics.mean(one) for one in by_seed],
    }


def student(freedom: int) -> float:
    """97.5 % quantile of Student's t, by its expansion about the normal one (Abramowitz and Stegun
    26.7.5): to 0.1 % from 5 degrees of freedom on.

    >>> [round(student(n), 3) for n in (7, 15, 23)]
    [2.364, 2.131, 2.069]
    """
    z = statistics.NormalDist().inv_cdf(0.975)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / freedom ** (i + 1) for i, term in enumerate(terms))


def train_default(target: int, out: Path, flags: str = "") -> None:
    command, made = f"--target_len {target} {flags}", read_record(out)
    if made and recipe_in(made["settings"]) != recipe_in(settings_of(command)):
        sys.exit(f"error: {out} holds a run of other settings; move it away")
    if not (out / "config.json").is_file():
        run(f"train.py {command} --out {out} {'--resume' if made else ''}")


def default_run(target: int, methods: list[str]) -> None:
    """The two commands of README's first screen, the same with other --methods, and the loss by
    position."""
    name = f"tiny_{target // 1024}k"
    out, kept = Path("runs") / name, RESULTS / name
    others = {method: Path(f"{out}_{method}") for method in methods}
    train_default(target, out)
    probe = read_record(out)["settings"]["probe_steps"]
    for method, other in others.items():  # on the very same tokens
        same = f"--impactful {out}/impactful.json --probe_steps {probe}"
        train_default(target, other, f"--method {method} {same}")
    kept.mkdir(parents=True, exist_ok=True)
    compared = " ".join(map(str, (BASE, *others.values())))
    run(f"eval_needle.py --model {out} --compare {compared} --controls")
    for method, other in others.items():
        shutil.copyfile(other / "run.json", kept / f"run_{method}.json")
    for name in ("needle_results.json", "run.json", "metrics.jsonl", "impactful.json"):
        shutil.copyfile(out / name, kept / name)
    (kept / "selection.json").write_text(json.dumps(selected(out), indent=1) + "\n")
    lengths = f"--n 1 --n_beyond 1 --lengths 8192 {target}"
    run(f"eval_needle.py --model {out} --ppl --controls {lengths}")
    for name in ("needle.png", "curves.png"):  # of the base, the control and the result
        shutil.copyfile(out / name, kept / name)
    shutil.copyfile(out / "needle_results.json", kept / "loss_results.json")
    shutil.copyfile(out / "needle.jsonl", kept / "needle.jsonl")


def report(found: dict) -> None:
    """Mean over seeds; the interval draws whole haystacks again (results.clustered)."""
    lengths = [str(WINDOW), str(found["target"])]
    print(f"{'':24}{'seeds':>6}{'minutes':>9}" + "".join(f"{int(n):>20,}" for n in lengths))
    for name, seeds in found["runs"].items():
        minutes = sum(one["seconds"] for one in seeds.values()) / len(seeds) / 60
        line = f"{name:24}{len(seeds):>6}{minutes:>9.1f}"
        for length in lengths:
            clusters = [c for one in seeds.values() for c in one["scores"][length]]
            scores = [score for c in clusters for score in c]
            low, high = clustered(clusters)
            line += f"{sum(scores) / len(scores):.1%} [{low:.0%},{high:.0%}]".rjust(20)
        print(line)


def draw(found: dict, path: Path) -> None:
    """Share found at both lengths, a row a setting: mean of its seeds, 95 % interval, each seed."""
    from matplotlib.figure import Figure

    names = [name for name in SETTINGS if name in found["runs"]][::-1]  # the first on top
    figure = Figure(figsize=(9, 1.3 + 0.27 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axis, length in zip(panels, (WINDOW, found["target"]), strict=True):
        for y, name in enumerate(names):
            seeds = [one["scores"][str(length)] for one in found["runs"][name].values()]
            clusters = [c for one in seeds for c in one]
            mean, (low, high) = mean_of(clusters), clustered(clusters)
            colour = "tab:orange" if name == "longrecipe" else "tab:blue"
            axis.plot((100 * low, 100 * high), (y, y), color=colour)
            axis.plot(100 * mean, y, "o", color=colour)
            axis.plot([100 * mean_of(one) for one in seeds], [y] * len(seeds), "k|", markersize=7)
        axis.set(xlim=(-2, 102), xlabel=f"answers found at {length:,} tokens, %")
        axis.grid(axis="x", alpha=0.3)
    counts = {name: len(found["runs"][name]) for name in names}
    each = found["haystacks"] * 8
    labels = [f"{name} ({each * counts[name]})" for name in names]
    panels[0].set_yticks(range(len(names)), labels, fontsize=8)
    figure.suptitle(
        f"tokens of {found['steps']} steps: mean and 95 % interval; bars: each seed; (n questions)",
        fontsize=9,
    )
    figure.savefig(path, dpi=120)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--target", type=int, help="window to reach (None: 32,768, --default 131,072)")
    p.add_argument("--steps", type=int, default=40, help="optimizer steps of 30 %% of the target")
    p.add_argument("--n", type=int, default=8, help="haystacks per length")
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--only", nargs="+", choices=SETTINGS, help="settings to run")
    p.add_argument("--report", action="store_true")
    p.add_argument("--default", action="store_true", help="only train.py and eval_needle.py")
    also = "with --default: the same with these"
    p.add_argument("--methods", nargs="+", choices=("none", "pose", "rpes"), default=[], help=also)
    args = p.parse_args()
    os.chdir(ROOT)
    if args.default:
        default_run(args.target or 131_072, args.methods)
        return
    args.target = args.target or 32_768
    file = RESULTS / f"tiny_study_{args.target}.json"
    found = json.loads(file.read_text()) if file.is_file() else {"runs": {}}
    if not args.report:
        for seed in args.seeds:
            for name in args.only or SETTINGS:
                if is_done(found["runs"].get(name, {}).get(str(seed)), name, seed, args):
                    continue
                measured = measure(name, seed, args)
                if file.is_file():  # another process may have added rows meanwhile
                    found = json.loads(file.read_text())
                found["runs"].setdefault(name, {})[str(seed)] = measured
                found |= {"target": args.target, "steps": args.steps, "haystacks": args.n}
                keep = ("torch", "python", "hardware", "threads")
                found |= {k: v for k, v in provenance(0).items() if k in keep}
                write_atomically(file, json.dumps(found) + "\n")
    report(found)
    draw(found, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
