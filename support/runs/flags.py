"""The settings of a run: flags from the command line, from out/run.json or both; and what later
commands read from there."""

import argparse
import os
from pathlib import Path

import torch

from support.huggingface.config import read_json
from support.system.bad_input import BadInput
from support.system.console import log

# flags that say where and how, not what is trained
NO_SETTINGS = ("resume", "out", "device", "plan", "export")
# settings that may be others after --resume: none of them changes a bit of the result
MAY_DIFFER = ("save_minutes", "keep_stages", "no_saves", "keep_attention", "offload_inputs")
PATHS = ("model", "extended", "impactful", "data", "replay_data")  # settings that are paths


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """A default of None or False says nothing that the help does not."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """--help shows the defaults; what is refused goes through report_errors as any other error."""

    def __init__(self, prog: str, doc: str, **more):
        more |= {"formatter_class": Help}
        super().__init__(prog=prog, description=doc.split("\n")[0], **more)

    def error(self, message: str) -> None:
        raise BadInput(f"{message} (--help)")


def parse_or_resume(
    p: argparse.ArgumentParser, argv: list[str] | None, toy: dict
) -> argparse.Namespace:
    """The flags. Those that the command line does not give are, with --resume, the run's own, and
    for the toy model (no --model, or its folder however written) the toy's. ValueError for a flag
    that a run of an older version, to be resumed, cannot have been begun with."""
    p.epilog = "Without --model, for the toy: " + " ".join(
        f"--{k}" if v is True else f"--{k} {v}" for k, v in toy.items() if k != "model"
    )
    args = p.parse_args(argv)
    if args.resume:
        before = settings_to_resume(Path(args.out))
        for name in sorted(vars(args).keys() - before.keys() - {*NO_SETTINGS, *MAY_DIFFER}):
            if getattr(args, name) != p.get_default(name):
                raise BadInput(
                    f"--resume with --{name}: the run was begun by a version without that flag, and"
                    " goes on only without it"
                )
        p.set_defaults(**{k: v for k, v in before.items() if k in vars(args)})
    elif is_toy(args.model, toy):
        p.set_defaults(**toy)
    args = p.parse_args(argv)
    if is_toy(args.model, toy):
        args.model = toy["model"]
    return args


def is_toy(model: str | None, toy: dict) -> bool:
    return model is None or Path(model).resolve() == Path(toy["model"]).resolve()


def started_in(folder: str | Path) -> str:
    """From where the relative paths of a run lead: this folder, itself relative to the run's."""
    return os.path.relpath(Path.cwd(), os.path.realpath(folder))


def settings_of(folder: str | Path, file: str = "run.json") -> dict:
    """The settings in a folder's run.json ({} where it holds none), relative paths as seen from
    here, wherever the run was started."""
    run = read_json(Path(folder) / file)
    settings, start = run.get("settings"), run.get("started_in")
    if not isinstance(settings, dict):
        return {}
    if isinstance(start, str):
        there = os.path.normpath(os.path.join(os.path.realpath(folder), start))
        if there != os.path.realpath(Path.cwd()):
            paths = {name: settings[name] for name in PATHS if name in settings}
            settings |= {name: map_paths(from_folder(there), p) for name, p in paths.items()}
    return settings


def settings_to_resume(folder: Path) -> dict:
    """ValueError if there is no run to go on with."""
    if not (folder / "run.json").is_file():
        raise BadInput(f"nothing to resume: {folder / 'run.json'} does not exist (--out)")
    settings = settings_of(folder)
    if not isinstance(settings.get("model"), str):
        raise BadInput(f"{folder / 'run.json'} holds no settings of a run (--out)")
    return settings


def check_same(before: dict, now: dict) -> None:
    """ValueError that names a setting with another value, if it matters to the result."""
    for name in sorted(before):  # a flag that came later than the run: see parse_or_resume
        old, new = before.get(name), now.get(name)
        if name not in MAY_DIFFER and not same(name, old, new):
            raise BadInput(
                f"--resume with another --{name}: the run has {old!r}, now {new!r}; without the"
                " flag the run's own is taken"
            )


def same(name: str, old, new) -> bool:
    """Paths are the same if they lead to the same place, however they are written."""
    if name in PATHS:
        old, new = (map_paths(os.path.realpath, value) for value in (old, new))
    return old == new


def map_paths(change, value):
    """`change` on a path or on each of a list of them; anything else (None) as it is."""
    if isinstance(value, list):
        return [map_paths(change, v) for v in value]
    return change(value) if isinstance(value, str) else value


def from_folder(folder: str):
    """A function that turns a path as seen from `folder` into the same path as seen from here."""
    return lambda p: p if os.path.isabs(p) else os.path.relpath(os.path.join(folder, p))


def base_of_run(folder: str | Path) -> list[str]:
    """The model that train.py extended into this folder, or nothing where that cannot be told."""
    base = settings_of(folder).get("model") if (Path(folder) / "run.json").is_file() else None
    if isinstance(base, str) and not Path(base).is_dir():
        log(f"{base}, which the run began with, is no folder here; --compare DIR for another")
        return []
    return [base] if isinstance(base, str) else []


def read_impactful(path: str | Path, vocab_size: int) -> torch.Tensor:
    """The table of an earlier analysis (impactful.json: token id -> ...), bool (V,)."""
    if not Path(path).is_file():
        raise BadInput(f"--impactful {path} does not exist (an impactful.json of a run)")
    names = list(read_json(Path(path)))
    if not all(name.isdecimal() and len(name) < 10 for name in names):
        raise BadInput(f"{path} is no impactful.json of a run (--impactful)")
    types = torch.tensor([int(name) for name in names])
    if len(types) == 0 or types.min() < 0 or types.max() >= vocab_size:
        raise BadInput(f"{path} names no token types of this vocabulary (--impactful)")
    return torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, types, True)
