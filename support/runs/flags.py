"""Flags that are fields of a dataclass; and settings as the JSON files of a run keep them."""

import argparse
import dataclasses
import os
from pathlib import Path

from support.huggingface.config import read_json
from support.system.bad_input import BadInput
from support.system.console import log

# flags that say where a run goes and what is done; out/run.json does not hold them
NO_SETTINGS = ("out", "resume", "plan", "export", "attention")
PATHS = ("model", "extended", "impactful", "data", "replay_data")  # settings that are paths
KINDS = {  # type of a field -> what argparse has to know of it
    int: {"type": int, "metavar": "N"},
    float: {"type": float, "metavar": "X"},
    bool: {"action": argparse.BooleanOptionalAction},
}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows every default but None and False, which the help text explains."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        said = action.default is None or action.default is False
        return action.help if said else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """--help shows the defaults; errors are raised as BadInput, like all others."""

    def __init__(self, prog: str, doc: str):
        super().__init__(prog=prog, description=doc.split("\n")[0], formatter_class=Help)

    def error(self, message: str) -> None:
        raise BadInput(f"{message} (--help)")


# ---- a dataclass as a command line -------------------------------------------------------------


def flag(default, meaning: str, group: str = "", **options):
    """A field of a dataclass that is a flag too.

    meaning: its help text, with "(default: ...)" where the default has to be told in words; group:
    the heading in --help of this field and those after it; options: of argparse's add_argument."""
    about = {"meaning": meaning, "group": group, "options": options}
    return dataclasses.field(default=default, metadata=about)


def add_flags(p: argparse.ArgumentParser, fields: list[dataclasses.Field], choices: dict) -> None:
    """Every field becomes a flag; what is not given, the parsed arguments do not have. choices:
    flag -> allowed values, if its field does not name them."""
    group = p
    for field in fields:
        if heading := field.metadata["group"]:
            group = p.add_argument_group(heading)
        meaning, default = field.metadata["meaning"], field.default
        if "(default: " not in meaning and default is not None and default is not False:
            meaning += f" (default: {default})"
        options = KINDS.get(field.type, {}) | field.metadata["options"]
        if field.name in choices:
            options = options | {"choices": choices[field.name]}
        group.add_argument(f"--{field.name}", help=meaning, default=argparse.SUPPRESS, **options)


# ---- settings in the JSON files of a run -------------------------------------------------------


def as_kept(*parts) -> dict:
    """The fields of these dataclasses as a JSON file of the run keeps them, with absolute paths: a
    run can be resumed from any folder."""
    kept = {k: v for part in parts for k, v in dataclasses.asdict(part).items()}
    return with_absolute_paths({k: v for k, v in kept.items() if k not in NO_SETTINGS})


def with_absolute_paths(settings: dict) -> dict:
    """BadInput for a path that no file can have: half a surrogate pair, or a zero byte."""

    def absolute(value):
        if isinstance(value, list):
            return [absolute(v) for v in value]
        if not isinstance(value, str):
            return value
        try:
            os.lstat(value)
        except OSError:  # it need not exist
            pass
        except ValueError as error:
            raise BadInput(f"no file can have the path {value!a}") from error
        return os.path.abspath(value)

    return settings | {name: absolute(settings[name]) for name in PATHS if name in settings}


def settings_of(folder: str | Path, file: str = "run.json") -> dict:
    """The settings in a folder's run.json, {} where it holds none. (The relative paths of recorded
    runs lead from the current folder.)"""
    settings = read_json(Path(folder) / file).get("settings")
    return with_absolute_paths(settings) if isinstance(settings, dict) else {}


def settings_to_resume(folder: Path) -> dict:
    """The settings of the run in `folder`. Raises BadInput if it holds none."""
    if not (folder / "run.json").is_file():
        raise BadInput(f"nothing to resume: {folder / 'run.json'} does not exist (--out)")
    settings = settings_of(folder)
    if not isinstance(settings.get("model"), str):
        raise BadInput(f"{folder / 'run.json'} holds no settings of a run (--out)")
    return settings


def original_of_run(folder: str | Path) -> list[str]:
    """The model that train.py extended into this folder, or nothing where that cannot be told."""
    path = settings_of(folder).get("model") if (Path(folder) / "run.json").is_file() else None
    if not isinstance(path, str):
        return []
    path = os.path.relpath(path) if Path(path).is_relative_to(Path.cwd()) else path
    if not Path(path).is_dir():
        log(f"{path}, which the run began with, is not a folder here; --compare DIR for another")
        return []
    return [path]
