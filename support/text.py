"""Training text: documents from files, or the Python standard library, as arrays of token ids."""

import itertools
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

SEPARATOR = "\n\n\n"
SUFFIXES = (".txt", ".md", ".rst")


def standard_library_topics() -> str:
    """The chapters of Python's language reference that ship with Python, about 170k tokens of
    prose."""
    from pydoc_data.topics import topics

    return SEPARATOR.join(text for _, text in sorted(topics.items()))


def standard_library_text() -> str:
    """Every Python source of the standard library, each followed by a chapter of the language
    reference.

    Long text that is on every machine. The chapters (pydoc_data.topics) are short and come round
    again."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = {
        "test",
        "tests",
        "idle_test",
        "site-packages",
        "dist-packages",
        "pydoc_data",
        "__pycache__",
        "encodings",
    }
    chapters = itertools.cycle(standard_library_topics().split(SEPARATOR))
    parts = []
    for path in sorted(root.rglob("*.py")):
        if not skip & set(path.relative_to(root).parts):
            parts += [path.read_text(encoding="utf-8", errors="replace"), next(chapters)]
    return SEPARATOR.join(parts)


def read_documents(paths: list[str]) -> Iterator[str]:
    """One text a file; folders are searched for .txt, .md and .rst. ValueError names what is
    missing."""
    for path in map(Path, paths):
        if not path.exists():
            raise ValueError(f"{path} does not exist (--data wants text files or folders)")
        files = (
            [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES)
        )
        if not files:
            raise ValueError(f"folder {path} holds no {', '.join(SUFFIXES)} file (--data)")
        for file in files:
            try:
                yield file.read_text(encoding="utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{file} is not UTF-8 text: {error}") from error


class Corpus:
    """Documents of at least min_tokens tokens; `window` draws from them. Too short ones are
    counted."""

    def __init__(self, documents: list[np.ndarray], min_tokens: int, source: str):
        self.documents = [d for d in documents if len(d) >= min_tokens]
        self.source, self.too_short = source, len(documents) - len(self.documents)
        self.tokens = sum(map(len, self.documents))
        if not self.documents:
            longest = max(map(len, documents), default=0)
            raise ValueError(
                f"{source}: no document reaches {min_tokens} tokens (the longest has {longest});"
                " give longer texts with --data, join them with --join, or lower --train_len"
            )
        self._sizes = torch.tensor([len(d) for d in self.documents], dtype=torch.float64)

    def window(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """A random run of `tokens` ids (int64) of one document, or the whole document where it is
        shorter."""
        document = self.documents[int(torch.multinomial(self._sizes, 1, generator=generator))]
        last = max(len(document) - tokens, 0)
        begin = int(torch.randint(last + 1, (1,), generator=generator))
        return torch.from_numpy(document[begin : begin + tokens].astype(np.int64))


def load_documents(paths: list[str] | None, tokenizer, join: bool) -> tuple[list[np.ndarray], str]:
    """(documents as token ids, where they come from): files of `paths`, or the standard library
    where none are given (always joined: its files are short)."""
    if paths is None:
        source = "the Python standard library (default; --data for your own)"
        texts = [standard_library_text()]
    else:
        source, texts = ", ".join(map(str, paths)), read_documents(paths)
        texts = [SEPARATOR.join(texts)] if join else texts
    return [np.array(tokenizer.encode(t), dtype=np.int32) for t in texts], source
