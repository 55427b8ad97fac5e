"""What a training run draws its samples from."""

import hashlib
import os
import platform

from support.cli import log
from support.text import Corpus, find_files, load_tokens
from support.toy import TINY, ToyCorpus, load_toy_text

PIECES, PIECE_BYTES = 16, 1 << 14  # of a file that are hashed; up to their sum, all of it


def contents(args) -> list[dict]:
    """What stands in each path of --data and --replay_data, to be told from what stood there when
    a run began."""
    paths = (*(args.data or [None]), *(args.replay_data or []))
    return [{"path": path or "the Python standard library", **content(path)} for path in paths]


def content(path: str | None) -> dict:
    """Number and size of the files, and a hash over their names, sizes and pieces of them that are
    few enough for folders of many files; of the standard library (None) the version."""
    if path is None:
        return {"python": platform.python_version()}
    files, total, digest = find_files([path]), 0, hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        total += size
        digest.update(os.fsencode(file.relative_to(path)) + b" %d " % size)
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
    if args.model == TINY and args.data is None and args.replay_data is None:
        log("toy model; for a real one: --model DIR")
        tokens = load_toy_text(tokenizer)
        return tuple(ToyCorpus(tokens, n, tokenizer) for n in (args.train_len, args.replay_len))
    tokens = load_tokens(args.data, tokenizer, args.join)
    corpus = Corpus(tokens, args.train_len, remedies[0])
    if args.replay_data:
        tokens = load_tokens(args.replay_data, tokenizer, args.join)
    return corpus, Corpus(tokens, args.replay_len, remedies[1]) if args.replay_steps else corpus
