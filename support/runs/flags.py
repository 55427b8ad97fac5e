"""Flags that are fields of a dataclass, from the command line, from out/run.json or both; and what
later commands read from there."""

import argparse
import dataclasses
import os
from pathlib import Path

from support.data.sources import is_toy_model
from support.huggingface.config import read_json
from support.system.bad_input import BadInput
from support.system.console import log

# flags that say where a run goes and what is done; out/run.json does not hold them
NO_SETTINGS = ("out", "resume", "plan", "export", "attention")
# settings that --resume may change, because none of them changes a bit of the result
MAY_DIFFER = ("save_minutes", "keep_stages", "no_saves", "keep_attention", "offload_inputs")
MAY_DIFFER += ("split_mlp",)
BEFORE_THE_ANALYSIS = ("top", "min_count")  # may be others as long as they have not been used
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

    def __init__(self, prog: str, doc: str, **more):
        more |= {"formatter_class": Help}
        super().__init__(prog=prog, description=doc.split("\n")[0], **more)

    def error(self, message: str) -> None:
        raise BadInput(f"{message} (--help)")


# ---- a dataclass as a command line -------------------------------------------------------------


def flag(default, meaning: str, group: str = "", derived: str = "", **options):
    """A field of a dataclass that is a flag too.

    meaning: its help text; group: the heading in --help of this field and those after it; derived:
    in words, the value if the flag is not given and the default does not say it; options: passed
    to argparse's add_argument."""
    about = {"meaning": meaning, "group": group, "derived": derived, "options": options}
    return dataclasses.field(default=default, metadata=about)


def add_flags(p: argparse.ArgumentParser, fields: list[dataclasses.Field], choices: dict) -> None:
    """Every field becomes a flag, which is None where it is not given."""
    group = p
    for field in fields:
        about = field.metadata
        if about["group"]:
            group = p.add_argument_group(about["group"])
        default = about["derived"] or field.default
        shown = "" if default is None or default is False else f" (default: {default})"
        options = {"default": None, **KINDS.get(field.type, {}), **about["options"]}
        if field.name in choices:
            options["choices"] = choices[field.name]
        group.add_argument(f"--{field.name}", help=about["meaning"] + shown, **options)


def parse_or_resume(
    prog: str,
    doc: str,
    argv: list[str] | None,
    classes: tuple[type, ...],
    toy: dict,
    choices: dict[str, tuple[str, ...]],
) -> dict:
    """The flags that have a value: name -> value.

    The flags are the fields of `classes`; choices: flag -> allowed values, if its field does not
    name them. Flags missing from the command line are taken from the run (--resume), or from `toy`
    for the toy model (no --model, or its folder, however written). Raises BadInput for a flag that
    the run to be resumed, made by an older version, cannot have had."""
    fields = [field for cls in classes for field in dataclasses.fields(cls)]
    defaults = {field.name: field.default for field in fields}
    p = Parser(prog, doc)
    add_flags(p, fields, choices)
    p.epilog = "Without --model, for the toy: " + " ".join(
        f"--{k}" if v is True else f"--{k} {v}" for k, v in toy.items() if k != "model"
    )
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if v is not None}
    before = {}
    if given.get("resume"):
        before = settings_to_resume(Path(given.get("out", defaults["out"])))
        for name in sorted(given.keys() - before.keys() - {*NO_SETTINGS, *MAY_DIFFER}):
            if given[name] != defaults[name]:
                raise BadInput(
                    f"--resume with --{name}: the run was begun by a version without that flag, and"
                    " goes on only without it"
                )
    elif is_toy_model(given.get("model", toy["model"])):
        before, given = toy, given | {"model": toy["model"]}
    known = {k: v for k, v in before.items() if k in defaults and v is not None}
    return known | given


def as_kept(*parts) -> dict:
    """The fields of these dataclasses as a JSON file of the run keeps them, with absolute paths: a
    run can be resumed from any folder."""
    kept = {k: v for part in parts for k, v in dataclasses.asdict(part).items()}
    kept = {k: v for k, v in kept.items() if k not in NO_SETTINGS}
    return with_absolute_paths(kept)


def with_absolute_paths(settings: dict) -> dict:
    """BadInput for a path that no file can have: half a surrogate pair, or a zero byte."""

    def absolute(value):
        if isinstance(value, list):
            return [absolute(v) for v in value]
        if not isinstance(value, str):
            return value
        try:
            valid = b"\0" not in os.fsencode(value)
        except UnicodeEncodeError:
            valid = False
        if not valid:
            raise BadInput(f"no file can have the path {ascii(value)}")
        return os.path.abspath(value)

    return settings | {name: absolute(settings[name]) for name in PATHS if name in settings}


# ---- what a run has left -----------------------------------------------------------------------


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


def check_same(before: dict, now: dict, may_differ: tuple[str, ...] = MAY_DIFFER) -> None:
    """BadInput that names a setting with another value, if it matters to the result. Both as they
    are kept: see as_kept."""
    for name in sorted(before):  # flags newer than the run: see parse_or_resume
        old, new = before.get(name), now.get(name)
        if name not in may_differ and old != new:
            raise BadInput(
                f"--resume with another --{name}: the run has {old!r}, now {new!r}; without the"
                " flag the run's own is taken"
            )


def base_of_run(folder: str | Path) -> list[str]:
    """The model that train.py extended into this folder, or nothing where that cannot be told."""
    base = settings_of(folder).get("model") if (Path(folder) / "run.json").is_file() else None
    if not isinstance(base, str):
        return []
    base = os.path.relpath(base) if Path(base).is_relative_to(Path.cwd()) else base
    if not Path(base).is_dir():
        log(f"{base}, which the run began with, is not a folder here; --compare DIR for another")
        return []
    return [base]
