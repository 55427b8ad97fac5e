"""What a run reads: the user's texts, or those that ship with Python; and whether they changed."""

import hashlib
import itertools
import os
import platform
import sysconfig
from pathlib import Path

import torch

from support.data import toy
from support.data.segments import rarely_ends
from support.data.text import SEPARATOR, Corpus, Tokens, find_files, read_files
from support.data.toy import TINY, ToyCorpus
from support.system.console import log

PIECES, PIECE_BYTES = 16, 1 << 14  # of a large file that are hashed


# ---- text that is on every machine -------------------------------------------------------------


def standard_library_topics() -> str:
    """The chapters of the language reference that Python ships: 110k to 165k tokens of prose,
    depending on the tokenizer."""
    from pydoc_data.topics import topics

    return SEPARATOR.join(text for _, text in sorted(topics.items()))


def standard_library_files() -> tuple[Path, list[Path]]:
    """(folder, files): the Python sources of the standard library, without tests and tables."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = set("test tests idle_test site-packages dist-packages pydoc_data encodings".split())
    files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    return root, files


def standard_library_sources() -> list[str]:
    _, files = standard_library_files()
    return [p.read_text(encoding="utf-8", errors="replace") for p in files]


def standard_library_text() -> str:
    """Every source of the standard library, each followed by a chapter of the language reference
    (which repeat): long text that is on every machine."""
    chapters = itertools.cycle(standard_library_topics().split(SEPARATOR))
    return SEPARATOR.join(
        part for source in standard_library_sources() for part in (source, next(chapters))
    )


# ---- what is read ------------------------------------------------------------------------------


def load_tokens(paths: list[str] | None, tokenizer, join: bool = False) -> Tokens:
    """The documents of `paths` (files or folders of the kinds that text.py reads), or of the
    standard library where none are given (joined, as its files are short). join: texts become one.

    BadInput names what is missing or cannot be read; the log says what a folder holds."""
    if paths is None:
        source = "the Python standard library (default; --data for your own)"
        return one_document(source, standard_library_text(), tokenizer)
    return read_files(paths, tokenizer, join)


def one_document(source: str, text: str, tokenizer) -> Tokens:
    tokens = Tokens(source)
    tokens.add_texts([[text]], tokenizer)
    return tokens


def load_reference(tokenizer) -> Tokens:
    """The language reference alone, as one document: prose that is on every machine."""
    source = "the language reference that ships with Python"
    return one_document(source, standard_library_topics(), tokenizer)


def load_corpora(args, tokenizer) -> tuple[Corpus, Corpus]:
    """What the extension and the replay draw from; the toy model's task is woven into both."""
    if is_toy(args):
        log("toy model; for a real one: --model DIR")
        # without the language reference: the toy is tested on that
        source = "the sources of the Python standard library, with word pairs woven in"
        tokens = one_document(source, SEPARATOR.join(standard_library_sources()), tokenizer)
        return tuple(ToyCorpus(tokens, n, tokenizer) for n in (args.train_len, args.replay_len))
    remedy = "give longer texts with --{}, join them with --join, or lower --{}"
    tokens = load_tokens(args.data, tokenizer, args.join)
    corpus = replay = Corpus(tokens, args.train_len, remedy.format("data", "train_len"))
    if args.replay_data:
        tokens = load_tokens(args.replay_data, tokenizer, args.join)
    if args.replay_steps:
        replay = Corpus(tokens, args.replay_len, remedy.format("replay_data", "replay_len"))
        if args.replay_data:
            log(f"replay data: {replay.summary()}")
    return corpus, replay


def load_texts(args, tokenizer) -> tuple[Corpus, Corpus]:
    """load_corpora, and whether their segments end at spaces as well: decided once for a corpus, so
    that a stretch without sentences in an ordinary text (a long table) is drawn again instead of
    being cut into words."""
    corpora = load_corpora(args, tokenizer)
    for corpus in corpora:
        generators = (torch.Generator().manual_seed(i) for i in range(32))
        windows = (corpus.window(args.target_len, generator) for generator in generators)
        corpus.at_spaces = all(rarely_ends(ids, tokenizer) for ids in windows)
    return corpora


# ---- has it changed? ---------------------------------------------------------------------------


def contents(args) -> list[dict]:
    """What is in each path of --data and --replay_data, and what weaves the toy's task into its
    text, to be told from what was there when a run began."""
    paths = (*(args.data or [None]), *(args.replay_data or []))
    found = [{"path": path or "the Python standard library", **content(path)} for path in paths]
    if is_toy(args):
        names = "support/data/toy.py", "assets/tiny/needle.json"
        weaver = of_files([toy.ROOT / name for name in names], toy.ROOT)
        found.append({"path": ", ".join(names), **weaver})
    return found


def changed(began: list[dict], now: list[dict]) -> str | None:
    """Which paths differ between the two `contents`, and in what; compares what `began` records (an
    older version recorded less)."""
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
