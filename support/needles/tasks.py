"""The needle tasks, in one table: what is hidden in what, which of it is asked for, in which words.

The axes (haystack, keys, values, queries) and the structure are those of RULER's NIAH family
(Hsieh et al., 2404.06654); the wording is ours. --template replaces it (templates.py)."""

import dataclasses

from support.needles.haystack import CITIES


@dataclasses.dataclass(frozen=True)
class Task:
    """What is hidden in what, and which of it is asked for: RULER's axes and the wording.

    The first needle stands at the cell's depth and the others anywhere; where each is asked for in
    turn, they divide the text among them."""

    needles: int = 1
    ask: str = "first"  # of the needles; "all" in one question; "each" in turn after the same text
    one_key: bool = False  # the needles are several values of one key
    haystack: str = "text"  # --haystack; "noise"; "needles": lines that differ in key and value
    intro: str = "Some special magic numbers are hidden in the text below. Remember them.\n\n"
    needle: str = "One of the special magic numbers for {key} is: {value}."
    question: str = "\n\nWhat is the special magic number for {key} that the text above mentions?"
    answer: str = " The special magic number for {key} is:"
    keys: tuple[str, ...] | str = CITIES  # or "uuids"
    values: tuple[str, ...] | str = "numbers"  # of seven digits; or "uuids"
    answer_tokens: int | None = None  # None: what the values need, and some more

    def depths(self, grid: list[float]) -> list[float]:
        """Depths of the cells of one haystack: those of the grid, or the middle of each part."""
        n = self.needles
        return [(i + 0.5) / n for i in range(n)] if self.ask == "each" else grid


ALL = {
    "ask": "all",
    "question": "\n\nWhat are all the special magic numbers for {key} that the text mentions?",
    "answer": " The special magic numbers for {key} are:",
}
TASKS = {
    "passkey": Task(
        haystack="noise",
        intro="A pass key is hidden in the text below. Remember it.\n\n",
        needle="The pass key is {value}. Remember it: {value} is the pass key.",
        question="\n\nWhat is the pass key that the text above mentions?",
        answer=" The pass key is",
    ),
    "niah_single": Task(),
    "multikey": Task(needles=4),
    "multikey_hard": Task(haystack="needles"),
    "multivalue": Task(needles=4, one_key=True, **ALL),
    "multiquery": Task(needles=4, **ALL),
    # not in RULER: needles that differ in nothing but key and value, each asked for
    "needles_8": Task(needles=8, ask="each"),
}

NIAH_M = ("multikey", "multivalue", "multiquery")  # the paper's NIAH(M) is their mean
