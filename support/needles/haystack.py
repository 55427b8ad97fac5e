"""The parts of an evaluation's text: the haystack, and words for keys and values."""

import dataclasses
import itertools
import random
import re
import string
import unicodedata
import uuid
from collections.abc import Callable, Sequence

from torch import Tensor

from support.data.sources import standard_library_topics
from support.data.text import SEPARATOR, find_files, read_texts
from support.data.toy import ROOT
from support.system.bad_input import BadInput

ESSAYS = ROOT / "data" / "essays"  # where examples/smollm2.py puts them

REFERENCE = "python-reference"  # --haystack by this name: the reference that Python ships

CITIES = tuple(
    """
Accra Adelaide Algiers Amsterdam Ankara Athens Auckland Baku Bangkok Barcelona Beirut Belgrade
Bergen Berlin Bogota Boston Bratislava Brussels Bucharest Budapest Cairo Calgary Canberra Caracas
Chicago Copenhagen Dakar Dallas Delhi Denver Dhaka Dublin Durban Edinburgh Florence Geneva Glasgow
Hamburg Hanoi Havana Helsinki Houston Istanbul Jakarta Karachi Kiev Kyoto Lagos Lahore Lima Lisbon
London Lyon Madrid Manila Marseille Melbourne Miami Milan Minsk Montreal Moscow Mumbai Munich
Nairobi Naples Osaka Oslo Ottawa Paris Perth Porto Prague Quito Riga Rome Santiago Seattle Seoul
Shanghai Singapore Sofia Stockholm Sydney Taipei Tallinn Tehran Tokyo Toronto Tunis Turin
Vancouver Venice Vienna Warsaw
""".split()
)

# the haystack of passkey: sentences without content, repeated
NOISE = "The lamp is lit. The road is long. The rain is cold. On we walk. Uphill and down again.\n"


def load_haystack(path: str | None) -> tuple[str, str]:
    """(text, where it came from): files or a folder, else the essays if fetched, else Python's
    reference."""
    if path == REFERENCE or (path is None and not ESSAYS.is_dir()):
        return standard_library_topics(), "Python's language reference (--haystack for your own)"
    paths = [path or str(ESSAYS)]
    text = SEPARATOR.join("".join(p) for p in read_texts(find_files(paths, say=True)))
    source = path or str(ESSAYS.relative_to(ROOT))  # results must not name a machine's folders
    if not text.strip():
        raise BadInput(f"haystack {source} holds no text (--haystack)")
    return text, source


@dataclasses.dataclass(frozen=True)
class Hidden:
    """What a Task's `hide` returns: a haystack, sentences to be hidden in it, and what is asked."""

    hay: Tensor  # token ids, as many as the whole prompt has: what does not fit is cut off
    needles: list[str]  # may be empty
    questions: list[str]  # of each prompt after this text: question and beginning of the answer
    expected: list[list[str]]  # the answers to each question


def fold(text: str) -> str:
    """Text as it is compared: in lower case, after NFC (e and a combining accent are one letter).

    >>> fold("Cafe\\u0301") == fold("CAFÉ")
    True
    """
    return unicodedata.normalize("NFC", text).lower()


def listed(words: list[str]) -> str:
    """
    >>> listed(["Lima"]), listed(["Lima", "Oslo", "Rome"])
    ('Lima', 'Lima, Oslo, and Rome')
    """
    return ", and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def is_word_of(key: str, text: str) -> bool:
    """Is the key a word of the text (folded)?

    >>> is_word_of("Pear", "a pear."), is_word_of("Pear", "it appears")
    (True, False)
    """
    return re.search(rf"(?<![a-z0-9]){re.escape(fold(key))}(?![a-z0-9])", text) is not None


MADE_UP = {  # kinds of words that are made up instead of picked from a list
    "numbers": lambda rng: str(rng.randint(1_000_000, 9_999_999)),
    "letters": lambda rng: "".join(rng.choices(string.ascii_uppercase, k=5)),
    "uuids": lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
}


def pick_words(words: Sequence[str] | str, n: int, rng: random.Random, text: str = "") -> list[str]:
    """n different ones of `words` (a list, or a kind of MADE_UP); none is in `text` (folded), so
    that a score, which is a search, finds none by accident.

    BadInput if the text leaves too few."""
    if isinstance(words, str):
        return different(n, lambda: MADE_UP[words](rng), text)
    free = [word for word in words if fold(word) not in text]
    if len(free) < n:
        raise BadInput(f"the needles need {n} words, the haystack lacks only {len(free)} of theirs")
    return rng.sample(free, n)


def pick_many(words: Sequence[str] | str, n: int, rng: random.Random) -> list[str]:
    """n different keys for a haystack of needles; where `words` are too few, several joined.

    >>> pick_many(["a", "b"], 3, random.Random(0))
    ['b-b-a', 'a-b-a', 'b-a-a']
    """
    if isinstance(words, str):
        return pick_words(words, n, rng)
    k = next(k for k in itertools.count(1) if len(words) ** k >= 2 * n)
    return different(n, lambda: "-".join(rng.choices(words, k=k)))


def different(n: int, draw: Callable[[], str], text: str = "") -> list[str]:
    """n different words, none of them in `text` (folded): drawn until there are so many."""
    found: dict[str, None] = {}  # a set that keeps its order
    while len(found) < n:
        word = draw()
        if fold(word) not in text:
            found[word] = None
    return list(found)


def pick_needles(task, n_keys: int, tokens: int, tokenizer, rng) -> tuple[list, list, list[int]]:
    """(keys, values, ids (tokens,) of a haystack of other needles, one a line, none of which holds
    one of these keys or values)."""
    values, n_lines = pick_words(task.values, task.needles, rng), 16
    while True:
        keys = pick_many(task.keys, n_keys + n_lines, rng)
        keys, others = keys[:n_keys], keys[n_keys:]
        if isinstance(task.values, str):
            drawn = pick_words(task.values, n_lines, rng)
        else:
            free = [value for value in task.values if value not in keys + values]
            if not free:
                raise BadInput("a haystack of needles needs more values than its needles have")
            drawn = rng.choices(free, k=n_lines)
        lines = [task.needle.format(key=k, value=v) for k, v in zip(others, drawn, strict=True)]
        answers = [fold(answer) for answer in keys + values]
        lines = [line + "\n" for line in lines if not any(a in fold(line) for a in answers)]
        ids = tokenizer.encode("".join(lines), continued=True)
        if len(ids) >= tokens:
            return keys, values, ids[:tokens]
        n_lines = 16 + int(1.2 * n_lines * tokens / max(1, len(ids)))
