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

import os
from pathlib import Path

import torch
from common import (
    RESULTS,
    ROOT,
    WINDOW,
    Study,
    Table,
    parser,
    read_lines,
    recipe_in,
    resolved,
    run,
    settings_of,
)

import train
from model import load_tokenizer
from recipe import METHODS, merge, train_length
from support.data.sources import load_toy_text
from support.data.toy import ToyCorpus, answerable
from support.runs.analysis import read_impactful
from support.system.console import report_errors

ORIGINAL = "assets/tiny"
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
    "longrecipe, paper's base": "",
    **{f"{name}, paper's base": flags for name, flags in OTHERS.items()},
    "untrained with yarn, paper's base": None,
    "yarn, paper's base": "--rope yarn {same}",
    "untrained, old base": None,
    "longrecipe, old base": "",
}


def table_of(target: int) -> Table:
    return Table(RESULTS / f"tiny_study_{target}.json", target, list(SETTINGS))


class TinyStudy(Study):
    def same_tokens(self, flags: str, steps: int) -> int:
        """Number of steps that make as many tokens as `steps` of 30 % of the target."""
        words, usual = flags.split(), train_length(self.args.target)
        length = self.args.target if "full" in words else usual
        if "--train_len" in words:
            length = int(words[words.index("--train_len") + 1])
        return max(2, round(steps * usual / length))

    def flags_of(self, name: str, seed: int) -> str | None:
        if SETTINGS[name] is None:
            return None
        target, steps = self.args.target, self.args.steps
        short = f"--target_len {target} --steps {steps}".split()
        flags = SETTINGS[name].format(
            same=f"--impactful {self.types_of(name, seed)}"
            f" --probe_steps {resolved(short)[0].probe_steps}",
            tenth=target // 1280 * 128,
            more=2 * train_length(target),
            window=WINDOW,
        )
        flags += f" --rope_base {self.theta_of(name)} --steps {self.same_tokens(flags, steps)}"
        samples = self.same_tokens(flags, 2)  # in the analysis: as many tokens
        flags += f" --analysis_samples {samples} --seed {seed}"
        flags += " --keep_stages" * (name == "longrecipe")  # for the rows that merge it otherwise
        return f"--target_len {target} {flags}"

    def make_model(self, name: str, seed: int) -> dict:
        """A row with another weight of the merge takes longrecipe's training."""
        flags = self.flags_of(name, seed)
        if "--merge_weight" not in (flags or ""):
            return super().make_model(name, seed)
        made, recipe = super().make_model("longrecipe", seed), recipe_in(settings_of(flags))
        trained = self.folder("longrecipe", seed) / "replayed"
        merge(ORIGINAL, trained, self.folder(name, seed), recipe["merge_weight"])
        del made["impactful"]
        return made | {"flags": flags, "recipe": recipe}

    def judge(self, name: str, seed: int) -> list[dict]:
        out = self.folder(name, seed)
        common = f"--model {out} --compare --n {self.args.texts} --seed {seed}"
        run(f"eval_needle.py {common} --lengths {WINDOW} --loss")
        run(f"eval_needle.py {common} --lengths {self.args.target}")
        return read_lines(out / "needle.jsonl")

    def measure(self, name: str, seed: int) -> dict:
        row = super().measure(name, seed)
        if "recipe" in row:
            merged = "--merge_weight" in row["flags"]
            row |= selected(self.folder("longrecipe" if merged else name, seed))
        return row


def selected(out: Path, samples: int = 8) -> dict:
    """What selection left of the toy's task in a run: of the questions woven into the texts that
    the first samples of the extension were made from, the share that is kept; and of those kept
    the share whose pair is kept."""
    settings, _ = resolved(["--resume", "--out", str(out)])
    _, extend, _ = train.plan_stages(settings)
    tokenizer, impactful = load_tokenizer(ORIGINAL), None
    corpus = ToyCorpus(load_toy_text(tokenizer), settings.train_len, tokenizer)
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
    p = parser(__doc__, target=32_768, seeds=[0, 1, 2])
    p.add_argument("--steps", type=int, default=40, help="optimizer steps of 30 %% of the target")
    p.add_argument(
        "--n", type=int, default=8, dest="texts", help="texts a length, each with 8 questions"
    )
    p.add_argument("--score", metavar="METHOD", help="one row with seed 0, and the board")
    p.set_defaults(model=ORIGINAL)
    with report_errors():
        args = p.parse_args(argv)
        os.chdir(ROOT)
        args.out = Path("runs/tiny_study") / str(args.target)
        if args.score:
            args.only, args.seeds = [args.score], [0]
        # "haystacks": texts, in the word of the recorded file
        about = {"target": args.target, "steps": args.steps, "haystacks": args.texts}
        study = TinyStudy(args, table_of(args.target))
        study.main(f"tokens of {args.steps} steps", **about)


if __name__ == "__main__":
    main()
