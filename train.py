"""Extend the context window of a Llama on one GPU (or CPU): the whole of LongRecipe in one command.

    python train.py --target_len 131072                # the embedded tiny model, on a laptop
    python train.py --model DIR --target_len 131072    # the paper's 104 steps of 96 samples
    python train.py --export DIR ...                   # only the samples, for an engine of your own

The story, in order (Hu et al., ACL 2025, section 4):
    probe      a few steps of extension with randomly selected sentences: the model is now H'
    analysis   which token types does H' expect more than the base model H?  -> impactful types
    extend     samples of 30 % of the target: sentences with most of these, spread over the target
    replay     short plain samples at a low, falling learning rate: old skills come back
    merge      the average of the tuned and the original weights

Where H' comes from: the paper does not say how its H' was trained. Here the first steps of the
extension serve: they select at random, the analysis then compares them with the base, and
training goes on from them, so that the analysis costs a few forward passes and nothing else.
--extended DIR takes an H' of yours instead.

Memory: activation checkpointing (a layer's activations are computed again in the backward pass),
a loss that never holds the logits, one sequence at a time, gradients summed over the batch in
fp32, fp32 master weights beside bf16 ones. Where that does not fit, the plan moves optimizer state
and layer inputs to the host, or says before it begins that nothing helps; --plan shows its sums.

Does NOT do: several GPUs, LoRA, padding or packing (every sample is full).
Glossary: see model.py.
"""

import argparse
import dataclasses
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

import recipe
from model import (
    CUDA_BACKENDS,
    Llama,
    LlamaConfig,
    linear_cross_entropy,
    load_pretrained,
    load_tokenizer,
    save_pretrained,
)
from recipe import next_token_targets
from support.data.sources import contents, load_corpora
from support.data.text import Corpus
from support.data.toy import TINY
from support.huggingface.config import check_extendable
from support.huggingface.hub import CONFIG, FILES, local_folder
from support.huggingface.tokenizer import check_fits
from support.memory import count as budget
from support.memory.activations import LayerInputsOnHost
from support.memory.machine import HERE
from support.memory.optimizer import NAMES as OPTIMIZERS
from support.memory.optimizer import make_optimizer
from support.memory.table import settle
from support.runs import checks
from support.runs.export import check_exportable, sample_settings, write_samples
from support.runs.flags import NO_SETTINGS, Parser, parse_or_resume, read_impactful
from support.runs.run_folder import RunFolder
from support.system.bad_input import BadInput
from support.system.console import log, log_device, peak_gib, progress, provenance, report_errors
from support.system.signals import unbroken

# ---- 1. The command line: the paper's numbers are the defaults ---------------------------------

# For the toy (no --model): numbers that fit two CPU cores. What is not named is the paper's.
TOY = {
    "model": TINY,
    "steps": 20,
    "batch_sequences": 1,
    "lr": 2e-3,
    "warmup_steps": 2,
    "analysis_samples": 4,
    "log_softmax": True,
    "rebased_analysis": True,
    "replay_steps": 8,
    "replay_lr": 2e-4,
    "save_minutes": 2,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = Parser("train.py", __doc__)
    switch = {"action": argparse.BooleanOptionalAction, "default": None}
    off = switch | {"default": False}
    add = p.add_argument_group("model").add_argument
    add("--model", metavar="DIR", help="folder or hub org/name (None: the toy, assets/tiny)")
    add("--target_len", type=int, default=131_072, help="window to reach, tokens")
    add("--base_len", type=int, help="window of the checkpoint, tokens (None: its config's)")
    add("--rope_base", type=float, help="new RoPE base (None: NTK formula of the paper)")
    add = p.add_argument_group("recipe").add_argument
    add("--method", choices=recipe.METHODS, default="longrecipe", help="position ids of a sample")
    add("--select", choices=recipe.STRATEGIES, default="impact", help="which segments stay")
    add("--prefix", action="store_true", help="contiguous prefix, as the released code has")
    add("--train_len", type=int, help="sample, tokens (None: 30 %% of target_len, up to x 128)")
    add("--probe_steps", type=int, help="random steps first (None: 1/10; 5, if 1/4 allows)")
    add("--extended", metavar="DIR", help="a trained H' to analyse, instead of the probe's")
    add("--impactful", metavar="FILE", help="of a run: no analysis, and no probe by default")
    add("--analysis_samples", type=int, default=8, help="samples the analysis looks at")
    add("--log_softmax", **off, help="analyse log-probabilities, not raw logits")
    add("--rebased_analysis", **off, help="against the base under the new RoPE base, not its own")
    add("--top", type=float, default=0.2, help="share of occurrences that count as impactful")
    add("--min_count", type=int, default=1, help="types seen less often are not impactful")
    add("--merge_weight", type=float, default=0.5, help="share of the tuned model in the result")
    add = p.add_argument_group("training").add_argument
    add("--steps", type=int, default=104, help="optimizer steps of extension, probe included")
    add("--replay_steps", type=int, help="(None: as many as make 68M tokens, the paper's)")
    add("--replay_len", type=int, help="replay sample, tokens (None: at most the old window)")
    add("--batch_sequences", type=int, default=96, help="samples per optimizer step")
    add("--lr", type=float, default=5e-5, help="learning rate of the extension")
    add("--replay_lr", type=float, default=5e-6, help="start of the replay's falling rate")
    add("--warmup_steps", type=int, default=5, help="steps until --lr is reached")
    add("--weight_decay", type=float, default=0.1, help="of AdamW, on matrices")
    add("--clip", type=float, default=1.0, help="largest global gradient norm")
    add("--dtype", choices=("bfloat16", "float32"), help="(None: bfloat16 on CUDA, float32 on CPU)")
    add("--seed", type=int, default=0, help="of the samples")
    add = p.add_argument_group("memory (what is not given, the plan chooses)").add_argument
    add("--optimizer", choices=OPTIMIZERS, help="where its state lives, and in how many bits")
    add("--keep_attention", **switch, help="keep attention's outputs for the backward pass")
    add("--offload_inputs", **switch, help="layer inputs wait on the host")
    add("--plan", nargs="?", const=HERE, choices=(HERE, *budget.GPUS), help="memory, FLOPs, hours")
    add = p.add_argument_group("data and output").add_argument
    add("--data", nargs="+", metavar="PATH", help="text files, folders (None: standard library)")
    add("--replay_data", nargs="+", metavar="PATH", help="(None: --data)")
    add("--join", action="store_true", help="join the documents of --data into one")
    add("--out", default="out", metavar="DIR", help="where the result goes; must be empty")
    add("--keep_stages", **off, help="keep out/extended and out/replayed")
    add("--save_minutes", type=float, default=30, help="between saves of the training state")
    add("--no_saves", action="store_true", help="no state: 4-12 bytes a parameter, twice")
    add("--saves", dest="no_saves", action="store_false", default=False, help="undo --no_saves")
    add("--resume", action="store_true", help="go on in --out, with its flags where none is given")
    add("--export", metavar="DIR", help="write the samples of the run to DIR and do nothing else")
    return parse_or_resume(p, argv, TOY)


def resolve(args: argparse.Namespace) -> LlamaConfig:
    """Fill in what was not given, check what was; returns the config of the base model. Writes
    nothing."""
    checks.check_given(args)
    args.model = local_folder(args.model, CONFIG if args.plan else FILES)
    config = LlamaConfig.from_dir(args.model)
    if args.base_len is None:
        args.base_len = config.max_position_embeddings
    if args.train_len is None:
        full = args.method == "full"
        args.train_len = args.target_len if full else recipe.train_length(args.target_len)
    if args.replay_len is None:
        args.replay_len = min(args.base_len, args.train_len)
    checks.check_lengths(args)
    check_extendable(config, args.target_len, args.rope_base)
    if args.rope_base is None:
        args.rope_base = recipe.ntk_rope_base(
            config.rope_theta, config.head_dim, args.base_len, args.target_len
        )
    if args.replay_steps is None:
        args.replay_steps = math.ceil(68e6 / (args.replay_len * args.batch_sequences))
    needs_probe = args.select == "impact" and not (args.extended or args.impactful)
    if args.probe_steps is None:
        # H' must have learnt something: five steps, or a quarter where there are few
        probe = max(1, args.steps // 10, min(5, args.steps // 4))
        args.probe_steps = probe if needs_probe else 0
    checks.check_probe(args, needs_probe)
    on_gpu = torch.cuda.is_available() or args.plan in budget.GPUS
    args.device = "cuda" if on_gpu else "cpu"
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    return config


# ---- 2. One optimizer step ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Stage:
    """What the samples of a stretch of steps look like."""

    name: str
    steps: int
    tokens: int  # of one sample
    target_len: int
    method: str
    select: str
    lr: float


def sample(
    stage: Stage, corpus: Corpus, tokenizer, args, impactful, generator
) -> tuple[Tensor, Tensor]:
    """One (input_ids (L,), position_ids (L,)). The text and its selection are drawn before the
    positions: given the same impactful types and probe, every --method but full sees the same
    tokens at the same step."""
    prefix = args.prefix and stage.method == "longrecipe"
    options = {"method": stage.method, "select": stage.select, "prefix": prefix}
    options |= {"impactful": impactful, "generator": generator}
    for _ in range(100):
        ids = corpus.window(stage.target_len, generator)
        try:
            return recipe.make_example(ids, tokenizer, stage.tokens, stage.target_len, **options)
        except recipe.TooFewSegments as error:  # a window without sentences, say a long table
            reason = error
    raise reason


def draw(
    stage: Stage, step: int, corpus: Corpus, tokenizer, args, impactful
) -> Iterator[tuple[Tensor, Tensor]]:
    """The samples of optimizer step `step` (0-based, over all stages), each drawn from (--seed,
    step, number in the batch) alone. `python recipe.py --export` writes the same."""
    for b in range(args.batch_sequences):
        # one generator a sample: how many numbers a method draws moves no other sample
        seed = args.seed * 1_000_003 + step + 100_000_000 * b
        generator = torch.Generator().manual_seed(seed)
        yield sample(stage, corpus, tokenizer, args, impactful, generator)


def accumulate(
    model: Llama, micro_batches: list[tuple[Tensor, Tensor, Tensor]], after_each=lambda: None
) -> float:
    """Add the gradients of the mean loss over ALL valid tokens of the micro-batches; returns that
    loss, nats.

    Each micro-batch is (input_ids, position_ids, targets), all (B, T). Dividing by the valid
    tokens of the whole step, not of each micro-batch, makes 4 x 1 sequences of unequal length
    equal to 1 x 4."""
    valid = sum(int((targets != -100).sum()) for _, _, targets in micro_batches)
    if valid == 0:
        raise BadInput("a step without a single target token")
    # [E17] loss = (sum over all sequences of the sum of their losses) / (all their valid targets)
    total = 0.0
    for input_ids, position_ids, targets in micro_batches:
        device = model.lm_head.weight.device
        loss_sum, _ = linear_cross_entropy(
            model.hidden(input_ids.to(device), position_ids.to(device)),  # no name: freed at once
            model.lm_head.weight,
            targets.to(device),
        )
        loss = loss_sum / valid
        loss.backward()
        total += float(loss.detach())
        after_each()
    return total


def learning_rate(stage: Stage, step: int, warmup_steps: int, first_step: int = 0) -> float:
    """Rate of step `step` (0-based) of a stage: warm-up then constant; replay falls linearly to
    zero."""
    # [E18] replay: lr * (1 - i / steps);   before it: lr * min(1, (i + 1) / warm-up steps)
    if stage.name == "replay":
        return stage.lr * (1 - step / stage.steps)
    return stage.lr * min(1.0, (first_step + step + 1) / max(1, warmup_steps))


# ---- 3. The trainer: steps, metrics, saves -----------------------------------------------------


class Trainer:
    """Model, optimizer and the position in the run; run: its folder, with metrics and saves. Each
    sample is drawn from (seed, step, number) alone, so the data position needs no state."""

    def __init__(self, model: Llama, stages: list[Stage], tokenizer, args, run: RunFolder):
        self.model, self.stages, self.tokenizer = model, stages, tokenizer
        self.args, self.run = args, run
        self.optimizer = make_optimizer(args.optimizer, model, args.lr, args.weight_decay)
        self.step = 0  # optimizer steps done, over all stages
        self.impactful: Tensor | None = None
        self.last_save = time.monotonic()
        self.tokens = [s.tokens * args.batch_sequences for s in stages for _ in range(s.steps)]
        self.bar = progress(None, "train", total=sum(self.tokens), unit="tok", unit_scale=True)

    def load_state(self, state: dict) -> None:
        self.step, self.impactful = state["step"], state["impactful"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.bar.update(sum(self.tokens[: self.step]))

    def save(self) -> None:
        if self.args.no_saves:
            return
        state = {"step": self.step, "impactful": self.impactful}
        self.run.save(state | {"optimizer": self.optimizer.state_dict()})
        self.last_save = time.monotonic()

    def train(self, stage: Stage, corpus: Corpus) -> None:
        """The steps of one stage, from where the run stands."""
        first = sum(s.steps for s in self.stages[: self.stages.index(stage)])
        self.bar.set_description(stage.name)
        for i in range(max(0, self.step - first), stage.steps):
            started = time.monotonic()
            drawn = draw(stage, self.step, corpus, self.tokenizer, self.args, self.impactful)
            batch = []
            for ids, positions in drawn:
                corpus.look_at(ids)  # the toy corpus counts its questions; others do nothing
                batch.append((ids[None], positions[None], next_token_targets(ids[None])))
            loss = accumulate(self.model, batch, lambda: self.bar.update(stage.tokens))
            lr = learning_rate(stage, i, self.args.warmup_steps, first)
            with unbroken():  # Ctrl-C waits: weights, step and metrics move together
                norm = self.optimizer.step(lr, self.args.clip, usable=math.isfinite(loss))
                self.step += 1
                self.report(stage, loss, lr, norm, time.monotonic() - started)
            gives_up = self.run.too_many_skips()  # no finite loss or gradient: see RunFolder
            if gives_up or time.monotonic() - self.last_save > 60 * self.args.save_minutes:
                self.save()
            if gives_up:
                self.run.give_up(batch, self.step)
        if remark := corpus.remark():
            log(f"{stage.name}: {remark}")

    def report(self, stage: Stage, loss: float, lr: float, norm: float, seconds: float) -> None:
        speed = budget.speed(
            self.model.config, stage.tokens, self.args.batch_sequences, seconds, self.args.device
        )
        row = {"stage": stage.name, "step": self.step, "loss": loss, "lr": lr, "grad_norm": norm}
        self.run.append_metrics(row | speed | {"peak_GiB": round(peak_gib(), 2)})
        shown = {"loss": f"{loss:.3f}", "lr": f"{lr:.1e}", "norm": f"{norm:.2f}"}
        shown |= {"MFU": mfu} if (mfu := speed["causal_mfu"]) else {}  # share of the GPU's peak
        self.bar.set_postfix(shown | {"GiB": f"{peak_gib():.1f}"})


# ---- 4. Analysis: which token types gain from a longer context? --------------------------------


def analysis_sample(i: int, stage: Stage, corpus: Corpus, tokenizer, args) -> tuple:
    """(input_ids (L,), position_ids (L,), generator: for what else is drawn beside them)."""
    generator = torch.Generator().manual_seed(args.seed * 1_000_003 + 500_000 + i)
    return *sample(stage, corpus, tokenizer, args, None, generator), generator


def analyse(
    base: Llama, extended: Llama, stage: Stage, corpus: Corpus, tokenizer, args, run
) -> Tensor:
    """Impactful token types, bool (V,): measured once on a few samples, afterwards only looked up.

    Runs on transformed ids, so that train_len tokens cover positions up to the target, and counts
    only positions past the old window: our stated difference from the paper's plain samples of
    20k tokens."""
    V = base.config.vocab_size
    total, count = torch.zeros(V, dtype=torch.float64), torch.zeros(V, dtype=torch.int64)
    options = {"first_position": args.base_len, "log_softmax": args.log_softmax}
    texts = []
    for i in progress(range(args.analysis_samples), "analysis", unit="sample"):
        ids, positions, generator = analysis_sample(i, stage, corpus, tokenizer, args)
        _, s, c = recipe.logit_shift(base, extended, ids, positions, **options)
        total, count = total + s, count + c
        texts.append(corpus.window(args.target_len, generator))
    impactful = recipe.impactful_types(total, count, args.top, args.min_count)
    share = torch.cat(
        [recipe.impactful_share(t, recipe.split_segments(t, tokenizer), impactful) for t in texts]
    )
    mean = (total / count.clamp(min=1)).masked_fill(~impactful, -torch.inf)
    ranked = mean.argsort(descending=True)[: int(impactful.sum())].tolist()
    run.write_impactful({v: [tokenizer.decode([v]), round(float(mean[v]), 4)] for v in ranked})
    log(
        f"analysis: {len(ranked)} impactful types of {int((count > 0).sum())} seen, first:"
        f" {' '.join(repr(tokenizer.decode([v])) for v in ranked[:12])}\n"
        f"analysis: the paper's rule alone (no impactful token) drops"
        f" {(share == 0).double().mean():.1%} of {len(share)} segments; the sample has room for"
        f" {args.train_len / args.target_len:.0%} of the tokens"
    )
    return impactful


# ---- 5. The story ------------------------------------------------------------------------------


def plan_stages(args: argparse.Namespace) -> list[Stage]:
    first_select = "random" if args.select == "impact" else args.select  # nothing is known yet
    long = (args.train_len, args.target_len, args.method)
    short = (args.replay_len, args.replay_len, "none", "first")
    return [
        Stage("probe", args.probe_steps, *long, first_select, args.lr),
        Stage("extend", args.steps - args.probe_steps, *long, args.select, args.lr),
        Stage("replay", args.replay_steps, *short, args.replay_lr),
    ]


def run_stages(trainer: Trainer, corpus: Corpus, replay_corpus: Corpus) -> None:
    """probe -> analysis -> extend -> replay -> merge, from where the run stands."""
    args, run, model = trainer.args, trainer.run, trainer.model
    probe, extend, replay = trainer.stages
    if args.resume and (state := run.load()) is not None:
        trainer.load_state(state)
        log(f"resumed at step {trainer.step}")

    trainer.train(probe, corpus)

    if args.select == "impact" and trainer.impactful is None:
        base, extended = load_pretrained(args.model, model.dtype, args.device), model
        if args.extended:
            extended = load_pretrained(args.extended, model.dtype, args.device)
        if args.rebased_analysis:  # the shift is then what was learnt, not where the old base fails
            rope = {k: getattr(extended.config, k) for k in ("rope_theta", "rope_scaling")}
            base.config = dataclasses.replace(base.config, **rope)
        trainer.impactful = analyse(base, extended, probe, corpus, trainer.tokenizer, args, run)
        del base, extended
        trainer.save()

    trainer.train(extend, corpus)
    if args.keep_stages and trainer.step == args.steps:  # not when resumed within the replay
        save_pretrained(model, run.path / "extended", tokenizer_from=args.model)

    trainer.train(replay, replay_corpus)
    trainer.bar.close()
    save_pretrained(model, run.path / "replayed", tokenizer_from=args.model)

    recipe.merge(args.model, run.path / "replayed", run.path / "merged", args.merge_weight)
    if not args.keep_stages:
        shutil.rmtree(run.path / "replayed")
    run.publish(run.path / "merged")


def export(args: argparse.Namespace, config: LlamaConfig) -> None:
    """Write the samples that the run would see to the folder --export, without training."""
    check_exportable(args)
    tokenizer = load_tokenizer(args.model)
    check_fits(tokenizer, config.vocab_size)
    impactful = read_impactful(args.impactful, config.vocab_size) if args.impactful else None
    corpora = load_corpora(args, tokenizer)

    def samples(stage: Stage, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        return draw(stage, step, corpora[stage.name == "replay"], tokenizer, args, impactful)

    settings, stages = sample_settings(args, impactful, corpora), plan_stages(args)
    write_samples(Path(args.export), settings, contents(args), stages, learning_rate, samples)


def main(argv: list[str] | None = None) -> None:
    with report_errors():
        args = parse(argv)
        started = time.time()
        config = resolve(args)
        if args.export:
            return export(args, config)
        stages = plan_stages(args)
        run = RunFolder(args.out)
        # memory: chooses optimizer and levers, refuses what cannot fit; --plan prints and ends here
        if settle(config, args, stages, finished=run.finished()):
            return
        tokenizer = load_tokenizer(args.model)
        check_fits(tokenizer, config.vocab_size)
        settings = {k: v for k, v in vars(args).items() if k not in NO_SETTINGS}
        run.check(settings, args.resume)
        if run.finished():
            log(f"{args.out} holds this run, finished: nothing to do")
            return
        run.check_data(contents(args), args.resume)
        corpus, replay_corpus = load_corpora(args, tokenizer)
        impactful = read_impactful(args.impactful, config.vocab_size) if args.impactful else None
        checks.check_extended(args.extended, config.vocab_size)
        texts = (corpus, corpus, replay_corpus)  # of the stages
        checks.check_samples(args, stages, texts, tokenizer, impactful, sample, analysis_sample)
        model = load_pretrained(args.model, getattr(torch, args.dtype), args.device)

        log_device(args.device, CUDA_BACKENDS, toy=args.model == TINY)
        checks.log_settings(corpus, stages, settings)
        model.config = config.with_rope(args.rope_base, args.target_len)
        model.activation_checkpointing, model.keep_attention = True, args.keep_attention
        model.layer_inputs = LayerInputsOnHost() if args.offload_inputs else None
        trainer = Trainer(model, stages, tokenizer, args, run)
        trainer.impactful = impactful
        with run.running(settings, args.resume, trainer):
            run_stages(trainer, corpus, replay_corpus)
            run.write_settings(settings, status="done", **provenance(started))
        log(f"done in {(time.time() - started) / 60:.1f} minutes: {args.out}")
        judge = "python eval_needle.py" + ("" if args.out == "out" else f" --model {args.out}")
        if args.device == "cpu" and args.model != TINY:  # the default grid takes a CPU long
            judge += f" --lengths {min(2048, args.target_len)} --n 1"
        log(f"next: {judge}")


if __name__ == "__main__":
    main()
