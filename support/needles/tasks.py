"""The tasks of the evaluation, in one table: what is hidden, what is asked, in which words; and
--template, which puts a task into the user's own words.

The axes (haystack, keys, values, queries) and the structure are those of RULER (Hsieh et al.,
2404.06654); the wording is ours. An entry of TASKS holds the fields of an eval_needle.Task that
differ from its defaults; `hide` is a function for tasks that hide something else than pairs."""

import dataclasses
import itertools
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
    free = task.keys
    if not isinstance(free, str):
        free = [key for key in free if not is_word_of(key, text)]
    while any(is_word_of(key, text) for key in keys):
        keys = pick_words(free, wanted, rng)
    found = [key for key in keys if is_word_of(key, text)] + [v for v in values if fold(v) in text]
    assert not found, f"the haystack holds {found}"
    named = keys * task.needles if task.one_key else keys
    needles = [task.needle.format(key=k, value=v) for k, v in zip(named, values, strict=True)]
    asked, expected = keys[:1], [values[:1]]
    if task.ask == "each":
        asked, expected = keys, [[value] for value in values]
    elif task.ask == "all":
        asked, expected = [listed(keys)], [values]
    questions = [(task.question + task.answer).format(key=key, value="") for key in asked]
    return Hidden(hay, needles, questions, expected)


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
    vocabulary = sorted(set(re.findall("[a-z]{4,12}", haystack.text)))
    words = pick_many(vocabulary if len(vocabulary) > 1 else CITIES, 10 + length // 6, rng)
    ids: list[int] = []
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

TEXTS = dict.fromkeys(("intro", "needle", "question", "answer"), str)
OF_TASK = TEXTS | {"keys": list, "values": list, "needles": int, "ask": str, "answer_tokens": int}
OF_RUN = {"task": str, "n": int, "n_beyond": int, "haystack": str}
KINDS = OF_TASK | OF_RUN  # of the fields' values; of keys and values also a name from MADE_UP
CHOICES = {"ask": ("first", "each", "all"), "task": tuple(TASKS)}


def read_template(path: Path) -> dict:
    """A template file, JSON -> its fields. BadInput names a field that is unknown, of the wrong
    type, or has other braces than {key} and {value}, or a task or way to ask that is unknown."""
    fields = read_json(path)
    for name, value in fields.items():
        where, kind = f"{path}: {name}", KINDS.get(name)
        if kind is None:
            raise BadInput(f"{path}: unknown field {name!r}; {', '.join(KINDS)}")
        if kind is list and value in tuple(MADE_UP):
            continue
        if type(value) is not kind or (kind is int and value < 1):
            raise BadInput(f"{where} is {value!r}, expected: {kind.__name__}")
        if value not in CHOICES.get(name, [value]):
            raise BadInput(f"{where} {value!r} is none of {', '.join(CHOICES[name])}")
        if kind is list:
            check_words(where, value, searched=name == "values")
        if name in TEXTS:
            try:
                value.format(key="", value="")
            except (LookupError, ValueError, AttributeError):
                raise BadInput(f"{where}: only {{key}} and {{value}} may be in braces") from None
    return fields


def check_words(where: str, words: list, searched: bool) -> None:
    """searched: answers are searched for these words, so that none may be a part of another."""
    if not (words and all(isinstance(x, str) and x.strip() for x in words)):
        raise BadInput(f"{where} must be a list of words, none of them empty")
    compared = [fold(word) for word in words] if searched else words
    if len(set(compared)) < len(words):
        raise BadInput(f"{where} holds a word twice")
    for x, y in itertools.permutations(compared, 2) if searched else ():
        if x in y:
            raise BadInput(f"{where}: {x!r} is part of {y!r}")


def check_task(name: str, task) -> None:
    """Raises BadInput if the wording cannot distinguish the needles of this task, or gives an
    answer away."""
    if task.hide not in (hide_pairs, hide_chain, hide_common_words):
        return  # a task of the user's, whose own function words needles and questions
    if task.hide is hide_common_words and task.needles:
        raise BadInput(f"{name} hides no needles, found: needles {task.needles}")
    if task.ask == "each" and (task.one_key or task.hide is not hide_pairs):
        raise BadInput(f"{name}: ask 'each' is for needles with a key of their own")
    if task.needles == 0:
        return
    in_needles = task.haystack == "needles"
    many = (task.needles > 1 and not task.one_key) or in_needles or task.in_order
    if "{value}" not in task.needle or (many and "{key}" not in task.needle):
        raise BadInput(f"{name}: needle must hold {{key}} and {{value}}")
    asked = task.question + task.answer
    if "{key}" in task.needle and not ("{key}" in asked or "{value}" in asked):
        raise BadInput(f"{name}: neither question nor answer holds {{key}}")
    least = 2 if in_needles else 1 if task.one_key else task.needles
    keys, values = (() if isinstance(x, str) else x for x in (task.keys, task.values))
    if keys and len(keys) < least:
        raise BadInput(f"{name} needs {least} keys or more, and has {len(keys)}")
    own = fold(task.intro + (task.needle + asked).format(key=" ".join(keys), value=""))
    for value in values:
        if fold(value) in own:
            word = next((word for word in own.split() if fold(value) in word), own)
            raise BadInput(f"{name}: value {value!r} occurs in its own wording or keys: {word!r}")


def apply_template(path: Path, fields: dict, names: list[str] | None, known: dict) -> tuple:
    """--tasks (None: the template's, or niah_single) -> (names, name -> Task for all of `known`).
    A template that names a task is for that one, any other is for all."""
    own = fields.get("task")
    names = [own or "niah_single"] if names is None else list(dict.fromkeys(names))
    if own is not None and own not in names:
        log(f"{path} is for its task {own}, and not for --tasks {' '.join(names)}")
    changes = {k: v for k, v in fields.items() if k in OF_TASK}
    changes |= {k: tuple(v) for k, v in changes.items() if isinstance(v, list)}
    if fields.get("haystack") in ("noise", "needles"):
        changes["haystack"] = fields["haystack"]
    changed = known if own is None else [own]
    tasks = known | {name: dataclasses.replace(known[name], **changes) for name in changed}
    for name in names:
        check_task(name, tasks[name])
    return names, tasks
