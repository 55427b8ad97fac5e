"""The settings of train.py: what to train, and where and how to run it. Each field is a flag of the
same name; its text here is its help text."""

from dataclasses import dataclass, fields

from support.data.toy import TINY
from support.huggingface.config import yarn_scaling
from support.memory import count as budget
from support.memory.machine import HERE
from support.memory.optimizer import NAMES as OPTIMIZERS
from support.runs.flags import flag, parse_or_resume
from support.system.console import check_ranges


@dataclass(frozen=True)
class Settings:
    """What is trained, down to the last number: made once by `resolve` from the flags of the same
    names, or written by hand (every field has a default); nothing changes it afterwards."""

    model: str = flag(
        TINY, "folder of the original, or its name on the hub", "model", metavar="DIR"
    )
    target_len: int = flag(131_072, "the new window, tokens")
    base_len: int = flag(8_192, "window of the original, tokens", derived="its config's")
    rope_base: float = flag(
        1.315e8,
        "the new theta (rope_theta)",
        derived="the paper's NTK formula; with --rope yarn the original's",
    )
    rope: str = flag(
        "ntk",
        "how RoPE reaches the new window. ntk: a larger theta; yarn: slower rotation of the pairs"
        " that turn rarely",
        choices=("ntk", "yarn"),
    )

    method: str = flag("longrecipe", "position ids of a sample", "recipe")
    select: str = flag("impact", "which sentences of a text are kept")
    prefix: bool = flag(False, "keep a contiguous prefix, as the released code does")
    min_segment_tokens: int = flag(
        1, "sentences shorter than this are joined with the next ones (1: none, as in the paper)"
    )
    train_len: int = flag(39_424, "length of a sample, tokens", derived="30 %% of --target_len")
    probe_steps: int = flag(
        10,
        "steps on randomly chosen sentences before the analysis",
        derived="a tenth of --steps, but at least 5, or a quarter of --steps if that is less",
    )
    extended: str | None = flag(
        None, "a trained H' to analyse instead of the probe's", metavar="DIR"
    )
    impactful: str | None = flag(
        None,
        "impactful.json of an earlier run; skips the analysis, and the probe unless --probe_steps"
        " is given",
        metavar="FILE",
    )
    analysis_samples: int = flag(8, "samples that the analysis reads")
    log_softmax: bool = flag(False, "analyse log-probabilities, not raw logits")
    rebased_analysis: bool = flag(False, "compare H' with the original under the new rope_theta")
    top: float = flag(0.2, "share of occurrences that count as impactful")
    min_count: int = flag(
        1, "token types that the analysis sees fewer times than this are never impactful"
    )
    merge_weight: float = flag(0.5, "share of the tuned model in the result")

    steps: int = flag(104, "optimizer steps of the extension, probe included", "training")
    replay_steps: int = flag(87, "steps of the replay", derived="as many as make 68M tokens")
    replay_len: int = flag(
        8_192,
        "length of a replay sample, tokens",
        derived="the old window, or --train_len if that is less",
    )
    batch_sequences: int = flag(96, "samples per optimizer step")
    lr: float = flag(5e-5, "learning rate of the extension")
    replay_lr: float = flag(5e-6, "start of the replay's falling learning rate")
    warmup_steps: int = flag(5, "steps until --lr is reached")
    weight_decay: float = flag(0.1, "AdamW's weight decay, on matrices only")
    clip: float = flag(1.0, "largest global gradient norm")
    seed: int = flag(0, "seed of the samples")

    dtype: str = flag(
        "bfloat16",
        "type of weights and activations",
        "memory (the plan chooses what is not given)",
        derived="bfloat16 on CUDA, float32 on a CPU",
        choices=("bfloat16", "float32"),
    )
    optimizer: str = flag(
        "adamw",
        "AdamW: where its state is kept, and in how many bits",
        derived="the fastest that fits",
        choices=OPTIMIZERS,
    )
    keep_attention: bool = flag(
        False, "keep attention's outputs for the backward pass", derived="if they fit"
    )
    offload_inputs: bool = flag(
        False, "keep each layer's input on the host", derived="if nothing fits without"
    )
    split_mlp: bool = flag(False, "run the MLP in pieces of tokens", derived="if nothing else fits")

    data: list[str] | None = flag(
        None,
        "files of text or of token ids, or folders",
        "data",
        derived="the Python standard library",
        nargs="+",
        metavar="PATH",
    )
    replay_data: list[str] | None = flag(
        None, "the same for the replay", derived="--data", nargs="+", metavar="PATH"
    )
    join: bool = flag(False, "join the documents of --data into one")

    @property
    def new_scaling(self) -> dict | None:
        """rope_scaling of the result; None: that of the original stays."""
        return yarn_scaling(self.base_len, self.target_len) if self.rope == "yarn" else None

    @property
    def analyses(self) -> bool:
        """Does the run make an analysis itself?"""
        return self.select == "impact" and self.impactful is None


@dataclass(frozen=True)
class Stage:
    """A part of the training: how many steps, and what their samples look like."""

    name: str
    steps: int
    tokens: int  # of one sample
    target_len: int
    method: str
    select: str
    lr: float
    prefix: bool = False
    min_segment_tokens: int = 1
    two_segments: bool = False  # if a text leaves only one, another is drawn


def plan_stages(settings: Settings) -> list[Stage]:
    """probe, extend, replay."""
    first_select = "random" if settings.select == "impact" else settings.select  # no types yet
    long = (settings.train_len, settings.target_len, settings.method)
    short = (settings.replay_len, settings.replay_len, "none", "first")
    more = {
        "lr": settings.lr,
        "prefix": settings.prefix,
        "min_segment_tokens": settings.min_segment_tokens,
        # A text that longrecipe cannot use is left out for all methods, so that all see the same
        # tokens.
        "two_segments": settings.method != "full",
    }
    return [
        Stage("probe", settings.probe_steps, *long, first_select, **more),
        Stage("extend", settings.steps - settings.probe_steps, *long, settings.select, **more),
        Stage("replay", settings.replay_steps, *short, settings.replay_lr),
    ]


@dataclass(frozen=True)
class RunOptions:
    """Where the run goes and what is kept of it: changes no bit of the result."""

    out: str = flag("out", "where the result goes; must be empty", "output", metavar="DIR")
    keep_stages: bool = flag(False, "keep out/extended and out/replayed")
    save_minutes: float = flag(30.0, "minutes between saves of the training state")
    no_saves: bool = flag(
        False,
        "write no state to resume from (saves 8 to 24 bytes of disk per parameter)",
        action="store_true",
    )
    resume: bool = flag(
        False, "go on with the run in --out, with its settings", action="store_true"
    )
    attention: str = flag(
        "torch",
        "flash: use an installed flash-attn-4 or FlashAttention 3 instead of torch's kernels",
        choices=("torch", "flash"),
    )
    export: str | None = flag(None, "only write the run's samples to this folder", metavar="DIR")
    plan: str | None = flag(
        None,
        "only print memory, FLOPs and hours of the run, on this machine or on that GPU",
        nargs="?",
        const=HERE,
        choices=(HERE, *budget.GPUS),
    )


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


def parse_settings(doc: str, argv: list[str] | None, choices: dict) -> tuple[dict, RunOptions]:
    """(the fields of Settings that are given, name -> value; the options): see parse_or_resume.
    doc: of train.py."""
    flags = parse_or_resume("train.py", doc, argv, (Settings, RunOptions), TOY, choices)
    names = [field.name for field in fields(RunOptions) if field.name in flags]
    options = RunOptions(**{name: flags.pop(name) for name in names})
    check_ranges(options, not_negative=("save_minutes",))
    return flags, options
