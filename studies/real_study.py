"""SmolLM2-135M from 8,192 tokens to a longer window: every method on the same tokens of prose.

    python examples/smollm2.py && python examples/prose.py
    nohup nice -n 10 python studies/real_study.py --out DIR >> DIR.log 2>&1 &    # many hours
    python studies/real_study.py --report    # the table of the rows that are there

Killed at any time, the same command goes on where it was: training from its last save, judging from
its last answer. Rows come in order of worth (NAMES, or the order of --only), and each goes to a
JSON file in assets/results at once; a row that is there is not made again, even if the models in
--out are gone. Start it in a checkout that nobody edits (`git worktree add DIR`), so that all rows
come from one version.

Trained on Django's documentation, for each theta and seed on the very same tokens (the impactful
types are those of longrecipe's run). Judged by 8 questions a text in essays that no training has
seen. Rate 2e-4: after so few steps at 1e-4 the merge gives back most of what was learnt (LOG.md),
and 3e-4 cost what the original could do at 8,192.

On a GPU (not run yet), 5 million tokens a row; the same command goes on where --minutes ended it:

    python studies/real_study.py --target 32768 --samples 512 --minutes 5 --save_minutes 2 \\
        --only longrecipe none untrained yarn "none with yarn" "untrained with yarn" \\
        pose rpes cream endprompt
    python studies/real_study.py --target 131072 --samples 128 --minutes 3 --save_minutes 1 \\
        --only longrecipe none untrained yarn "none with yarn" "untrained with yarn"
"""

from pathlib import Path

from common import RESULTS, WINDOW, Study, parser, reference, run

from recipe import METHODS
from support.system.console import report_errors

# In order of worth. Theta is the original's x target / 8,192 unless the name says that it is the
# paper's; with yarn it stays as it is. A sample of `--method full` is of other tokens.
VARIANTS = {  # of longrecipe, each with an analysis of its own
    "min_count 5": "--min_count 5",
    "segments of 32 tokens": "--min_segment_tokens 32",
}
NAMES = ["longrecipe", "none", "untrained", "original", *VARIANTS]
NAMES += [m for m in METHODS if m not in (*NAMES, "full")]
NAMES += [name + ", paper's theta" for name in NAMES if name != "original"]
NAMES += ["yarn", "none with yarn", "untrained with yarn"]  # the first: longrecipe's positions


class RealStudy(Study):
    names = NAMES

    def about(self) -> dict:
        return {"train": self.train_flags(), "judge": self.judge_flags()}

    def train_flags(self) -> str:
        """What all trained rows share. --samples make 32 to 64 steps, if there are so many."""
        args = self.args
        batch = max(1, args.samples // 64)
        steps = max(2, args.samples // batch)
        eighth = max(1, steps // 8)
        return (
            f"--model {args.model} --target_len {args.target} --data data/prose --join"
            f" --batch_sequences {batch} --steps {steps} --probe_steps {eighth}"
            f" --analysis_samples {eighth} --log_softmax --rebased_analysis --replay_steps {eighth}"
            f" --lr 2e-4 --replay_lr 2e-5 --dtype {args.dtype} --save_minutes {args.save_minutes:g}"
        )

    def judge_flags(self) -> str:
        lengths = f"--lengths {WINDOW} {self.target}"
        return f"--tasks needles_8 --haystack data/essays {lengths} --dtype {self.args.dtype}"

    def flags_of(self, name: str, seed: int) -> str | None:
        method = name.partition(",")[0].removesuffix(" with yarn")
        if method in ("original", "untrained"):
            return None
        more = VARIANTS.get(method) or f"--method {'longrecipe' if method == 'yarn' else method}"
        more += " --rope yarn" * ("yarn" in name)
        flags = f"{self.train_flags()} {more} --rope_base {self.theta_of(name)}"
        if name != reference(name) and method not in VARIANTS:
            flags += f" --impactful {self.types_of(name, seed)}"
        return f"{flags} --seed {seed}"

    def judge(self, name: str, seed: int) -> Path:
        judged = self.args.out / "judged"
        what = f"--model {self.folder(name, seed)} --compare --out {judged} --n {self.args.texts}"
        run(f"eval_needle.py {what} {self.judge_flags()}")
        return judged


def study_of(argv: list[str] | None) -> RealStudy:
    p = parser(__doc__, target=16_384, seeds=[0], texts=12)
    p.add_argument("--out", type=Path, default=Path("runs/smollm2_study"), help="for the models")
    p.add_argument("--samples", type=int, default=32, help="of 30 %% of it, in the extension")
    p.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    p.add_argument("--save_minutes", type=float, default=10, help="between saves of the training")
    args = p.parse_args(argv)
    args.model = "models/smollm2"
    more = "" if args.target == p.get_default("target") else f"_{args.target}"
    return RealStudy(args, RESULTS / f"smollm2_study{more}.json", "SmolLM2-135M")


def main(argv: list[str] | None = None) -> None:
    with report_errors():
        study_of(argv).main()


if __name__ == "__main__":
    main()
