"""The settings of an evaluation, resolved once from the flags, the run and a template; and which
models are judged. Writes no file."""

import argparse
import dataclasses
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch

from support.data.text import check_outside
from support.huggingface.hashes import Hashes
from support.huggingface.hub import local_folder
from support.huggingface.tokenizer import load_tokenizer
from support.needles.tasks import TASKS, apply_template, read_template
from support.runs.flags import Parser, original_of_run
from support.system.bad_input import BadInput
from support.system.console import check_ranges, log

RESULT = "out"  # where train.py puts its result
NO_NEEDLES = "no needles"  # a control: the prompt without its needles
NEEDLE_ALONE = "needle alone"  # another: only what is asked for, in a short text
SHORT_TEXT = 256  # tokens of haystack in it


@dataclasses.dataclass(frozen=True)
class Settings:
    """An evaluation, fully resolved; nobody changes it afterwards."""

    model: str  # folder of the model to judge
    compare: tuple[str, ...]  # folders of others beside it
    original: str | None  # the one of them that --model began with, where that is known
    tasks: tuple[str, ...]
    lengths: tuple[int, ...]  # tokens, answer budget included; increasing
    depths: tuple[float, ...]  # 0: start, 1: end; increasing
    n: int  # texts per length
    n_beyond: int  # the same beyond the window of a compared model
    seed: int  # of texts and needles
    loss: bool  # also the loss on n texts per length
    controls: tuple[str, ...]  # NO_NEEDLES, NEEDLE_ALONE
    haystack: str | None
    template: str | None
    out: str  # folder of the results
    device: str
    dtype: str  # "torch.float32" or "torch.bfloat16"


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A row of the tables: a folder's weights under a config that may have another theta or scaling
    of RoPE; or, as a control, the model to judge on prompts without some of their parts."""

    label: str
    folder: str
    config: object  # LlamaConfig
    trained_window: int  # of the weights, tokens
    identity: str  # a hash: the same model has the same, whatever its folder is called
    control: str | None = None

    @property
    def window(self) -> int:
        """Up to where this candidate is meant to work, tokens."""
        return self.config.max_position_embeddings


def parse(argv: list[str] | None, doc: str) -> argparse.Namespace:
    p = Parser("eval_needle.py", doc)
    add, yes, number = p.add_argument, {"action": "store_true"}, {"type": int, "metavar": "N"}
    add("--model", metavar="DIR", help="Hugging Face folder to judge (default: out)")
    compare = "models to judge beside it (default: the original, if --model's run.json names it)"
    add("--compare", nargs="*", metavar="DIR", help=compare)
    without = "also judge the prompts without their needles: what do the needles add, in nats?"
    add("--no_needles", help=without, **yes)
    alone = f"also judge the needle alone in {SHORT_TEXT} tokens: what does distance take away?"
    add("--needle_alone", help=f"{alone} (includes --no_needles)", **yes)
    controls = "as --no_needles; without a run.json, the first of --compare counts as the original"
    add("--controls", help=controls, **yes)
    tasks = f"of {', '.join(TASKS)} (default: the template's, or niah_single)"
    add("--tasks", nargs="*", choices=TASKS, metavar="TASK", help=tasks)
    template = "JSON file with other wording (default: needle.json of --model, if it has one)"
    add("--template", metavar="FILE", help=template)
    lengths = "tokens, answer included (default: the old window, the new one and one between)"
    add("--lengths", nargs="+", help=lengths, **number)
    depths = "where the needle is, 0: start, 1: end (default: 0 0.25 0.5 0.75 1)"
    add("--depths", nargs="+", type=float, metavar="X", help=depths)
    add("--n", help="texts per length (default: the template's, or 2)", **number)
    beyond = "the same past the window of a compared model (default: the template's, or --n)"
    add("--n_beyond", help=beyond, **number)
    loss = "also measure the loss, nats per token, on n texts per length"
    add("--loss", "--ppl", help=loss, **yes)
    haystack = "text file or folder (default: the template's, or essays, or Python's reference)"
    add("--haystack", metavar="PATH", help=haystack)
    add("--out", metavar="DIR", help="folder for the results (default: that of --model)")
    add("--seed", default=0, help="seed of texts and needles", **number)
    dtype = "type of the weights (default: bfloat16 on CUDA, float32 on a CPU)"
    add("--dtype", choices=("bfloat16", "float32"), help=dtype)
    flash = "flash: use an installed flash-attn-4 or FlashAttention 3 instead of torch's kernels"
    add("--attention", choices=("torch", "flash"), default="torch", help=flash)
    return p.parse_args(argv)


def read_settings(flags, known: dict, read_config) -> tuple[Settings, dict, dict]:
    """(settings, task name -> Task, folder -> config), from the files that the flags point to;
    known: name -> Task. Raises BadInput for flags that make no sense and for models that cannot be
    compared."""
    models = who_is_judged(flags)
    configs = {folder: read_config(folder) for folder in (*models[1], models[0])}
    path = Path(flags.template or Path(models[0]) / "needle.json")
    fields = read_template(path) if flags.template or path.is_file() else {}
    text = fields.get("haystack", "noise")
    if text not in ("noise", "needles") and (path.parent / text).exists():
        fields["haystack"] = str(path.parent / text)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    settings, tasks = resolve(flags, known, models, configs, path, fields, device)
    check_settings(settings, tasks, flags.depths is not None)
    check_models(configs, settings.lengths[-1])
    return settings, tasks, configs


def resolve(
    flags, known: dict, models: tuple, configs: dict, template: Path, fields: dict, device: str
) -> tuple[Settings, dict]:
    """(settings, task name -> Task); reads no file. models: what who_is_judged returns; fields: of
    the template."""
    model, compare, original = models
    names, tasks = apply_template(template, fields, flags.tasks, known)
    windows = [config.max_position_embeddings for config in configs.values()]
    n = fields.get("n", 2) if flags.n is None else flags.n
    dtype = flags.dtype or ("bfloat16" if device == "cuda" else "float32")
    no_needles = flags.no_needles or flags.controls or flags.needle_alone
    text = fields.get("haystack")
    settings = Settings(
        model=model,
        compare=compare,
        original=original,
        tasks=tuple(names),
        lengths=tuple(sorted(set(flags.lengths or default_lengths(windows)))),
        depths=tuple(sorted(set(flags.depths or [0.0, 0.25, 0.5, 0.75, 1.0]))),
        n=n,
        n_beyond=fields.get("n_beyond", n) if flags.n_beyond is None else flags.n_beyond,
        seed=flags.seed,
        loss=flags.loss,
        controls=(NO_NEEDLES,) * no_needles + (NEEDLE_ALONE,) * flags.needle_alone,
        haystack=flags.haystack or (None if text in ("noise", "needles") else text),
        template=str(template) if fields else None,
        out=flags.out or model,
        device=device,
        dtype=f"torch.{dtype}",
    )
    return settings, tasks


def who_is_judged(flags) -> tuple[str, tuple[str, ...], str | None]:
    """(--model, --compare, the one of these that training started from, if that is known)."""
    if flags.model is None and not Path(RESULT).exists():
        raise BadInput(f"folder {RESULT}, which train.py makes, does not exist: give --model DIR")
    model = local_folder(flags.model or RESULT)
    begun_with = original_of_run(model)
    compare = begun_with if flags.compare is None else flags.compare
    # a folder counts once, however its path is written
    found = {os.path.realpath(folder): folder for folder in map(local_folder, compare)}
    if own := found.get(os.path.realpath(model)):
        raise BadInput(f"--compare {own} is --model itself")
    compare = tuple(found.values())
    starts = [os.path.realpath(folder) for folder in begun_with]
    original = next((f for f in compare if os.path.realpath(f) in starts), None)
    if flags.compare and begun_with and original is None:
        log(f"--compare leaves out the original, {begun_with[0]}, and so its row untrained")
    if flags.controls and original is None:
        original = next(iter(compare), None)
        if original is None:
            log("--controls: the original is not known (--compare DIR), so it is not judged")
    return model, compare, original


def default_lengths(windows: list[int]) -> list[int]:
    """The shortest window, the longest, and the length between them in equal proportion.

    >>> default_lengths([8192, 131072])
    [8192, 32768, 131072]
    """
    old, new = min(windows), max(windows)
    return [old, math.isqrt(old * new), new]


def check_settings(settings: Settings, tasks: dict, depths_given: bool) -> None:
    """BadInput for a number that cannot be meant, or if nothing is to be run."""
    each = [name for name in settings.tasks if tasks[name].ask == "each"]
    if depths_given and each:
        log(f"--depths is not for {', '.join(each)}: the needles divide the text among them")
    check_ranges(settings, at_least_1=("n", "n_beyond"), seed=("seed",))
    check_outside("--out", settings.out, [settings.haystack] if settings.haystack else [])
    if not settings.tasks and not settings.loss:
        raise BadInput("--tasks without a name needs --loss: otherwise there is nothing to run")
    if settings.lengths[0] < 2:
        raise BadInput(f"--lengths {settings.lengths[0]} must be at least 2 tokens")
    if outside := [d for d in settings.depths if not 0 <= d <= 1]:
        raise BadInput(f"--depths {outside[0]:g} must be within 0..1")


def check_models(configs: dict, longest: int) -> None:
    """configs: folder -> config, the model to judge last. BadInput if one cannot take the longest
    prompt, or the prompts (and so the answers) of the last one's tokenizer."""
    model = list(configs)[-1]
    own = load_tokenizer(model)
    for folder, config in configs.items():
        window = config.sliding_window
        if window is not None and window < longest:
            raise BadInput(f"{folder}: sliding_window {window} is shorter than --lengths {longest}")
        if own.vocab_size > config.vocab_size or own != load_tokenizer(folder):
            raise BadInput(f"{folder}: its tokenizer or vocabulary is not that of --model {model}")


def judged(settings: Settings, configs: dict, hashes: Hashes) -> list[Candidate]:
    """The models and controls to judge, in the order of every table and figure: original, untrained
    (if --model has another theta or scaling of RoPE), others, --model, controls."""
    result, original = configs[settings.model], settings.original
    theta, target = result.rope_theta, result.max_position_embeddings
    order = sorted(settings.compare, key=lambda folder: folder != original)
    labels = labels_of((*order, settings.model), original)
    candidates = []
    for folder in (*order, settings.model):
        config, identity = configs[folder], hashes.of_model(folder)
        window = config.max_position_embeddings
        candidates.append(Candidate(labels[folder], folder, config, window, identity))
        rebased = config.with_rope(theta, target, result.rope_scaling)
        if folder == original and rebased != config.with_rope(config.rope_theta, target):
            identity += f"/{theta:.6g}"
            if rebased.rope_scaling != config.rope_scaling:
                identity += f"/{rebased.rope_scaling}"
            candidates.append(Candidate("untrained", folder, rebased, window, identity))
    own = candidates[-1]
    for name in settings.controls:
        changes = {"label": name, "control": name, "identity": f"{own.identity}/{name}"}
        candidates.append(dataclasses.replace(own, **changes))
    return candidates


def labels_of(folders: tuple[str, ...], original: str | None) -> dict[str, str]:
    """Folder -> its label: "original", or the folder's name, or where two have the same the whole
    path."""
    names = {folder: Path(os.path.realpath(folder)).name for folder in folders}
    taken = ["original", "untrained", NO_NEEDLES, NEEDLE_ALONE, *names.values()]
    labels = {f: f if taken.count(name) > 1 else name for f, name in names.items()}
    return labels | ({original: "original"} if original else {})


def cells(candidate: Candidate, tasks: dict, settings: Settings) -> Iterator[tuple]:
    """(task, length, repeat, depth) of each prompt of one candidate, deepest needle first."""
    names = [*settings.tasks, *(["loss"] if settings.loss and candidate.control is None else [])]
    for name in names:
        depths = [0.0] if name == "loss" else tasks[name].depths(settings.depths)
        if candidate.control is not None and tasks[name].needles == 0:
            continue  # no needle that could be left out
        if candidate.control == NO_NEEDLES and tasks[name].ask != "each":
            depths = depths[:1]  # the same prompt at each of them
        for length in settings.lengths:
            beyond = candidate.folder != settings.model and length > candidate.window
            for repeat in range(settings.n_beyond if beyond else settings.n):
                for depth in sorted(depths, reverse=True):
                    yield name, length, repeat, depth
