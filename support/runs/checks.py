"""The flags of train.py: numbers that cannot be meant, flags that do not go together, and what can
be known to fail before the model is loaded."""

import dataclasses

import torch

from support.data.sources import is_toy_model
from support.data.text import check_outside
from support.huggingface.config import LARGEST, read_config
from support.memory import kernels
from support.memory.machine import Machine
from support.memory.table import expected_s
from support.system.bad_input import BadInput
from support.system.console import check_ranges, duration, log


def check_settings(settings) -> None:
    """Raises BadInput for a number that makes no sense by itself, for lengths that do not fit
    together, and for an analysis that would see nothing."""
    counts = ("base_len", "steps", "batch_sequences", "analysis_samples", "min_count")
    check_ranges(
        settings,
        at_least_1=(*counts, "min_segment_tokens"),
        above_1=("rope_base",),
        positive=("lr", "clip", "top"),
        not_negative=("replay_steps", "replay_lr", "weight_decay", "warmup_steps"),
        within_0_1=("merge_weight", "top"),
        seed=("seed",),
    )
    if settings.rope_base > LARGEST:  # a config.json with more is refused
        raise BadInput(f"--rope_base {settings.rope_base:g} must be at most {LARGEST:g}")
    method, train_len = settings.method, settings.train_len
    target, window = settings.target_len, settings.base_len
    if target <= window:
        raise BadInput(f"--target_len {target} must exceed the window {window} (--base_len)")
    for name in ("train_len", "replay_len"):
        length = getattr(settings, name)
        if not 2 <= length <= target:
            raise BadInput(f"--{name} {length} must be between 2 and --target_len {target}")
    if method == "full" and train_len != target:
        raise BadInput(f"--method full needs --train_len {target}, the whole --target_len")
    if settings.prefix and method != "longrecipe":
        raise BadInput(f"--prefix belongs to --method longrecipe, not to {method}")
    if settings.min_segment_tokens >= train_len:  # a sample needs two segments
        least = settings.min_segment_tokens
        raise BadInput(f"--min_segment_tokens {least} must be below --train_len {train_len}")
    if settings.has_probe and method == "none" and train_len <= window:
        raise BadInput(
            "--method none never leaves the old window, so its analysis would see nothing:"
            " give the --impactful FILE of another run, or another --select"
        )
    probe, steps = settings.probe_steps, settings.steps
    if not int(settings.has_probe) <= probe <= steps:
        raise BadInput(f"--probe_steps {probe} must be between 1 and --steps {steps}")


def check_folders(settings, options) -> None:
    """Raises BadInput if what the command writes would be among the texts that it reads."""
    read = [*(settings.data or []), *(settings.replay_data or [])]
    name = "export" if options.export else "out"
    check_outside(f"--{name}", getattr(options, name), read)


def check_extended(folder: str | None, vocab_size: int) -> None:
    if folder and read_config(folder)["vocab_size"] != vocab_size:
        raise BadInput(f"--extended {folder} has another vocabulary than --model")


def check_samples(settings, stages, texts, tokenizer, impactful, sample, analysis_sample) -> None:
    """Draw a sample of each stage from its text, and the samples of the analysis, as train.py will,
    so that an error is raised now and not after hours of training."""
    for stage, text in zip(stages, texts, strict=True):
        waits = settings.analyses and stage.how["select"] == "impact"  # for the analysis
        if stage.steps and not waits:
            sample(stage, text, tokenizer, impactful, torch.Generator())
    if not settings.analyses:
        return
    n, window = settings.analysis_samples, settings.base_len
    drawn = (analysis_sample(i, stages[0], texts[0], tokenizer, settings) for i in range(n))
    counted = torch.cat([ids[1:][positions[1:] >= window] for ids, positions in drawn])
    if len(counted) == 0:
        raise BadInput(
            f"no position of the {n} samples of the analysis is past the old window {window}: give"
            " more --analysis_samples, a longer --train_len, or another --seed than"
            f" {settings.seed}"
        )
    if (most := int(counted.bincount().max())) < settings.min_count:
        raise BadInput(
            f"--min_count {settings.min_count}: the analysis sees no token type more than {most}"
            " times: give a lower --min_count, or more --analysis_samples"
        )


def log_run(there: Machine, config, settings, options, stages, corpus) -> None:
    """Log the device, what is read, the stages, how long they may take, and every setting that has
    a value."""
    if there.kind != "cpu":
        log(f"{torch.cuda.get_device_name()}; attention: {kernels.in_words()}")
    elif is_toy_model(settings.model):
        log("no CUDA device: going on with the CPU, for which the toy's numbers are made")
    else:
        log(
            "no CUDA device: going on with the CPU. The defaults are the paper's, for a GPU: "
            "smaller --steps, --replay_steps, --batch_sequences and --train_len make a shorter run"
        )
    log(f"data: {corpus.summary()}")
    batch = settings.batch_sequences
    plan = [f"{s.name} {s.steps:,} x {batch} x {s.tokens:,}" for s in stages]
    log(f"plan, steps x samples x tokens: {', '.join(plan)}")
    seconds = expected_s(config, settings, options, stages, there)
    log(f"training, from its first step on, may take {duration(seconds)} (see --plan)")
    if settings.select == "impact" and settings.probe_steps == settings.steps:
        log("warning: the probe takes all --steps: no sample is selected by the analysis")
    shown = "settings"
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if group := field.metadata["group"]:
            shown += f"\n  {group.split(' (')[0]}:"
        if value is not None:
            shown += f" {field.name}={f'{value:.6g}' if isinstance(value, float) else value}"
    log(shown)


def log_done(settings, options, device: str, seconds: float) -> None:
    """Log how long the run took, and the command that judges the result."""
    log(f"done in {seconds / 60:.1f} minutes: {options.out}")
    judge = "python eval_needle.py" + ("" if options.out == "out" else f" --model {options.out}")
    if device == "cpu" and not is_toy_model(settings.model):  # fewer texts for a CPU
        judge += f" --lengths {min(2048, settings.target_len)} --n 1"
    log(f"next: {judge}")
