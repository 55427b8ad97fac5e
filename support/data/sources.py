"""What a training run draws its samples from."""

import hashlib
import os
import platform
from pathlib import Path

from support.data import toy, toy_words
from support.data.standard_library import standard_library_files
from support.data.text import Corpus, find_files, load_tokens
from support.data.toy import TINY, ToyCorpus, load_toy_text
from support.system.console import log

PIECES, PIECE_BYTES = 16, 1 << 14  # of a file that are hashed; up to their sum, all of it


def contents(settings) -> list[dict]:
    """What each path of --data and --replay_data holds, and the code that weaves the toy's task
    into its text: so that --resume notices a change."""
    paths = (*(settings.data or [None]), *(settings.replay_data or []))
    found = [{"path": path or "the Python standard library", **content(path)} for path in paths]
    if is_toy(settings):
        files = [Path(module.__file__) for module in (toy, toy_words)]
        name = "support/data/toy.py, toy_words.py"
        found.append({"path": name, **of_files(files, files[0].parent)})
    return found


def changed(began: list[dict], now: list[dict]) -> str | None:
    """Which of the two `contents` differ, and in what, so far as the former says it (an older
    version wrote less down)."""
    for then, here in zip(began, now, strict=False):
        for key in (k for k in here if k in then and k != "path"):
            if then[key] != here[key]:
                values = f"{key}: {then[key]} then, {here[key]} now"
                return f"{here['path']} has changed since the start ({values})"
    return None


def is_toy_model(folder: str) -> bool:
    """Is it the embedded model, however its path is written?"""
    return os.path.realpath(folder) == os.path.realpath(TINY)


def is_toy(settings) -> bool:
    """The embedded model without a text of the user's: the toy's task is woven into its text."""
    return is_toy_model(settings.model) and not settings.data and not settings.replay_data


def content(path: str | None) -> dict:
    """Of a path, or of the standard library (None)."""
    if path is not None:
        return of_files(find_files([path]), path)
    root, files = standard_library_files()
    files.append(root / "pydoc_data" / "topics.py")  # the chapters of the language reference
    return {"python": platform.python_version(), **of_files(files, root)}


def of_files(files: list[Path], root: str | Path) -> dict:
    """Number and size of the files, and a hash over their names below `root`, their sizes, and
    pieces of them that are few enough for folders of many files."""
    total, digest = 0, hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(os.fsencode(file.relative_to(root)) + b" %d " % size)
        if size == 0:  # or a pipe, which can be read only once
            continue
        with open(file, "rb") as stream:
            for i in range(PIECES):
                stream.seek(max(0, size - PIECE_BYTES) * i // (PIECES - 1))
                digest.update(stream.read(PIECE_BYTES))
    return {"files": len(files), "bytes": total, "sha256": digest.hexdigest()[:12]}


def load_corpora(settings, tokenizer) -> tuple[Corpus, Corpus]:
    """What the extension and the replay draw from; the toy model's task is woven into both."""
    lengths = settings.train_len, settings.replay_len
    if is_toy(settings):
        log("toy model; for a real one: --model DIR")
        tokens = load_toy_text(tokenizer)
        return tuple(ToyCorpus(tokens, length, tokenizer) for length in lengths)
    remedy = "give longer texts with --{}, join them with --join, or lower --{}"
    tokens = load_tokens(settings.data, tokenizer, settings.join)
    corpus = Corpus(tokens, lengths[0], remedy.format("data", "train_len"))
    if settings.replay_steps == 0:
        return corpus, corpus  # nothing is drawn for a replay
    if settings.replay_data:
        tokens = load_tokens(settings.replay_data, tokenizer, settings.join)
    return corpus, Corpus(tokens, lengths[1], remedy.format("replay_data", "replay_len"))
