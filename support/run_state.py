"""The output folder of a run: its settings, its metrics, the state to resume from."""

import argparse
import contextlib
import json
import os
import shutil
from pathlib import Path

import torch

from support.cli import log, on_ctrl_c
from support.config_files import read_json

STATE = "state.pt"
NO_SETTINGS = (
    "resume",
    "out",
    "device",
    "plan",
)  # flags that say where and how, not what is trained
# settings that may be others after --resume: none of them changes a bit of the result
MAY_DIFFER = ("save_minutes", "keep_stages", "no_saves", "keep_attention", "offload_inputs")


def parse_or_resume(
    p: argparse.ArgumentParser, argv: list[str] | None, toy: dict
) -> argparse.Namespace:
    """The flags. Those that the command line does not give are, with --resume, the run's own, and
    for the toy model (no --model, or its folder however written) the toy's."""
    args = p.parse_args(argv)
    is_toy = args.model is None or Path(args.model).resolve() == Path(toy["model"]).resolve()
    if args.resume:
        before = RunFolder(args.out).settings()
        p.set_defaults(**{k: v for k, v in before.items() if k in vars(args)})
    elif is_toy:
        p.set_defaults(**toy)
    args = p.parse_args(argv)
    if is_toy and not args.resume:
        args.model = toy["model"]
    return args


class RunFolder:
    """out/run.json (settings), out/metrics.jsonl (one line per step), out/state.pt (the last
    complete save)."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.saved_step: int | None = None

    def settings(self) -> dict:
        """What write_settings wrote; ValueError if there is no run."""
        if not (self.path / "run.json").is_file():
            raise ValueError(f"nothing to resume: {self.path / 'run.json'} does not exist (--out)")
        settings = read_json(self.path / "run.json").get("settings")
        if not isinstance(settings, dict) or not isinstance(settings.get("model"), str):
            raise ValueError(f"{self.path / 'run.json'} holds no settings of a run (--out)")
        return settings

    def check(self, settings: dict, resume: bool) -> None:
        """ValueError if the folder holds something else, or a run with other settings. Writes
        nothing."""
        if not resume:
            if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
                raise ValueError(
                    f"output folder {self.path} is not empty: another --out, or --resume to go on"
                )
            return
        before = self.settings()
        for name in sorted(before.keys() | settings.keys()):
            if name not in MAY_DIFFER and before.get(name) != settings.get(name):
                raise ValueError(
                    f"--resume with another --{name}: the run has {before.get(name)!r}, now"
                    f" {settings.get(name)!r}; without the flag the run's own is taken"
                )

    def finished(self) -> bool:
        """Done, or killed after the result was in place."""
        if not (self.path / "run.json").is_file():
            return False
        done = read_json(self.path / "run.json").get("status") == "done"
        published = (self.path / "config.json").is_file() and not (self.path / STATE).is_file()
        return done or published

    def write_settings(self, settings: dict, **more) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        write_atomically(
            self.path / "run.json", json.dumps({"settings": settings, **more}, indent=2) + "\n"
        )

    def write_impactful(self, types: dict[int, list]) -> None:
        """out/impactful.json: token id -> [text, mean shift in logits], largest first."""
        text = json.dumps(types, ensure_ascii=False, indent=0)
        write_atomically(self.path / "impactful.json", text + "\n")

    def append_metrics(self, row: dict) -> None:
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def save(self, state: dict) -> None:
        """Written beside and renamed: a kill at any moment leaves one complete state."""
        beside = self.path / (STATE + ".writing")
        with open(beside, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path / STATE)
        self.saved_step = state["step"]

    def load(self) -> dict | None:
        """The saved state (None before the first save). Lines of metrics.jsonl that came after it
        go."""
        if not (self.path / STATE).is_file():
            (self.path / "metrics.jsonl").unlink(missing_ok=True)
            return None
        # mapped, not read: the masters of an 8B would not fit into memory a second time
        options = {"map_location": "cpu", "weights_only": True, "mmap": True}
        state = torch.load(self.path / STATE, **options)
        metrics = self.path / "metrics.jsonl"
        lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.is_file() else []
        kept = lines[: state["step"]]
        write_atomically(metrics, "".join(line + "\n" for line in kept))
        self.saved_step = state["step"]
        return state

    def resumable(self) -> contextlib.AbstractContextManager:
        """Around the training: Ctrl-C says what is saved and which command goes on."""
        return on_ctrl_c(self.what_is_saved)

    def what_is_saved(self) -> str:
        command = f"python train.py --resume --out {self.path}"
        if self.saved_step is None:
            return f"nothing is saved yet (--save_minutes); to begin again: {command}"
        state = self.path / STATE
        return f"saved up to step {self.saved_step} in {state}; to go on: {command}"

    def publish(self, folder: Path) -> None:
        """Move a finished model folder's files into the run folder; config.json last, as the sign
        of done."""
        for file in sorted(folder.iterdir(), key=lambda f: f.name == "config.json"):
            os.replace(file, self.path / file.name)
        shutil.rmtree(folder)
        for name in (STATE, STATE + ".writing"):  # the latter from a save that was cut off
            (self.path / name).unlink(missing_ok=True)


def base_of_run(folder: str | Path) -> list[str]:
    """The model that train.py extended into this folder, or nothing where that cannot be told."""
    run = Path(folder) / "run.json"
    base = (read_json(run).get("settings") or {}).get("model") if run.is_file() else None
    if isinstance(base, str) and not Path(base).is_dir():
        log(f"{base}, which the run began with, is no folder here; --compare DIR for another")
        return []
    return [base] if isinstance(base, str) else []


def read_impactful(path: str | Path, vocab_size: int) -> torch.Tensor:
    """The table of an earlier analysis (impactful.json: token id -> ...), bool (V,)."""
    if not Path(path).is_file():
        raise ValueError(f"--impactful {path} does not exist (an impactful.json of a run)")
    names = list(read_json(Path(path)))
    if not all(name.isdecimal() for name in names):
        raise ValueError(f"{path} is no impactful.json of a run (--impactful)")
    types = torch.tensor([int(name) for name in names])
    if len(types) == 0 or types.min() < 0 or types.max() >= vocab_size:
        raise ValueError(f"{path} names no token types of this vocabulary (--impactful)")
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, types, True)


def write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".writing")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)
