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


def contents(args) -> list[dict]:
    """What stands in each path of --data and --replay_data, and what weaves the toy's task into its
    text, to be told from what stood there when a run began."""
    paths = (*(args.data or [None]), *(args.replay_data or []))
    found = [{"path": path or "the Python standard library", **content(path)} for path in paths]
    if is_toy(args):
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


def is_toy(args) -> bool:
    return args.model == TINY and args.data is None and args.replay_data is None


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


def load_corpora(args, tokenizer) -> tuple[Corpus, Corpus]:
    """What the extension and the replay draw from; the toy model's task is woven into both."""
    remedy = "give longer texts with --{}, join them with --join, or lower --{}"
    remedies = remedy.format("data", "train_len"), remedy.format("replay_data", "replay_len")
    if is_toy(args):
        log("toy model; for a real one: --model DIR")
        tokens = load_toy_text(tokenizer)
        return tuple(ToyCorpus(tokens, n, tokenizer) for n in (args.train_len, args.replay_len))
    tokens = load_tokens(args.data, tokenizer, args.join)
    corpus = Corpus(tokens, args.train_len, remedies[0])
    if args.replay_data:
        tokens = load_tokens(args.replay_data, tokenizer, args.join)
    return corpus, Corpus(tokens, args.replay_len, remedies[1]) if args.replay_steps else corpus
