"""The flags of train.py: numbers that cannot be meant, flags that do not go together, and what can
be known to fail before the model is loaded."""

import torch

from support.huggingface.config import read_config
from support.system.bad_input import BadInput
from support.system.console import check_ranges, log


def check_given(args) -> None:
    """What can be said before defaults are filled in: flags not given (None) pass."""
    check_ranges(
        args,
        at_least_1=("base_len", "steps", "batch_sequences", "analysis_samples", "min_count"),
        above_1=("rope_base",),
        positive=("lr", "clip", "top"),
        not_negative=("replay_steps", "replay_lr", "weight_decay", "warmup_steps", "save_minutes"),
        within_0_1=("merge_weight", "top"),
        seed=("seed",),
    )


def check_lengths(args) -> None:
    """With every length filled in: do they go together?"""
    target = f"--target_len {args.target_len}"
    if args.target_len <= args.base_len:
        raise BadInput(f"{target} must exceed the window {args.base_len} (--base_len)")
    if not 2 <= args.train_len <= args.target_len:
        raise BadInput(f"--train_len {args.train_len} must be between 2 and {target}")
    if args.method == "full" and args.train_len != args.target_len:
        raise BadInput(f"--method full needs --train_len {args.target_len}, the whole --target_len")
    if args.prefix and args.method != "longrecipe":
        raise BadInput(f"--prefix belongs to --method longrecipe, not to {args.method}")
    if not 2 <= args.replay_len <= args.target_len:
        raise BadInput(f"--replay_len {args.replay_len} must be between 2 and --target_len")


def check_probe(args, needs_probe: bool) -> None:
    if needs_probe and args.method == "none" and args.train_len <= args.base_len:
        raise BadInput(
            "--method none never leaves the old window, so it has no impactful types of its own:"
            " --impactful FILE of another run, or --select random"
        )
    if not 0 <= args.probe_steps <= args.steps or (needs_probe and args.probe_steps == 0):
        raise BadInput(
            f"--probe_steps {args.probe_steps} must be between 1 and --steps {args.steps}"
        )


def check_extended(folder: str | None, vocab_size: int) -> None:
    if folder and read_config(folder)["vocab_size"] != vocab_size:
        raise BadInput(f"--extended {folder} has another vocabulary than --model")


def check_samples(args, stages, texts, tokenizer, impactful, sample, analysis_sample) -> None:
    """Draw a sample of each stage from its text, and those of the analysis until one serves, as
    train.py will: what is wrong with them is said now, not after hours of training."""
    analysed = args.select == "impact" and impactful is None
    for stage, text in zip(stages, texts, strict=True):
        if stage.steps and not (analysed and stage.select == "impact"):  # that waits for the types
            sample(stage, text, tokenizer, args, impactful, torch.Generator())
    if analysed and not any(
        (analysis_sample(i, stages[0], texts[0], tokenizer, args)[1][1:] >= args.base_len).any()
        for i in range(args.analysis_samples)
    ):
        raise BadInput(
            f"no position of the {args.analysis_samples} samples of the analysis is past the old"
            f" window {args.base_len}: more --analysis_samples, a longer --train_len, or another"
            f" --seed than {args.seed}"
        )


def log_settings(corpus, stages, settings: dict) -> None:
    log(f"data: {corpus.summary()}")
    batch = settings["batch_sequences"]
    plan = [f"{s.name} {s.steps:,} x {batch} x {s.tokens:,}" for s in stages]
    log(f"plan, steps x samples x tokens: {', '.join(plan)}")
    if settings["select"] == "impact" and not any(s.steps for s in stages if s.name == "extend"):
        log("warning: the probe takes all --steps: no sample is selected by the analysis")
    log("settings: " + " ".join(f"{k}={v}" for k, v in settings.items() if v is not None))
