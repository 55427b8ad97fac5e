"""Results of an evaluation on disk: needle.jsonl, append-only, survives a kill.

A result is one line: what was asked of which model (KEY and more), its output and its scores."""

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

from support.huggingface.hashes import Hashes
from support.system.bad_input import BadInput
from support.system.console import log, note_on_error
from support.system.whole_files import check_unlocked, only_writer, write_atomically

KEY = ("identity", "task", "length", "depth", "repeat", "prompt", "dtype")
NUMBER = (int, float)
KINDS = dict.fromkeys(("depth", "true_depth", "score", "seconds"), NUMBER)
KINDS |= {"length": int, "seed": int, "expected": list}
OF_LOSS, OF_ANSWER = {"loss_by_1024": list}, {"answer_logprob": NUMBER, "output": str}
# what reading another line raises
NOT_A_RESULT = (ValueError, KeyError, TypeError, RecursionError, OverflowError)


def nats_of(result: dict) -> float:
    """Of the answer, or a token in case of the loss."""
    return result.get("answer_logprob", result["score"])


class Results:
    """needle.jsonl: a result of an earlier run, even an interrupted one, is not measured again."""

    def __init__(self, folder: Path):
        if folder.exists() and not folder.is_dir():
            raise BadInput(f"--out {folder} is a file; a folder for the results is needed")
        check_unlocked(folder)  # do not repair a line that another process is writing
        self.path, self.known = folder / "needle.jsonl", {}
        self.hashes = Hashes(folder / "needle_hashes.json")
        data = self.path.read_bytes() if self.path.is_file() else b""
        # not splitlines(): an answer may hold U+2028
        lines = data.split(b"\n")
        # of a result even a part begins so; anything else is not ours to cut off
        last = lines.pop() if lines[-1][:1] in (b"", b"{") else b""
        for i, line in enumerate(lines, 1):
            try:
                self.remember(json.loads(line))
            except NOT_A_RESULT:
                raise BadInput(
                    f"{self.path}, line {i} is not a result of this program; move the file away"
                ) from None
        if last:  # cut off by a kill or a full disk; or whole, and only its line end is missing
            kept = data.removesuffix(last)
            with contextlib.suppress(*NOT_A_RESULT):
                self.remember(json.loads(last))
                kept = data + b"\n"
            write_atomically(self.path, kept.decode())

    @staticmethod
    def key(result: dict) -> tuple:
        return tuple(result[k] for k in KEY)

    def remember(self, result: dict) -> None:
        """A result without nats, or one that overflowed, is by an older version and measured again.
        One of NOT_A_RESULT for a line whose fields are not those that `measure` writes."""
        key, is_loss = self.key(result), result["task"] == "loss"
        if is_loss or "answer_logprob" in result:
            for name, kind in (KINDS | (OF_LOSS if is_loss else OF_ANSWER)).items():
                if not isinstance(result[name], kind):
                    raise TypeError(f"{name} is {result[name]!r}")
                if kind == NUMBER:
                    float(result[name])  # not beyond floats
            if math.isfinite(nats_of(result)):
                self.known[key] = result

    def find(self, asked: dict) -> dict | None:
        """The result for the same prompt and model."""
        return self.known.get(self.key(asked))

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Surrounds the measuring, with no other process in the folder. Whatever stops it, the last
        line of the log says which results are kept."""
        before = len(self.known)
        with only_writer(self.path.parent), note_on_error(self.what_is_saved):
            yield
            self.hashes.save()
        if len(self.known) == before:
            log("every result was measured before: nothing was run")

    def what_is_saved(self) -> str:
        return f"the results written are kept in {self.path}; the same command goes on from there"

    def add(self, result: dict) -> dict:
        """Append a result to the file. BadInput for one that is no finite number of nats."""
        if not math.isfinite(found := nats_of(result)):
            raise BadInput(
                f"{result['model']} gives {found} nats, so its numbers overflow in"
                f" {result['dtype']}: a failed training, or another --dtype is needed"
            )
        self.remember(result)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        return result

    def add_earlier(self, found: list, setups: dict[str, str], candidates: list, settings) -> list:
        """`found`, the results of this run, and what earlier runs measured of the same models in
        the same way (wording, haystack, seed, dtype), so that a small run does not hide a larger
        one before it. setups: task -> setup_of."""
        rows = {(self.key(r), r["model"]): r for r in found}
        for key, r in self.known.items():
            way = r.get("setup"), r["seed"], r["dtype"]
            if way == (setups.get(r["task"]), settings.seed, settings.dtype):
                for label in [c.label for c in candidates if c.identity == r["identity"]]:
                    rows.setdefault((key, label), r | {"model": label})
        if more := len(rows) - len(found):
            log(f"{more} results of earlier runs in {self.path} are counted too")
        if others := len(self.known.keys() - {key for key, _ in rows}):
            log(f"{others} results there are of other models or settings, and not counted")
        labels, tasks = [c.label for c in candidates], list(setups)

        def place(r: dict) -> tuple:
            return labels.index(r["model"]), tasks.index(r["task"]), r["length"]

        return sorted(rows.values(), key=place)


def setup_of(task, text: str) -> str:
    """Hash of a task's wording and text, which differs if results must not be compared (lengths,
    depths and repeats do not count). task None: the loss on the text."""
    fields = dataclasses.asdict(task) if task else {}
    if fields.get("haystack", "text") != "text":
        text = ""
    words = json.dumps(fields, default=lambda function: function.__name__)
    return hashlib.sha256(f"{words}{text}".encode(errors="replace")).hexdigest()[:12]
