"""--template: a task in the user's own words, and the grid that the flags leave open."""

import dataclasses
from pathlib import Path

from support.huggingface.config import read_json
from support.system.bad_input import BadInput
from support.system.console import check_ranges, log

LISTS = {"keys": ("uuids",), "values": ("numbers", "uuids")}  # or a list of words
WORDING = ("intro", "needle", "question", "answer", *LISTS)  # of every task of the run
OF_TASK = {"needles": int, "ask": str, "answer_tokens": int}  # of the template's own task
OF_RUN = {"task": str, "n": int, "n_beyond": int, "haystack": str}
KINDS = dict.fromkeys(WORDING, str) | dict.fromkeys(LISTS, list) | OF_TASK | OF_RUN
ASK = ("first", "all", "each")


def read_template(path: Path) -> dict:
    """A template file, JSON -> its fields. ValueError names a field that is unknown, of the wrong
    type, or has other braces than {key} and {value}."""
    fields = read_json(path)
    for name, value in fields.items():
        kind = KINDS.get(name)
        if kind is None:
            raise BadInput(f"{path}: unknown field {name!r}; {', '.join(KINDS)}")
        if name in LISTS and value in LISTS[name]:
            continue
        if type(value) is not kind or (kind is int and value < 1):
            raise BadInput(f"{path}: {name} is {value!r}, wanted: {kind.__name__}")
        if kind is list:
            check_words(f"{path}: {name}", value)
        if name in WORDING and kind is str:
            try:
                value.format(key="", value="")
            except (LookupError, ValueError, AttributeError):
                raise BadInput(
                    f"{path}: {name}: only {{key}} and {{value}} may be in braces"
                ) from None
    if fields.get("ask", "all") not in ASK:
        raise BadInput(f"{path}: ask {fields['ask']!r} is none of {', '.join(ASK)}")
    return fields


def check_words(where: str, words: list) -> None:
    if not (words and all(isinstance(x, str) and x for x in words)):
        raise BadInput(f"{where} must be a list of words")
    if len(set(words)) < len(words):
        raise BadInput(f"{where} holds a word twice")
    if where.endswith("values"):  # they are searched in the answer
        low = sorted((x.lower() for x in words), key=len)
        for i, x in enumerate(low):
            if inside := [y for y in low[i + 1 :] if x in y]:
                raise BadInput(f"{where}: {x!r} is part of {inside[0]!r}")


def check_task(name: str, task) -> None:
    """ValueError if the wording cannot tell the needles of this task apart."""
    many = (task.needles > 1 and not task.one_key) or task.haystack == "needles"
    if "{value}" not in task.needle or (many and "{key}" not in task.needle):
        raise BadInput(f"{name}: needle must hold {{key}} and {{value}}")
    if "{key}" in task.needle and "{key}" not in task.question + task.answer:
        raise BadInput(f"{name}: neither question nor answer holds {{key}}")
    keys = 1 if task.one_key or task.haystack == "needles" else task.needles
    if not isinstance(task.keys, str) and len(task.keys) < keys:
        raise BadInput(f"{name} has {task.needles} needles, but only {len(task.keys)} keys")


def resolve_tasks(args, known: dict) -> tuple[dict, dict]:
    """(all known tasks in the wording of the template, the template's fields); args.tasks is
    filled in. The wording is for every task; what is of a task (OF_TASK, and the haystacks
    "noise" and "needles") is for the one that the template names, or for all if it names none."""
    path = Path(args.template or Path(args.model) / "needle.json")
    fields = read_template(path) if args.template or path.is_file() else {}
    own = fields.get("task")
    if own is not None and own not in known:
        raise BadInput(f"{path}: task {own!r} is none of {', '.join(known)}")
    args.tasks = [own or "niah_single"] if args.tasks is None else list(dict.fromkeys(args.tasks))
    wording = {k: tuple(v) if k in LISTS and isinstance(v, list) else v for k, v in fields.items()}
    more = {k: v for k, v in wording.items() if k in OF_TASK}
    if fields.get("haystack") in ("noise", "needles"):
        more["haystack"] = fields["haystack"]
    wording = {k: v for k, v in wording.items() if k in WORDING}
    tasks = {}
    for name, task in known.items():
        tasks[name] = dataclasses.replace(task, **wording)
        if own in (None, name):
            tasks[name] = dataclasses.replace(tasks[name], **more)
    for name in args.tasks:
        check_task(name, tasks[name])
        if more and own not in (None, name):
            log(f"{path}: {', '.join(more)} of its task {own} are not for --tasks {name}")
    return tasks, fields | {"path": path}


def resolve_grid(args, fields: dict, tasks: dict, windows: list[int]) -> None:
    """Fill in what the flags leave open: haystack, n, n_beyond, lengths, depths. windows: of all
    models judged."""
    each = [name for name in args.tasks if tasks[name].ask == "each"]
    if args.depths is not None and each:
        log(f"--depths is not for {', '.join(each)}: the needles divide the text among them")
    args.depths = [0.0, 0.25, 0.5, 0.75, 1.0] if args.depths is None else args.depths
    haystack = fields.get("haystack")
    if args.haystack is None and haystack not in (None, "noise", "needles"):
        beside = fields["path"].parent / haystack
        args.haystack = str(beside) if beside.exists() else haystack
    args.n = fields.get("n", 2) if args.n is None else args.n
    if args.n_beyond is None:
        args.n_beyond = fields.get("n_beyond", args.n)
    new = max(windows)
    args.lengths = sorted(set(args.lengths or [min(windows), new // 4, new // 2, new]))
    args.depths = sorted(set(args.depths))
    check_ranges(args, at_least_1=("n", "n_beyond"), seed=("seed",))
    if not args.tasks and not args.ppl:
        raise BadInput("--tasks without a name wants --ppl: else there is nothing to run")
    if args.lengths[0] < 2:
        raise BadInput(f"--lengths {args.lengths[0]} must be at least 2 tokens")
    if outside := [d for d in args.depths if not 0 <= d <= 1]:
        raise BadInput(f"--depths {outside[0]:g} must be within 0..1")
