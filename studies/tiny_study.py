"""Which part of the recipe does what? The tiny model is extended again and again, with changes.

    python studies/tiny_study.py                   # to 32,768; resumable: rows that are there stay
    python studies/tiny_study.py --report          # only the table, from the JSON in assets/
    python studies/tiny_study.py --score METHOD    # a method of your own: its row, and the board

With the same seed every run sees the same number of tokens: 30 % of the target x steps, whatever
its method and share, and (but for `no replay`) the same replay. Judged by eval_needle.py with 8
questions a text, and by its loss at the old window; a seed has texts of its own, the same for all
rows. The rows `untrained` are the tiny model under another rope_theta ("base" in their names: the
file that holds them is older than our words).

--score: write your method as a function in recipe.py, with a row in its METHODS (or `git apply` a
patch that does, such as examples/exercises/own_method.patch). It is trained on the very tokens of
longrecipe with seed 0: two runs of train.py and an evaluation, minutes on two cores.
"""

from pathlib import Path

from common import RESULTS, WINDOW, Study, parser, recipe_of, resolved, run

import train
from model import load_tokenizer
from recipe import METHODS, merge, train_length
from support.data.sources import load_texts
from support.data.toy import answerable
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
    **{f"{name} with yarn": f"{flags} --rope yarn" for name, flags in OTHERS.items()},
    "untrained, paper's base": None,
    "longrecipe, paper's base": "",
    **{f"{name}, paper's base": flags for name, flags in OTHERS.items()},
    "untrained with yarn, paper's base": None,
    "yarn, paper's base": "--rope yarn {same}",
    "untrained, old base": None,
    "longrecipe, old base": "",
}


class TinyStudy(Study):
    names = list(SETTINGS)

    def about(self) -> dict:
        # "haystacks": texts, in the word of the recorded file
        return {"target": self.target, "steps": self.args.steps, "haystacks": self.args.texts}

    def flags_of(self, name: str, seed: int) -> str | None:
        if SETTINGS[name] is None:
            return None
        usual, steps = train_length(self.target), self.args.steps
        fixed = f"--target_len {self.target} --rope_base {self.theta_of(name)} --seed {seed}"
        probe_steps = resolved(f"{fixed} --steps {steps}").probe_steps
        flags = SETTINGS[name].format(
            same=f"--impactful {self.types_of(name, seed)} --probe_steps {probe_steps}",
            tenth=self.target // 1280 * 128,
            more=2 * usual,
            window=WINDOW,
        )
        share = usual / resolved(f"{fixed} {flags}").train_len
        # as many tokens as usual: of the extension, and of the analysis' two samples
        steps, samples = (max(2, round(n * share)) for n in (steps, 2))
        flags = f"{fixed} {flags} --steps {steps} --analysis_samples {samples}"
        return flags + " --keep_stages" * (name == "longrecipe")  # for rows that merge it otherwise

    def make_model(self, name: str, seed: int) -> dict:
        """A row with another weight of the merge takes longrecipe's training."""
        flags = self.flags_of(name, seed) or ""
        merged = "--merge_weight" in flags
        made = super().make_model("longrecipe" if merged else name, seed)
        if merged:
            made["recipe"], made["flags"] = recipe_of(flags), flags
            trained = self.folder("longrecipe", seed) / "replayed"
            merge(ORIGINAL, trained, self.folder(name, seed), made["recipe"]["merge_weight"])
            del made["impactful"]
        if flags:
            made |= selected(self.folder("longrecipe" if merged else name, seed))
        return made

    def judge(self, name: str, seed: int) -> Path:
        out = self.folder(name, seed)
        common = f"--model {out} --compare --n {self.args.texts} --seed {seed}"
        run(f"eval_needle.py {common} --lengths {WINDOW} --loss")
        run(f"eval_needle.py {common} --lengths {self.target}")
        return out


def selected(out: Path, samples: int = 8) -> dict:
    """What selection left of the toy's task in a run: of the questions woven into the texts that
    the first samples of the extension were made from, the share that is kept; and of those kept
    the share whose pair is kept."""
    settings = resolved(f"--resume --out {out}")
    _, extend, _ = train.plan_stages(settings)
    tokenizer, impactful = load_tokenizer(ORIGINAL), None
    corpus, _ = load_texts(settings, tokenizer)
    if settings.select == "impact":
        file = settings.impactful or out / "impactful.json"
        impactful = read_impactful(file, tokenizer, tokenizer.vocab_size)
    known = asked = 0
    for step in range(settings.probe_steps, settings.probe_steps + samples):
        ids, _ = next(train.draw(extend, step, corpus, tokenizer, settings, impactful))
        counts = answerable(tokenizer.decode(ids.tolist()))
        known, asked = known + counts[0], asked + counts[1]
    return {
        "questions_kept": asked / (samples * corpus.pairs),
        "their_pair_kept": known / max(1, asked),
    }


def study_of(argv: list[str] | None) -> TinyStudy:
    p = parser(__doc__, target=32_768, seeds=[0, 1, 2], texts=8)
    p.add_argument("--steps", type=int, default=40, help="optimizer steps of 30 %% of the target")
    p.add_argument("--score", metavar="METHOD", help="one row with seed 0, and the board")
    args = p.parse_args(argv)
    args.model, args.out = ORIGINAL, Path("runs/tiny_study") / str(args.target)
    if args.score:
        args.only, args.seeds = [args.score], [0]
    file = RESULTS / f"tiny_study_{args.target}.json"
    return TinyStudy(args, file, f"tokens of {args.steps} steps")


def main(argv: list[str] | None = None) -> None:
    with report_errors():
        study_of(argv).main()


if __name__ == "__main__":
    main()
