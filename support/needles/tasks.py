"""The tasks of the evaluation, in one table: what is hidden, what is asked, in which words; and
--template, which puts a task into the user's own words.

The axes (haystack, keys, values, queries) and the structure are those of RULER (Hsieh et al.,
2404.06654); the wording is ours. An entry of TASKS holds the fields of an eval_needle.Task that
differ from its defaults; `hide` is a function for tasks that hide something else than pairs."""

import dataclasses
import re
from pathlib import Path

import torch

from support.huggingface.config import read_json
from support.needles.haystack import (
    CITIES,
    MADE_UP,
    Hidden,
    fold,
    is_word_of,
    listed,
    pick_many,
    pick_needles,
    pick_words,
)
from support.system.bad_input import BadInput
from support.system.console import log


def hide_pairs(task, haystack, length: int, rng) -> Hidden:
    """Pairs of a key and a value, neither of which occurs in the haystack."""
    tokenizer, wanted = haystack.tokenizer, 1 if task.one_key else task.needles
    if task.haystack == "needles":
        keys, values, ids = pick_needles(task, wanted, length, tokenizer, rng)
        hay = torch.tensor(ids)
    else:
        keys = pick_words(task.keys, wanted, rng)
        values = pick_words(task.values, task.needles, rng, haystack.text)
        hay = haystack.cut(length, rng)
    text = fold(tokenizer.decode(hay.tolist()))
    if any(is_word_of(key, text) for key in keys):
        keys = pick_words([key for key in task.keys if not is_word_of(key, text)], wanted, rng)
    found = [key for key in keys if is_word_of(key, text)] + [v for v in values if fold(v) in text]
    assert not found, f"the haystack holds {found}"
    named = keys * task.needles if task.one_key else keys
    needles = [task.needle.format(key=k, value=v) for k, v in zip(named, values, strict=True)]
    asked, expected = ASK[task.ask](keys, values)
    questions = [(task.question + task.answer).format(key=key, value="") for key in asked]
    return Hidden(hay, needles, questions, expected)


# Each returns (what to call the keys in each question, the answers to each question).
def ask_first(keys: list[str], values: list[str]) -> tuple[list[str], list[list[str]]]:
    return keys[:1], [values[:1]]


def ask_each(keys: list[str], values: list[str]) -> tuple[list[str], list[list[str]]]:
    return keys, [[value] for value in values]


def ask_all(keys: list[str], values: list[str]) -> tuple[list[str], list[list[str]]]:
    return [listed(keys)], [values]


ASK = {"first": ask_first, "each": ask_each, "all": ask_all}


def hide_chain(task, haystack, length: int, rng) -> Hidden:
    """RULER's variable tracking: the first variable gets a number, each other one the value of the
    variable before it. All that hold the number are asked for."""
    (number,) = pick_words(task.values, 1, rng, haystack.text)
    names = pick_words(task.keys, task.needles, rng, haystack.text)
    values = [number, *(f"VAR {name}" for name in names)]
    needles = [task.needle.format(key=k, value=v) for k, v in zip(names, values[:-1], strict=True)]
    question = (task.question + task.answer).format(key="", value=number)
    return Hidden(haystack.cut(length, rng), needles, [question], [names])


def hide_common_words(task, haystack, length: int, rng) -> Hidden:
    """RULER's common words extraction: the haystack is a numbered list in which ten words come up
    to ten times as often (30 times) as all others (3 times). The words are the haystack's."""
    vocabulary = sorted(set(re.findall("[a-z]{4,12}", haystack.text))) or CITIES
    words, ids = pick_many(vocabulary, 10 + length // 6, rng), []
    entries = length // 2  # more than fit, at first
    while not length <= len(ids) < 1.1 * length:
        entries = int(entries * 1.05 * length / len(ids)) if ids else entries
        times = min(10, entries // 60)  # the common words are half of a short list
        if times < 4:
            raise BadInput(f"--lengths {length} is too short for a list of common words")
        listing = 3 * (times * words[:10] + words[10 : entries // 3 - 10 * times + 10])
        rng.shuffle(listing)
        text = " ".join(f"{i}. {word}" for i, word in enumerate(listing, 1))
        ids = haystack.tokenizer.encode(text, continued=True)
    question = (task.question + task.answer).format(key="", value="")
    return Hidden(torch.tensor(ids[:length]), [], [question], [words[:10]])


ALL = {
    "ask": "all",
    "question": "\n\nWhat are all the special magic numbers for {key} that the text mentions?",
    "answer": " The special magic numbers for {key} are:",
}
TASKS = {
    "passkey": {
        "haystack": "noise",
        "intro": "A pass key is hidden in the text below. Remember it.\n\n",
        "needle": "The pass key is {value}. Remember it: {value} is the pass key.",
        "question": "\n\nWhat is the pass key that the text above mentions?",
        "answer": " The pass key is",
    },
    "niah_single": {},
    "multikey": {"needles": 4},
    "multikey_hard": {"haystack": "needles"},
    "multivalue": {"needles": 4, "one_key": True, **ALL},
    "multiquery": {"needles": 4, **ALL},
    # not in RULER: eight questions in turn about one text, so that one prefill serves them all
    "needles_8": {"needles": 8, "ask": "each"},
    "variable_tracking": {
        "hide": hide_chain,
        "needles": 5,
        "ask": "all",
        "in_order": True,
        "intro": "Variables are set in the text below. Keep track of their values.\n\n",
        "needle": "VAR {key} = {value}.",
        "question": "\n\nWhich variables have the value {value} at the end of the text above?",
        "answer": " The variables with the value {value} are:",
        "keys": "letters",
    },
    "common_words": {
        "hide": hide_common_words,
        "needles": 0,
        "ask": "all",
        "intro": "Some words of the list below come more often than others.\n\n",
        "question": "\n\nWhich ten words come most often in the list above?",
        "answer": " The ten words that come most often are:",
    },
}
NIAH_M = ("multikey", "multivalue", "multiquery")  # the paper's NIAH(M) is their mean

# ---- templates ---------------------------------------------------------------------------------

LISTS = ("keys", "values")  # of words, or the name of a kind of MADE_UP
WORDING = ("intro", "needle", "question", "answer", *LISTS)
OF_TASK = {"needles": int, "ask": str, "answer_tokens": int}
OF_RUN = {"task": str, "n": int, "n_beyond": int, "haystack": str}
KINDS = dict.fromkeys(WORDING, str) | dict.fromkeys(LISTS, list) | OF_TASK | OF_RUN


def read_template(path: Path, known: dict) -> dict:
    """A template file, JSON -> its fields. BadInput names a field that is unknown, of the wrong
    type, or has other braces than {key} and {value}, or a task that is not `known`."""
    fields = read_json(path)
    for name, value in fields.items():
        kind = KINDS.get(name)
        if kind is None:
            raise BadInput(f"{path}: unknown field {name!r}; {', '.join(KINDS)}")
        if name in LISTS and isinstance(value, str) and value in MADE_UP:
            continue
        if type(value) is not kind or (kind is int and value < 1):
            raise BadInput(f"{path}: {name} is {value!r}, expected: {kind.__name__}")
        if kind is list:
            check_words(f"{path}: {name}", value)
        if name in WORDING and kind is str:
            check_braces(f"{path}: {name}", value)
    if fields.get("ask", "all") not in ASK:
        raise BadInput(f"{path}: ask {fields['ask']!r} is none of {', '.join(ASK)}")
    if fields.get("task") not in (None, *known):
        raise BadInput(f"{path}: task {fields['task']!r} is none of {', '.join(known)}")
    return fields


def check_braces(where: str, text: str) -> None:
    try:
        text.format(key="", value="")
    except (LookupError, ValueError, AttributeError):
        raise BadInput(f"{where}: only {{key}} and {{value}} may be in braces") from None


def check_words(where: str, words: list) -> None:
    if not (words and all(isinstance(x, str) and x.strip() for x in words)):
        raise BadInput(f"{where} must be a list of words, none of them empty")
    folded = sorted(map(fold, words), key=len)
    if len(set(words)) < len(words) or (where.endswith("values") and len(set(folded)) < len(words)):
        raise BadInput(f"{where} holds a word twice")
    if where.endswith("values"):  # because answers are searched for them
        for i, x in enumerate(folded):
            if inside := [y for y in folded[i + 1 :] if x in y]:
                raise BadInput(f"{where}: {x!r} is part of {inside[0]!r}")


def check_task(name: str, task) -> None:
    """Raises BadInput if the wording cannot distinguish the needles of this task."""
    if task.needles == 0:
        return
    many = (task.needles > 1 and not task.one_key) or task.haystack == "needles"
    if "{value}" not in task.needle or (many and "{key}" not in task.needle):
        raise BadInput(f"{name}: needle must hold {{key}} and {{value}}")
    asked = task.question + task.answer
    if "{key}" in task.needle and not ("{key}" in asked or "{value}" in asked):
        raise BadInput(f"{name}: neither question nor answer holds {{key}}")
    keys = 1 if task.one_key or task.haystack == "needles" else task.needles
    if not isinstance(task.keys, str) and len(task.keys) < keys:
        raise BadInput(f"{name} has {task.needles} needles, but only {len(task.keys)} keys")


def reworded(task, fields: dict):
    """The task in the words of a template."""
    changes = {k: v for k, v in fields.items() if k in WORDING or k in OF_TASK}
    changes |= {k: tuple(v) for k, v in changes.items() if isinstance(v, list)}
    if fields.get("haystack") in ("noise", "needles"):
        changes["haystack"] = fields["haystack"]
    return dataclasses.replace(task, **changes)


def apply_template(path: Path, fields: dict, names: list[str] | None, known: dict) -> tuple:
    """--tasks (None: the template's, or niah_single) -> (names, name -> Task for all of `known`).
    A template that names a task is for that one, any other is for all."""
    own = fields.get("task")
    names = [own or "niah_single"] if names is None else list(dict.fromkeys(names))
    if own is not None and own not in names:
        log(f"{path} is for its task {own}, and not for --tasks {' '.join(names)}")
    tasks = {k: reworded(t, fields) if own in (None, k) else t for k, t in known.items()}
    for name in names:
        check_task(name, tasks[name])
    return names, tasks
