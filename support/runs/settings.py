"""The settings of train.py: what to train, and where and how to run it. Each field is a flag of the
same name; its text here is its help text."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_args

from support.data.sources import is_toy_model
from support.data.toy import TINY
from support.huggingface.config import yarn_scaling
from support.memory import count
from support.memory.machine import HERE
from support.memory.optimizer import NAMES as OPTIMIZERS
from support.runs.flags import Parser, add_flags, flag, settings_to_resume
from support.system.bad_input import BadInput
from support.system.console import check_ranges


@dataclass(frozen=True)
class Settings:
    """What is trained, down to the last number: made once by `resolve` from the flags of the same
    names, or written by hand (every field has a default); nothing changes it afterwards."""

    model: str = flag(
        TINY, "folder of the original, or its name on the hub", "model", metavar="DIR"
    )
    target_len: int = flag(131_072, "the new window, tokens")
    base_len: int = flag(8_192, "window of the original, tokens (default: its config's)")
    rope_base: float = flag(
        1.315e8,
        "the new rope_theta (default: by the paper's NTK formula; with --rope yarn the original's)",
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
        1, "sentences of fewer tokens are joined with the next ones; 1 joins none, as in the paper"
    )
    train_len: int = flag(39_424, "length of a sample, tokens (default: 30 %% of --target_len)")
    probe_steps: int = flag(
        10,
        "steps on randomly chosen sentences before the analysis (default: a tenth of --steps, but"
        " at least 5, or a quarter of --steps if that is less)",
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
    replay_steps: int = flag(87, "steps of the replay (default: as many as make 68M tokens)")
    replay_len: int = flag(
        8_192,
        "length of a replay sample, tokens (default: the old window, or --train_len if less)",
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
        "type of weights and activations (default: bfloat16 on CUDA, float32 on a CPU)",
        "memory (the plan chooses what is not given)",
        choices=("bfloat16", "float32"),
    )
    optimizer: str = flag(
        "adamw",
        "AdamW: where its state is kept, and in how many bits (default: the fastest that fits)",
        choices=OPTIMIZERS,
    )
    keep_attention: bool = flag(
        False, "keep attention's outputs for the backward pass (default: if they fit)"
    )
    offload_inputs: bool = flag(
        False, "keep each layer's input on the host (default: if nothing fits without)"
    )
    split_mlp: bool = flag(False, "run the MLP in pieces of tokens (default: if nothing else fits)")

    data: list[str] | None = flag(
        None,
        "files of text or of token ids, or folders (default: the Python standard library)",
        "data",
        nargs="+",
        metavar="PATH",
    )
    replay_data: list[str] | None = flag(
        None, "the same for the replay (default: --data)", nargs="+", metavar="PATH"
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

    @property
    def has_probe(self) -> bool:
        """Does the analysis compare with the model after a probe, and not with --extended?"""
        return self.analyses and not self.extended


@dataclass(frozen=True)
class RunOptions:
    """Where the run goes and what is kept of it: changes no bit of the result."""

    out: str = flag("out", "where the result goes; must be empty", "output", metavar="DIR")
    keep_stages: bool = flag(False, "keep out/extended and out/replayed")
    save_minutes: float = flag(30.0, "minutes between saves of the training state")
    no_saves: bool = flag(
        False,
        "write no state to resume from (it takes 8 to 24 bytes of disk per parameter)",
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
        choices=(HERE, *count.GPUS),
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
    """(the fields of Settings that have a value, name -> value; the options). doc: of train.py;
    choices: see add_flags.

    Flags missing from the command line are taken from the run (--resume), or from TOY for the toy
    model (no --model, or its folder, however written)."""
    names = [field.name for field in fields(RunOptions)]
    p = Parser("train.py", doc)
    add_flags(p, [*fields(Settings), *fields(RunOptions)], choices)
    p.epilog = "Without --model, for the toy: " + " ".join(
        f"--{k}" if v is True else f"--{k} {v}" for k, v in TOY.items() if k != "model"
    )
    given, before = vars(p.parse_args(argv)), {}
    if given.get("resume"):
        out = Path(given.get("out", RunOptions.out))
        check_types(before := settings_to_resume(out), choices, out / "run.json")
    elif is_toy_model(given.get("model", TINY)):
        before, given = TOY, given | {"model": TINY}
    known = {*names, *(field.name for field in fields(Settings))}
    flags = {k: v for k, v in before.items() if k in known and v is not None} | given
    options = RunOptions(**{name: flags.pop(name) for name in names if name in flags})
    check_ranges(options, not_negative=("save_minutes",))
    return flags, options


def check_types(settings: dict, choices: dict, file: Path) -> None:
    """BadInput for a setting that somebody has edited into what its flag could not be."""
    for field in (*fields(Settings), *fields(RunOptions)):
        value = settings.get(field.name)
        kinds = [getattr(kind, "__origin__", kind) for kind in get_args(field.type) or [field.type]]
        kinds += [int] * (float in kinds)
        allowed = choices.get(field.name) or field.metadata["options"].get("choices") or [value]
        fits = type(value) in kinds and value in allowed and value != []
        fits &= not isinstance(value, list) or all(type(part) is str for part in value)
        fits &= not isinstance(value, int) or abs(value) < 2**63
        if value is not None and not fits:
            names = [kind.__name__ for kind in kinds if kind is not type(None)]
            expected = " or ".join(names if allowed == [value] else allowed)
            raise BadInput(f"{file}: {field.name} is {str(value)[:50]!r}, expected: {expected}")


def difference(before: dict, now: dict, may_differ: tuple[str, ...] = ()) -> str | None:
    """The first setting in which the two differ, in words; both as they are kept (as_kept). One
    that an older version did not know has its default.

    >>> difference({"lr": 0.1}, {"lr": 0.2, "seed": 0})
    'another lr (0.1, now 0.2)'
    """
    defaults = {field.name: field.default for field in fields(Settings)}
    for name in sorted((before.keys() | now.keys()) - {*may_differ}):
        old, new = before.get(name, defaults.get(name)), now.get(name)
        if old != new:
            return f"another {name} ({str(old)[:60]}, now {str(new)[:60]})"
    return None


@dataclass(frozen=True)
class Stage:
    """A part of the training: how many steps, and what their samples look like."""

    name: str
    steps: int
    tokens: int  # of one sample
    target_len: int
    lr: float
    how: dict  # keyword arguments of recipe.make_example


def plan_stages(settings: Settings) -> list[Stage]:
    """probe, extend, replay."""
    how = {k: getattr(settings, k) for k in ("method", "select", "prefix", "min_segment_tokens")}
    # A text that longrecipe cannot use is left out for all methods, so that all see the same tokens
    how["two_segments"] = settings.method != "full"
    select = "random" if settings.select == "impact" else settings.select  # no types yet
    plain = {"method": "none", "select": "first"}
    long = settings.train_len, settings.target_len, settings.lr
    short = settings.replay_len, settings.replay_len, settings.replay_lr
    return [
        Stage("probe", settings.probe_steps, *long, how | {"select": select}),
        Stage("extend", settings.steps - settings.probe_steps, *long, how),
        Stage("replay", settings.replay_steps, *short, plain),
    ]
