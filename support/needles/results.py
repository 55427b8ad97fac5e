"""Results of an evaluation on disk: needle.jsonl, append-only, survives a kill.

A result is one line: what was asked of which model (KEY and more), its output and its scores."""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from support.huggingface.hashes import Hashes
from support.system.bad_input import BadInput, read_text
from support.system.console import log, telling
from support.system.whole_files import check_unlocked, only_writer, write_atomically

KEY = ("identity", "task", "length", "depth", "repeat", "prompt", "dtype")


class Results:
    """needle.jsonl: a result of an earlier run, even an interrupted one, is not measured again."""

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--out {folder} is a file; a folder for the results is needed")
        check_unlocked(folder)  # do not repair a line that another process is writing
        path = folder / "needle.jsonl"
        self.path, self.known, self.hashes = path, {}, Hashes(folder / "needle_hashes.json")
        text = read_text(path) if path.is_file() else ""
        self.cut = text != "" and not text.endswith("\n")  # the last line lacks its line break
        # not splitlines(): an answer may hold U+2028
        lines = text.removesuffix("\n").split("\n") if text else []
        for i, line in enumerate(lines):
            try:
                result = json.loads(line)
                self.known[self.key(result)] = result
            except (ValueError, KeyError, TypeError, RecursionError):
                if i + 1 < len(lines):
                    raise BadInput(
                        f"{path}, line {i + 1} is not a result of this program; move the file away"
                    ) from None
                write_atomically(path, "".join(x + "\n" for x in lines[:-1]))  # a kill
                self.cut = False

    @staticmethod
    def key(result: dict) -> tuple:
        return tuple(result[k] for k in KEY)

    def find(self, asked: dict) -> dict | None:
        """The result for the same prompt and model; None also where an older version did not yet
        measure `answer_logprob`."""
        known = self.known.get(self.key(asked))
        return known if known is not None and is_complete(known) else None

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Surrounds the measuring, with no other process in the folder. Whatever stops it, the last
        line of the log says which results are kept."""
        before = list(self.known.values())
        with only_writer(self.path.parent), telling(self.what_is_saved):
            yield
            self.hashes.save()
        if list(self.known.values()) == before:
            log("every result was measured before: nothing was run")

    def what_is_saved(self) -> str:
        return f"the results written are kept in {self.path}; the same command goes on from there"

    def add(self, result: dict) -> dict:
        self.known[self.key(result)] = result
        with open(self.path, "a", encoding="utf-8") as file:
            file.write("\n" * self.cut + json.dumps(result, ensure_ascii=False) + "\n")
        self.cut = False
        return result

    def of_setup(self, results: list[dict], setups: dict[str, str], judged: list, settings) -> list:
        """`results` and what earlier runs measured of the same models in the same way (wording,
        haystack, seed, dtype), so that a small run does not hide a larger one before it. judged:
        (identity, label) of each model; setups: task -> setup_of."""
        found = {(self.key(r), r["model"]): r for r in results}
        others = 0
        for r in self.known.values():
            labels = [label for identity, label in judged if identity == r["identity"]]
            same = r.get("setup") == setups.get(r["task"]) and r["seed"] == settings.seed
            same = same and r["dtype"] == settings.dtype and is_complete(r)
            for label in labels if same else ():
                found.setdefault((self.key(r), label), r | {"model": label})
            others += not any((self.key(r), label) in found for label in labels)
        if len(found) > len(results):
            more = len(found) - len(results)
            log(f"{more} results of earlier runs in {self.path} are counted too")
        if others:
            log(f"{others} results there are of other models or settings, and not counted")
        order = [label for _, label in judged], list(setups)
        place = {k: i for names in order for i, k in enumerate(names)}
        return sorted(
            found.values(), key=lambda r: (place[r["model"]], place[r["task"]], r["length"])
        )


def is_complete(result: dict) -> bool:
    return result["task"] == "loss" or "answer_logprob" in result


def setup_of(task, text: str) -> str:
    """Hash of a task's wording and text, which differs if results must not be compared (lengths,
    depths and repeats do not count). task None: the loss on the text."""
    fields = dataclasses.asdict(task) if task else {}
    if fields.get("haystack", "text") != "text":
        text = ""
    words = json.dumps(fields, default=lambda function: function.__name__)
    return hashlib.sha256(f"{words}{text}".encode(errors="replace")).hexdigest()[:12]
