"""Extend the context window of a Llama on one GPU (or CPU): the whole of LongRecipe in one command.

    python train.py --target_len 131072                # the included toy model, on a laptop
    python train.py --model DIR --target_len 131072    # the paper's 104 steps of 96 samples
    python train.py --export DIR ...                   # only the samples, for another engine

The story, in order (Hu et al., ACL 2025, section 4):
    probe      a few steps of extension with randomly chosen sentences: the model is now H'
    analysis   which token types does H' expect more than the original H?  -> impactful types
    extend     samples of 30 % of the target: sentences with most of these, spread over the target
    replay     short plain samples at a low, falling learning rate: old skills come back
    merge      the average of the tuned and the original weights

The paper does not say how H' was trained. Here, H' is the model after the first extension steps,
which use randomly chosen sentences. Training continues from H', so the analysis costs only a few
forward passes. --extended DIR takes a trained H' instead.

To fit on one GPU: activation checkpointing, a loss that never holds the logits, one sequence at a
time; gradients are summed, and master weights kept, in fp32. Further options: docs/memory.md.

Does NOT do: several GPUs, LoRA, padding or packing (every sample is full).
Glossary: see model.py.
"""

import functools
import itertools
import math
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

import recipe
from model import (
    Llama,
    LlamaConfig,
    linear_cross_entropy,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from recipe import next_token_targets
from support.data.sources import load_texts
from support.data.text import Corpus
from support.huggingface.config import check_extendable
from support.huggingface.folders import check_saveable
from support.huggingface.hub import CONFIG, FILES, local_folder
from support.huggingface.tokenizer import check_fits
from support.memory.activations import set_levers
from support.memory.choose import check_resources, choose_levers
from support.memory.kernels import use_flash_package
from support.memory.machine import HERE, Machine, machine
from support.memory.optimizer import make_optimizer
from support.memory.table import make_plan, table
from support.runs import checks
from support.runs.analysis import read_impactful, write_analysis
from support.runs.export import check_exportable, write_samples
from support.runs.flags import as_kept
from support.runs.metrics import Metrics
from support.runs.run_folder import RunFolder
from support.runs.settings import RunOptions, Settings, Stage, parse_settings, plan_stages
from support.system.ahead import made_ahead
from support.system.console import log, progress, provenance, report_errors
from support.system.signals import signals_wait
from support.system.whole_files import only_writer

# ---- 1. Settings: the paper's numbers are the defaults -----------------------------------------


def parse(argv: list[str] | None) -> tuple[dict, RunOptions]:
    """The command line -> (settings, name -> value; options). Settings are given by flags, by the
    run that --resume continues, or without --model by TOY (support/runs/settings.py)."""
    choices = {"method": recipe.METHODS, "select": recipe.STRATEGIES}
    return parse_settings(__doc__, argv, choices)


def resolve(flags: dict, config: LlamaConfig, there: Machine) -> Settings:
    """The settings in `flags`, checked, and the others filled in for the model and the machine.
    Reads and writes no file. Raises BadInput for settings that make no sense."""

    def fill_in(settings: Settings, **values) -> Settings:
        return replace(settings, **{k: v for k, v in values.items() if k not in flags})

    settings = Settings(**flags)
    target_len, steps = settings.target_len, settings.steps
    # H' must have learnt something: at least five steps, or a quarter of all if that is less
    probe_steps = max(1, steps // 10, min(5, steps // 4))
    settings = fill_in(
        settings,
        base_len=config.max_position_embeddings,
        train_len=target_len if settings.method == "full" else recipe.train_length(target_len),
        probe_steps=probe_steps if settings.has_probe else 0,
        dtype="bfloat16" if there.kind == "cuda" else "float32",
    )
    settings = fill_in(settings, replay_len=min(settings.base_len, settings.train_len))
    checks.check_settings(settings)
    check_extendable(config, target_len, settings.rope, flags.get("rope_base"))
    theta = config.rope_theta
    if settings.rope == "ntk" and "rope_base" not in flags:
        theta = recipe.ntk_rope_base(theta, config.head_dim, settings.base_len, target_len)
    replay_steps = math.ceil(68e6 / (settings.replay_len * settings.batch_sequences))  # 68M tokens
    settings = fill_in(settings, rope_base=theta, replay_steps=replay_steps)
    return choose_levers(config, settings, there, flags)


# ---- 2. Samples --------------------------------------------------------------------------------


def sample(
    stage: Stage, corpus: Corpus, tokenizer, impactful: Tensor | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """One (input_ids (L,), position_ids (L,)), L = stage.tokens; in front, at position 0, the BOS
    if the tokenizer adds one.

    The text and its selection are drawn before the positions: given the same impactful types and
    probe, every --method but full sees the same tokens at the same step."""
    bos = torch.tensor([tokenizer.bos_id] if tokenizer.adds_bos else [], dtype=torch.int64)
    target_len = stage.target_len - len(bos)
    for _ in range(100):
        text = corpus.window(target_len, generator)
        try:
            ids, positions = recipe.make_example(
                text,
                tokenizer,
                stage.tokens - len(bos),
                target_len,
                impactful=impactful,
                generator=generator,
                at_spaces=corpus.at_spaces,
                **stage.how,
            )
        except recipe.TooFewSegments as error:  # a text without sentences, say a long table
            reason = error
            continue
        return torch.cat((bos, ids)), torch.cat((torch.arange(len(bos)), positions + len(bos)))
    raise reason


def draw(
    stage: Stage, step: int, corpus: Corpus, tokenizer, settings: Settings, impactful
) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of optimizer step `step` (0-based, over all stages). Each is drawn from (--seed,
    step, number in the batch) alone, so a resumed run and --export draw the same."""
    for b in range(settings.batch_sequences):
        # One generator per sample, so that a method that uses more random numbers does not change
        # the other samples.
        seed = settings.seed * 1_000_003 + step + 100_000_000 * b
        generator = torch.Generator().manual_seed(seed)
        yield sample(stage, corpus, tokenizer, impactful, generator)


# ---- 3. One optimizer step ---------------------------------------------------------------------


def accumulate(
    model: Llama, micro_batches: list[tuple[Tensor, Tensor, Tensor]], after_each=lambda: None
) -> float:
    """Add the gradients of the mean loss over all targets of the micro-batches; returns that loss,
    nats.

    Each micro-batch is (input_ids, position_ids, targets), all (B, T). The sum of losses is divided
    by the targets of the whole step, not of each micro-batch: so every target has the same weight,
    however the step is cut into micro-batches. ValueError if there is no target."""
    valid = sum(int((targets != -100).sum()) for _, _, targets in micro_batches)
    if valid == 0:
        raise ValueError("a step without a single target token")
    total = 0.0
    device = model.lm_head.weight.device
    for input_ids, position_ids, targets in micro_batches:
        loss_sum, _ = linear_cross_entropy(
            # not bound to a variable: that would keep the hidden states alive through backward()
            model.hidden(input_ids.to(device), position_ids.to(device)),
            model.lm_head.weight,
            targets.to(device),
        )
        # [E17] loss = (sum over all sequences of the sum of their losses) / (all their targets)
        loss = loss_sum / valid
        loss.backward()
        total += float(loss.detach())
        after_each()
    return total


def learning_rate(stage: Stage, step: int, warmup_steps: int, first_step: int = 0) -> float:
    """Learning rate at step `step` (0-based) of a stage that begins at step `first_step` of the
    run: warm-up, then constant; replay falls to zero. ValueError for a stage without steps."""
    if stage.steps < 1:
        raise ValueError(f"{stage.name} has no step {step}")
    # [E18] replay: lr * (1 - i / steps), i: step of the stage
    #       before: lr * min(1, (k + 1) / warm-up steps), k: step of the run
    if stage.name == "replay":
        return stage.lr * (1 - step / stage.steps)
    return stage.lr * min(1.0, (first_step + step + 1) / max(1, warmup_steps))


# ---- 4. The trainer: steps, metrics, saves -----------------------------------------------------


class Trainer:
    """Holds model, optimizer, impactful types and step counter; `run` is the output folder
    (metrics, saved state). The place in the data needs no state: see draw."""

    def __init__(self, model: Llama, tokenizer, settings: Settings, options: RunOptions, run):
        self.model, self.tokenizer = model, tokenizer
        self.settings, self.options, self.run = settings, options, run
        self.stages = plan_stages(settings)
        self.optimizer = make_optimizer(
            settings.optimizer, model, settings.lr, settings.weight_decay
        )
        self.thread = ThreadPoolExecutor(max_workers=1)  # draws samples ahead
        self.step = 0  # optimizer steps done, over all stages
        self.impactful: Tensor | None = None  # bool (V,); None: not known yet
        self.last_save = time.monotonic()
        self.metrics = Metrics(run, model, settings, self.stages)

    def load_state(self, state: dict) -> None:
        self.step, self.impactful = state["step"], state["impactful"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.metrics.resume_at(self.step)

    def save(self) -> None:
        if self.options.no_saves:
            return
        state = {"step": self.step, "impactful": self.impactful}
        self.run.save(state | {"optimizer": self.optimizer.state_dict()})
        self.last_save = time.monotonic()

    def train(self, stage: Stage, corpus: Corpus) -> None:
        """Take the steps of one stage that are still to be done. One without a finite loss and
        gradient changes no weight; a few of these in a row end the run.

        While a GPU computes one step, a thread draws the samples of the next. On a CPU that made
        the steps slower (LOG.md)."""
        settings, batch_sequences = self.settings, self.settings.batch_sequences
        first = sum(s.steps for s in self.stages[: self.stages.index(stage)])
        steps = range(max(first, self.step), first + stage.steps)
        self.metrics.bar.set_description(stage.name)
        drawn = itertools.chain.from_iterable(
            draw(stage, step, corpus, self.tokenizer, settings, self.impactful) for step in steps
        )
        on_gpu = self.model.lm_head.weight.is_cuda
        with made_ahead(self.thread, drawn, batch_sequences if on_gpu else 0) as samples:
            for step in steps:
                started = time.monotonic()
                batch = [
                    (ids[None], positions[None], next_token_targets(ids[None]))
                    for ids, positions in itertools.islice(samples, batch_sequences)
                ]
                waited = time.monotonic() - started
                after_each = functools.partial(self.metrics.bar.update, stage.tokens)
                loss = accumulate(self.model, batch, after_each)
                lr = learning_rate(stage, step - first, settings.warmup_steps, first)
                with signals_wait():  # Ctrl-C waits: weights, step and metrics move together
                    norm = self.optimizer.step(lr, settings.clip, usable=math.isfinite(loss))
                    self.step += 1
                    row = {"stage": stage.name, "step": self.step, "loss": loss, "lr": lr}
                    seconds = time.monotonic() - started
                    self.metrics.add(row | {"grad_norm": norm}, stage.tokens, seconds, waited)
                gives_up = self.run.too_many_skips()
                minutes = (time.monotonic() - self.last_save) / 60
                if gives_up or minutes > self.options.save_minutes:
                    self.save()
                if gives_up:
                    self.run.give_up(batch, self.step)


# ---- 5. Analysis: which token types gain from a longer context? --------------------------------


def analysis_sample(
    i: int, stage: Stage, corpus: Corpus, tokenizer, settings: Settings
) -> tuple[Tensor, Tensor]:
    """(input_ids (L,), position_ids (L,)), drawn from (--seed, i) alone."""
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + 500_000 + i)
    return sample(stage, corpus, tokenizer, None, generator)


def analyse(
    original: Llama, extended: Llama, stage: Stage, corpus: Corpus, tokenizer, settings: Settings
) -> tuple[Tensor, Tensor]:
    """(sum of the shifts of each token type (V,) fp64, times counted (V,) int64): measured once on
    a few samples, afterwards only looked up.

    The samples have position ids with gaps, so that train_len tokens reach up to the target, and
    only positions past the old window count. (The paper looks at plain samples of 20k tokens.)"""
    V = original.config.vocab_size
    total, count = torch.zeros(V, dtype=torch.float64), torch.zeros(V, dtype=torch.int64)
    options = {"first_position": settings.base_len, "log_softmax": settings.log_softmax}
    for i in progress(range(settings.analysis_samples), "analysis", unit="sample"):
        ids, positions = analysis_sample(i, stage, corpus, tokenizer, settings)
        _, s, c = recipe.logit_shift(original, extended, ids, positions, **options)
        total, count = total + s, count + c
    return total, count


def find_types(trainer: Trainer, corpus: Corpus) -> None:
    """Compare H', the model in training or --extended, with the original, and give the impactful
    types to the trainer."""
    settings, extended = trainer.settings, trainer.model
    weight = extended.lm_head.weight
    load = {"dtype": weight.dtype, "device": weight.device}
    original = load_pretrained(settings.model, **load)
    if settings.extended:
        extended = load_pretrained(settings.extended, **load)
    if settings.rebased_analysis:
        # Measures what training taught. With the original under its own rope_theta, the comparison
        # would mostly measure how it fails past its window.
        rope = {name: getattr(extended.config, name) for name in ("rope_theta", "rope_scaling")}
        original.config = replace(original.config, **rope)
    probe, tokenizer = trainer.stages[0], trainer.tokenizer
    shifts = analyse(original, extended, probe, corpus, tokenizer, settings)
    trainer.impactful = recipe.impactful_types(*shifts, settings.top, settings.min_count)
    write_analysis(trainer.run.path, tokenizer, *shifts, trainer.impactful)


# ---- 6. The story ------------------------------------------------------------------------------


def run_stages(trainer: Trainer, corpus: Corpus, replay_corpus: Corpus) -> None:
    """probe -> analysis -> extend -> replay -> merge, from where the run was stopped."""
    settings, options, run = trainer.settings, trainer.options, trainer.run
    probe, extend, replay = trainer.stages
    if options.resume and (state := run.load()) is not None:
        trainer.load_state(state)
        log(f"resumed at step {trainer.step}")

    trainer.train(probe, corpus)

    if settings.analyses and trainer.impactful is None:
        find_types(trainer, corpus)
        trainer.save()

    trainer.train(extend, corpus)
    if options.keep_stages and trainer.step == settings.steps:  # not resumed within the replay
        save_pretrained(trainer.model, run.path / "extended", tokenizer_from=settings.model)

    trainer.train(replay, replay_corpus)
    trainer.metrics.bar.close()
    save_pretrained(trainer.model, run.path / "replayed", tokenizer_from=settings.model)

    recipe.merge(settings.model, run.path / "replayed", run.path / "merged", settings.merge_weight)
    if not options.keep_stages:
        shutil.rmtree(run.path / "replayed")
    run.publish(run.path / "merged")


def export(config: LlamaConfig, settings: Settings, options: RunOptions) -> None:
    """Write the samples that the run would train on to the folder --export, without training."""
    check_exportable(settings, options)
    tokenizer = load_tokenizer(settings.model)
    check_fits(tokenizer, config.vocab_size)
    impactful = read_impactful(settings.impactful, tokenizer, config.vocab_size)
    texts = load_texts(settings, tokenizer)
    write_samples(settings, options.export, tokenizer, texts, impactful, learning_rate, draw)


def train(config: LlamaConfig, settings: Settings, options: RunOptions, there: Machine) -> None:
    """The whole run. Whatever can be refused is refused before the weights are loaded."""
    started, run, kept = time.time(), RunFolder(options.out), as_kept(settings, options)
    if options.attention == "flash":
        use_flash_package()
    tokenizer = load_tokenizer(settings.model)
    check_fits(tokenizer, config.vocab_size)
    run.check_settings(kept, options.resume)
    if run.finished():
        log(f"{options.out} holds this run, finished: nothing to do")
        return
    run.check_data(settings, options.resume)
    corpus, replay_corpus = load_texts(settings, tokenizer)
    impactful = read_impactful(settings.impactful, tokenizer, config.vocab_size)
    checks.check_extended(settings.extended, config.vocab_size)
    stages, texts = plan_stages(settings), (corpus, corpus, replay_corpus)
    checks.check_samples(settings, stages, texts, tokenizer, impactful, sample, analysis_sample)
    dtype = getattr(torch, settings.dtype)
    extended = config.with_rope(settings.rope_base, settings.target_len, settings.new_scaling)
    check_saveable(extended, dtype, settings.model)
    model = load_pretrained(settings.model, dtype, there.kind)

    checks.log_run(there, config, settings, options, stages, corpus)
    # the original as it is trained: under the new RoPE, and with the memory options on
    model.config = extended
    set_levers(model, settings)
    trainer = Trainer(model, tokenizer, settings, options, run)
    trainer.impactful = impactful
    with run.running(kept, trainer):
        run_stages(trainer, corpus, replay_corpus)
        run.write_settings(kept, status="done", **provenance(started))
    checks.log_done(settings, options, there.kind, time.time() - started)


def main(argv: list[str] | None = None) -> None:
    with report_errors():
        flags, options = parse(argv)
        folder = local_folder(flags["model"], CONFIG if options.plan else FILES)
        config = LlamaConfig.from_dir(folder)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        there = machine(options.plan or HERE, device, options.out)
        settings = resolve(flags | {"model": folder}, config, there)
        if options.export:
            checks.check_folders(settings, options)
            return export(config, settings, options)
        if options.plan:
            plan = make_plan(config, settings, options, plan_stages(settings), there, flags)
            print(table(plan), flush=True)
        if not RunFolder(options.out).finished():
            check_resources(config, settings, options, there)
            if not options.plan:
                checks.check_folders(settings, options)
        if not options.plan:
            with only_writer(options.out):
                train(config, settings, options, there)


if __name__ == "__main__":
    main()
