"""The flags of train.py: numbers that cannot be meant, flags that do not go together, and what can
be known to fail before the model is loaded."""

import dataclasses

import torch

from support.data.sources import is_toy_model
from support.huggingface.config import read_config
from support.memory import kernels
from support.system.bad_input import BadInput
from support.system.console import check_ranges, log, log_device


def check_numbers(settings) -> None:
    """Raises BadInput for a number that makes no sense by itself."""
    check_ranges(
        settings,
        at_least_1=(
            *("base_len", "steps", "batch_sequences", "analysis_samples", "min_count"),
            "min_segment_tokens",
        ),
        above_1=("rope_base",),
        positive=("lr", "clip", "top"),
        not_negative=("replay_steps", "replay_lr", "weight_decay", "warmup_steps"),
        within_0_1=("merge_weight", "top"),
        seed=("seed",),
    )


def check_lengths(settings) -> None:
    """Raises BadInput for lengths that do not fit together."""
    target = f"--target_len {settings.target_len}"
    if settings.target_len <= settings.base_len:
        raise BadInput(f"{target} must exceed the window {settings.base_len} (--base_len)")
    if not 2 <= settings.train_len <= settings.target_len:
        raise BadInput(f"--train_len {settings.train_len} must be between 2 and {target}")
    if settings.method == "full" and settings.train_len != settings.target_len:
        raise BadInput(
            f"--method full needs --train_len {settings.target_len}, the whole --target_len"
        )
    if settings.prefix and settings.method != "longrecipe":
        raise BadInput(f"--prefix belongs to --method longrecipe, not to {settings.method}")
    if settings.min_segment_tokens >= settings.train_len:
        raise BadInput(
            f"--min_segment_tokens {settings.min_segment_tokens} must be below --train_len"
            f" {settings.train_len}: a sample needs two segments"
        )
    if not 2 <= settings.replay_len <= settings.target_len:
        raise BadInput(f"--replay_len {settings.replay_len} must be between 2 and --target_len")


def check_analysis(settings) -> None:
    needs_probe = settings.analyses and not settings.extended
    if needs_probe and settings.method == "none" and settings.train_len <= settings.base_len:
        raise BadInput(
            "--method none never leaves the old window, so its analysis would see nothing:"
            " --impactful FILE of another run, or another --select"
        )
    if not 0 <= settings.probe_steps <= settings.steps or (
        needs_probe and settings.probe_steps == 0
    ):
        raise BadInput(
            f"--probe_steps {settings.probe_steps} must be between 1 and --steps {settings.steps}"
        )


def check_extended(folder: str | None, vocab_size: int) -> None:
    if folder and read_config(folder)["vocab_size"] != vocab_size:
        raise BadInput(f"--extended {folder} has another vocabulary than --model")


def check_samples(settings, stages, texts, tokenizer, impactful, sample, analysis_sample) -> None:
    """Draw a sample of each stage from its text, and samples of the analysis until one is usable,
    as train.py will, so that an error is raised now and not after hours of training."""
    for stage, text in zip(stages, texts, strict=True):
        waits = settings.analyses and stage.select == "impact"  # for the analysis
        if stage.steps and not waits:
            sample(stage, text, tokenizer, impactful, torch.Generator())
    if settings.analyses and not any(
        (
            analysis_sample(i, stages[0], texts[0], tokenizer, settings)[1][1:] >= settings.base_len
        ).any()
        for i in range(settings.analysis_samples)
    ):
        raise BadInput(
            f"no position of the {settings.analysis_samples} samples of the analysis is past the"
            f" old window {settings.base_len}: more --analysis_samples, a longer --train_len, or"
            f" another --seed than {settings.seed}"
        )


def log_run(device: str, settings, stages, corpus) -> None:
    """Log the device, what is read, the stages, and every setting that has a value."""
    log_device(device, kernels.in_words(), is_toy_model(settings.model))
    log(f"data: {corpus.summary()}")
    batch = settings.batch_sequences
    plan = [f"{s.name} {s.steps:,} x {batch} x {s.tokens:,}" for s in stages]
    log(f"plan, steps x samples x tokens: {', '.join(plan)}")
    if settings.select == "impact" and settings.probe_steps == settings.steps:
        log("warning: the probe takes all --steps: no sample is selected by the analysis")
    line = ""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if group := field.metadata["group"]:
            line += f"\n  {group.split(' (')[0]}:"
        if value is not None:
            line += f" {field.name} {f'{value:.6g}' if isinstance(value, float) else value}"
    log(f"settings{line}")


def log_done(settings, options, device: str, seconds: float) -> None:
    """Log how long the run took, and the command that judges the result."""
    log(f"done in {seconds / 60:.1f} minutes: {options.out}")
    judge = "python eval_needle.py" + ("" if options.out == "out" else f" --model {options.out}")
    if device == "cpu" and not is_toy_model(settings.model):  # fewer texts for a CPU
        judge += f" --lengths {min(2048, settings.target_len)} --n 1"
    log(f"next: {judge}")
