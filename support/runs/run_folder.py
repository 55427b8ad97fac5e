"""The output folder of a run: its settings, its metrics, the state to resume from."""

import contextlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save

from support.data import sources
from support.huggingface.checkpoint import not_finite
from support.huggingface.config import read_json
from support.huggingface.hashes import Hashes
from support.runs.analysis import IMPACTFUL
from support.runs.flags import settings_to_resume
from support.runs.settings import difference
from support.system.bad_input import BadInput
from support.system.console import note_on_error
from support.system.signals import signals_wait
from support.system.whole_files import is_fresh, replacing, sync, write_atomically

STATE, METRICS, BATCH = "state.pt", "metrics.jsonl", "skipped_batch.safetensors"
SKIPS = 3  # so many steps in a row without a finite loss and gradient end a run
# settings that --resume may change, because none of them changes what is computed
MAY_DIFFER = ("save_minutes", "keep_stages", "no_saves")
MAY_DIFFER += ("keep_attention", "offload_inputs", "split_mlp")
BEFORE_THE_ANALYSIS = ("top", "min_count")  # may be others as long as they have not been used


class RunFolder:
    """out/run.json (settings, data), out/metrics.jsonl (one line per step), out/state.pt (the last
    complete save)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.data: list[dict] = []  # fingerprints of the run's texts: see check_data
        self.saved_step: int | None = None
        self.skips = {"total": 0, "in_a_row": 0}  # skipped steps: see append_metrics

    # ---- settings ----

    def check_settings(self, settings: dict, resume: bool) -> None:
        """BadInput if the folder holds something else, or a run with other settings."""
        if resume:
            unused = () if (self.path / IMPACTFUL).is_file() else BEFORE_THE_ANALYSIS
            if found := difference(settings_to_resume(self.path), settings, MAY_DIFFER + unused):
                own = "without the flag, --resume takes the run's own"
                raise BadInput(f"{self.path} holds a run with {found}: {own}")
        elif self.finished():
            raise BadInput(f"{self.path} holds a finished run: give another --out, or move it away")
        elif not is_fresh(self.path, "run.json"):
            raise BadInput(f"{self.path} is not empty: give another --out, or --resume to go on")

    def check_data(self, settings, resume: bool) -> None:
        """BadInput that names a text, or the model, that is another one than when the run began
        (an older version did not write that down). Writes nothing; write_settings will."""
        hashes, folder = Hashes(), Path(settings.model)
        original = {"sha256": hashes.of_model(folder), "tokenizer": hashes.of_tokenizer(folder)}
        self.data = [*sources.contents(settings), {"path": settings.model, **original}]
        began = read_json(self.path / "run.json").get("data", []) if resume else []
        if change := sources.changed(began, self.data):
            raise BadInput(f"--resume: {change}; put it back, or begin again in another --out")

    def finished(self) -> bool:
        """Is the run done? Also if it was killed after its result was in place."""
        if not (self.path / "run.json").is_file():
            return False
        done = read_json(self.path / "run.json").get("status") == "done"
        published = (self.path / "config.json").is_file() and not (self.path / STATE).is_file()
        return done or published

    def write_settings(self, settings: dict, **more) -> None:
        run = {"settings": settings, "data": self.data, **more}
        write_atomically(self.path / "run.json", json.dumps(run, indent=2) + "\n")

    # ---- metrics and state ----

    def append_metrics(self, row: dict) -> None:
        """One line a step. A loss or norm that is not finite is null there (JSON has no NaN), and
        the step, which then changed no weight, counts as skipped."""
        bad = {k: None for k in ("loss", "grad_norm") if not math.isfinite(row[k])}
        self.skips["total"] += bool(bad)
        self.skips["in_a_row"] = self.skips["in_a_row"] + 1 if bad else 0
        with open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(row | bad | {"skipped": self.skips["total"]}) + "\n")

    def too_many_skips(self) -> bool:
        return self.skips["in_a_row"] >= SKIPS

    def give_up(self, batch: list[tuple[torch.Tensor, ...]], step: int) -> None:
        """BadInput that says where the last skipped batch is: input_ids, position_ids (B, T)."""
        ids, positions, targets = (torch.cat(parts) for parts in zip(*batch, strict=True))
        with replacing(self.path / BATCH) as file:
            file.write(save({"input_ids": ids, "position_ids": positions, "targets": targets}))
        raise BadInput(
            f"steps {step - SKIPS + 1} to {step} had no finite loss and gradient and changed no"
            f" weight; the last batch is in {self.path / BATCH}: look at it, or"
            " begin again in another --out with a lower --lr"
        )

    def save(self, state: dict) -> None:
        """Write out/state.pt through a second file that is synced and renamed: a kill at any moment
        leaves one complete state; Ctrl-C waits. Raises BadInput for a number that is not finite."""
        with signals_wait():
            if bad := next(not_finite(state), None):
                raise BadInput(f"not saved: {bad} of the state is not finite; lower --lr")
            if (self.path / METRICS).is_file():
                sync(self.path / METRICS)
            try:
                with replacing(self.path / STATE) as file:
                    torch.save(state | {"skips": self.skips}, file)
            except RuntimeError as error:
                if isinstance(error.__context__, OSError):  # torch hides the error of a full disk
                    raise error.__context__ from None
                raise
            self.saved_step = state["step"]

    def load(self) -> dict | None:
        """The saved state (None before the first save). Removes lines of metrics.jsonl after it."""
        if not (self.path / STATE).is_file():
            (self.path / METRICS).unlink(missing_ok=True)
            return None
        # mapped, not read: the masters of an 8B would not fit into memory a second time
        path = self.path / STATE
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError) as error:
            raise BadInput(f"{path} is damaged: {error}") from error
        metrics = self.path / METRICS
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        write_atomically(metrics, "".join(line + "\n" for line in lines[: state["step"]]))
        self.saved_step, self.skips = state["step"], state["skips"]
        return state

    # ---- beginning and end ----

    @contextlib.contextmanager
    def running(self, settings: dict, trainer) -> Iterator[None]:
        """Around the training. Stopped by a signal, or because the program that reads its log has
        ended, it saves first; whatever stops it, the last line says what is saved and which command
        goes on."""
        with note_on_error(self.what_is_saved):
            self.write_settings(settings, status="running")
            try:
                yield
            except (KeyboardInterrupt, BrokenPipeError):  # the second: nobody reads the log now
                with signals_wait():  # a second Ctrl-C does not cost the save
                    if trainer.step > (self.saved_step or 0) and not self.finished():
                        trainer.save()
                raise

    def what_is_saved(self) -> str:
        command = f"python train.py --resume --out {self.path}"
        if self.finished():
            return f"the result is complete in {self.path}"
        if self.saved_step is None:
            return f"nothing is saved yet; to begin again: {command}"
        state = self.path / STATE
        return f"saved up to step {self.saved_step} in {state}; to go on: {command}"

    def publish(self, folder: Path) -> None:
        """Move a finished model folder's files into the run folder; config.json last, as the sign
        of done."""
        with signals_wait():
            for file in sorted(folder.iterdir(), key=lambda f: f.name == "config.json"):
                os.replace(file, self.path / file.name)
            shutil.rmtree(folder)
            sync(self.path)
            for name in (STATE, STATE + ".writing"):  # the second is left by an interrupted save
                (self.path / name).unlink(missing_ok=True)
