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
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from support.data import sources
from support.data.text import Corpus
from support.huggingface.config import read_json
from support.runs.flags import as_kept, settings_of
from support.runs.settings import difference, plan_stages
from support.system.bad_input import BadInput
from support.system.console import log, note_on_error, progress, provenance
from support.system.whole_files import is_fresh, only_writer, replacing, write_atomically

INDEX = "samples.json"
# settings of train.py that change no sample and say nothing an engine should know
OTHER = ("dtype", "optimizer", "keep_attention", "offload_inputs", "split_mlp")
OTHER += ("analysis_samples", "log_softmax", "rebased_analysis", "top", "min_count")


def check_exportable(settings, options) -> None:
    """BadInput for flags of train.py that leave open which samples it would see."""
    if options.resume or options.plan:
        raise BadInput("--export goes with neither --resume nor --plan")
    if settings.analyses:
        raise BadInput(
            "--export with --select impact needs the impactful types beforehand: give the"
            " --impactful FILE that train.py with the same flags leaves in its --out after the"
            " analysis, and its --probe_steps; or --select random"
        )


def write_samples(
    settings,
    folder: str | Path,
    tokenizer,
    texts: tuple[Corpus, Corpus],
    impactful: Tensor | None,
    learning_rate: Callable[..., float],
    draw: Callable[..., Iterable[tuple[Tensor, Tensor]]],
) -> None:
    """texts: of the extension and of the replay; learning_rate, draw: those of train.py. BadInput
    if the folder holds anything else than samples of these settings and texts."""
    folder, started = Path(folder), time.time()
    kept = {k: v for k, v in as_kept(settings).items() if k not in OTHER}
    kept["impactful_types"] = None if impactful is None else impactful.nonzero()[:, 0].tolist()
    kept["data_tokens"] = [text.tokens for text in texts]
    kept["rope_scaling"] = settings.new_scaling
    index = {"settings": kept, "data": sources.contents(settings), "steps": []}
    stages = [(stage, i) for stage in plan_stages(settings) for i in range(stage.steps)]
    for step, (stage, i) in enumerate(stages):
        row = {"file": f"step_{step:05d}.safetensors", "stage": stage.name}
        row |= {"samples": settings.batch_sequences, "tokens": stage.tokens}
        row["lr"] = learning_rate(stage, i, settings.warmup_steps, step - i)
        index["steps"].append(row)
    files = [folder / row["file"] for row in index["steps"]]

    def whole() -> str:
        done = sum(file.is_file() for file in files)
        more = "" if done == len(files) else "; the same command goes on"
        return f"{done} of {len(files)} steps are whole in {folder}{more}"

    def write_index(**more) -> None:
        write_atomically(folder / INDEX, json.dumps(index | more, indent=1) + "\n")

    with only_writer(folder):
        status = status_of(folder, index)
        with note_on_error(whole):
            if status is None:
                write_index(status="running")
            for step, file in enumerate(progress(files, "export", unit="step")):
                if file.is_file():
                    continue
                stage, _ = stages[step]
                text = texts[stage.name == "replay"]
                samples = draw(stage, step, text, tokenizer, settings, impactful)
                ids, positions = (torch.stack(part).int() for part in zip(*samples, strict=True))
                with replacing(file) as stream:
                    stream.write(save({"input_ids": ids, "position_ids": positions}))
            if status != "done":
                write_index(status="done", **provenance(started))
    log(f"{whole()}; format: support/runs/export.py")


def status_of(folder: Path, index: dict) -> str | None:
    """ "running" or "done", None for a new folder. BadInput if it holds anything else than samples
    with such an index."""
    if not (folder / INDEX).is_file():
        if not is_fresh(folder, INDEX):
            raise BadInput(f"--export {folder} is not empty: give another folder")
        return None
    begun = read_json(folder / INDEX)
    if found := difference(settings_of(folder, INDEX), index["settings"]):
        raise BadInput(f"{folder} holds samples with {found}: give another --export")
    if change := sources.changed(begun.get("data", []), index["data"]):
        raise BadInput(f"{change}; put it back, or give another --export than {folder}")
    return begun["status"]
