"""`python train.py --export DIR`: the samples of a run as files, for an engine of your own.

    DIR/samples.json               settings, what the data holds, and a row for every step
    DIR/step_00000.safetensors     input_ids and position_ids, (samples, tokens) int32
    DIR/step_00001.safetensors     ...

One file an optimizer step, in the order train.py takes them (probe, extend, replay); the rows of
a file are the samples of its batch, also in order. samples.json has for every step: file, stage,
samples, tokens and lr. As a data set for transformers (targets are shifted inside its models):

    class Samples(torch.utils.data.Dataset):
        def __init__(self, folder):
            self.folder, self.steps = folder, json.load(open(f"{folder}/samples.json"))["steps"]
            self.rows = [(s["file"], i) for s in self.steps for i in range(s["samples"])]
        def __len__(self):
            return len(self.rows)
        def __getitem__(self, n):
            file, i = self.rows[n]
            with safetensors.safe_open(f"{self.folder}/{file}", "pt") as step:
                ids = step.get_slice("input_ids")[i].long()
                positions = step.get_slice("position_ids")[i].long()
            return {"input_ids": ids, "labels": ids, "position_ids": positions,
                    "attention_mask": torch.ones_like(ids)}   # without it gaps cut attention!

The model must be given settings["rope_base"] and settings["target_len"] as its theta and window,
and settings["rope_scaling"] as its scaling where that is not null. Do not shuffle: the order is
the seed's. A file is whole or not there, the same command goes on where it was stopped, and
"status" says "done" once all are there. examples/fsdp_run.py trains from such a folder."""

import json
import time
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from support.data import sources as corpora
from support.data.text import Corpus
from support.huggingface.config import read_json
from support.runs.flags import as_kept, settings_of
from support.runs.settings import Settings, plan_stages
from support.system.bad_input import BadInput
from support.system.console import log, progress, provenance, telling
from support.system.whole_files import LOCK, only_writer, replacing, write_atomically

INDEX = "samples.json"
# settings of train.py that change no sample and say nothing an engine should know
OTHER = (
    "dtype",
    "optimizer",
    "keep_attention",
    "offload_inputs",
    "split_mlp",
    "analysis_samples",
    "log_softmax",
    "rebased_analysis",
    "top",
    "min_count",
)


def check_exportable(settings, options) -> None:
    """BadInput for flags of train.py that leave open which samples it would see."""
    if options.resume or options.plan:
        raise BadInput("--export goes with neither --resume nor --plan")
    if settings.analyses:
        raise BadInput(
            "--export with --select impact needs the impactful types beforehand: --impactful FILE,"
            " the impactful.json that train.py with the same flags leaves in its --out after the"
            " analysis (then give its --probe_steps, too); or --select random"
        )


def sample_settings(settings, impactful: Tensor | None, texts: tuple[Corpus, Corpus]) -> dict:
    """What the samples depend on, and what an engine needs beside them."""
    kept = {k: v for k, v in as_kept(settings).items() if k not in OTHER}
    types = None if impactful is None else impactful.nonzero()[:, 0].tolist()
    kept |= {"impactful_types": types, "data_tokens": [text.tokens for text in texts]}
    return kept | {"rope_scaling": settings.new_scaling}


def write_samples(
    settings,
    options,
    tokenizer,
    texts: tuple[Corpus, Corpus],
    impactful: Tensor | None,
    learning_rate: Callable[..., float],
    draw: Callable[..., Iterable[tuple[Tensor, Tensor]]],
) -> None:
    """texts: of the extension and of the replay; learning_rate, draw: those of train.py. BadInput
    if the folder holds anything else than samples of these settings and texts."""
    started = time.time()
    folder, data = Path(options.export), corpora.contents(settings)
    plan = [(stage, i) for stage in plan_stages(settings) for i in range(stage.steps)]
    steps = [
        {
            "file": f"step_{step:05d}.safetensors",
            "stage": stage.name,
            "samples": settings.batch_sequences,
            "tokens": stage.tokens,
            "lr": learning_rate(stage, i, settings.warmup_steps, step - i),
        }
        for step, (stage, i) in enumerate(plan)
    ]
    about = sample_settings(settings, impactful, texts)
    index = {"settings": about, "data": data, "steps": steps}
    check_folder(folder, index)
    with only_writer(folder), telling(lambda: whole(folder, steps)):
        check_folder(folder, index)  # once more: another one may have ended just now
        if not (folder / INDEX).is_file():
            write_index(folder, index, status="running")
        for i, row in enumerate(progress(steps, "export", unit="step")):
            if (folder / row["file"]).is_file():
                continue
            stage, _ = plan[i]
            text = texts[stage.name == "replay"]
            samples = draw(stage, i, text, tokenizer, settings, impactful)
            ids, positions = (torch.stack(column).int() for column in zip(*samples, strict=True))
            with replacing(folder / row["file"]) as file:
                file.write(save({"input_ids": ids, "position_ids": positions}))
        if read_json(folder / INDEX)["status"] != "done":
            write_index(folder, index, status="done", **provenance(started))
    log(f"{whole(folder, steps)}; format: support/runs/export.py")


def write_index(folder: Path, index: dict, **more) -> None:
    write_atomically(folder / INDEX, json.dumps(index | more, indent=1) + "\n")


def whole(folder: Path, steps: list[dict]) -> str:
    done = sum((folder / row["file"]).is_file() for row in steps)
    return f"{done} of {len(steps)} steps are whole in {folder}" + (
        "" if done == len(steps) else "; the same command goes on"
    )


def check_folder(folder: Path, index: dict) -> None:
    if (folder / INDEX).is_file():
        defaults = {field.name: field.default for field in fields(Settings)}  # of newer settings
        old, new = settings_of(folder, INDEX), json.loads(json.dumps(index["settings"]))
        old = {name: defaults.get(name) for name in new} | old
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) != new.get(name):
                shown = [str(x.get(name))[:60] for x in (old, new)]
                raise BadInput(
                    f"{folder} holds samples with another {name} ({shown[0]}, now {shown[1]}):"
                    " another --export"
                )
        if change := corpora.changed(read_json(folder / INDEX).get("data", []), index["data"]):
            raise BadInput(f"{change}; put it back, or another --export than {folder}")
    elif folder.exists() and (
        not folder.is_dir()
        or any(f.name not in (LOCK, INDEX + ".writing") for f in folder.iterdir())
    ):
        raise BadInput(f"--export {folder} is not empty: another folder for the samples")
