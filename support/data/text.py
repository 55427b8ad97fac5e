"""Training text: documents from files, or the Python standard library, as arrays of token ids."""

import itertools
import json
import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from support.data.standard_library import (
    SEPARATOR,
    standard_library_text,
    standard_library_topics,
)
from support.system.bad_input import BadInput

CUT = re.compile(r"(?<=\w) (?=\w)")
SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".npy", ".bin")


def find_files(paths: list[str]) -> list[Path]:
    """The files of `paths`; folders are searched. ValueError names what is missing."""
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"{path} does not exist (files or folders are wanted)")
        inside = path.rglob("*") if path.is_dir() else []
        found = sorted(p for p in inside if p.suffix in SUFFIXES) if path.is_dir() else [path]
        if not found:
            raise BadInput(f"folder {path} holds no file of {', '.join(SUFFIXES)}")
        files += found
    return files


def read_texts(files: list[Path]) -> Iterator[Iterator[str]]:
    """The documents of text files (one each) and .jsonl files (one a line, under "text"), each as
    an iterator over its pieces."""
    for file in files:
        if file.suffix != ".jsonl":
            yield read_pieces(file)
            continue
        with open(file, encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, TypeError, KeyError):
                    text = None
                if not isinstance(text, str):
                    raise BadInput(f'{file}, line {number}: not a JSON object with a "text"')
                yield iter([text])


def read_pieces(file: Path, characters: int = 1 << 22) -> Iterator[str]:
    """A text file in pieces of a few megabytes, so that its size does not matter. Cut only between
    a word and the space before the next one: there every tokenizer begins a new token anyway."""
    rest = ""
    with open(file, encoding="utf-8") as stream:
        try:
            while chunk := stream.read(characters):
                text = rest + chunk
                cut = next((m.start() for m in CUT.finditer(text, max(0, len(text) - 4096))), 0)
                if cut:
                    yield text[:cut]
                rest = text[cut:]
        except UnicodeDecodeError as error:
            raise BadInput(f"{file} is not UTF-8 text: {error}") from error
    yield rest


def read_tokens(file: Path, vocab_size: int) -> np.ndarray:
    """Token ids of a .npy file (1-D: one document; 2-D: one a row) or a .bin file (one document;
    uint16 where the vocabulary fits, else uint32), mapped, not read into memory."""
    if file.stat().st_size == 0:
        raise BadInput(f"{file} is empty")
    if file.suffix == ".bin":
        dtype = np.uint16 if vocab_size <= 2**16 else np.uint32
        if file.stat().st_size % np.dtype(dtype).itemsize:
            raise BadInput(f"{file} does not hold whole {np.dtype(dtype).name} token ids")
        ids = np.memmap(file, dtype=dtype, mode="r")
    else:
        try:
            ids = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:  # numpy has no class of its own for a damaged file
            raise BadInput(f"{file} is no array of token ids: {error}") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
        raise BadInput(f"{file} holds {ids.dtype} {ids.shape}, token ids (N,) or (n, N) are wanted")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise BadInput(
            f"{file} holds ids {low} to {high}, the tokenizer has {vocab_size}: another one's?"
        )
    return ids


class Tokens:
    """All documents as token ids: `parts` are flat arrays, `documents` (n, 3) part, begin, size.

    Encoded text goes to an unnamed temporary file: memory stays flat however much there is."""

    def __init__(self, source: str):
        self.source, self.parts, self._rows = source, [], array("q")

    @property
    def documents(self) -> np.ndarray:
        return np.array(self._rows, dtype=np.int64).reshape(-1, 3)

    def add_array(self, ids: np.ndarray) -> None:
        rows = 1 if ids.ndim == 1 else len(ids)
        size = ids.size // rows
        for i in range(rows):
            self._rows.extend((len(self.parts), i * size, size))
        self.parts.append(ids.reshape(-1))

    def add_texts(self, documents: Iterable[Iterable[str]], tokenizer) -> None:
        store, total = tempfile.TemporaryFile(), 0  # noqa: SIM115 (lives as long as its map)
        for pieces in documents:
            begin = total
            for piece in pieces:
                ids = np.array(tokenizer.encode(piece), dtype=np.int32)
                store.write(ids.tobytes())
                total += len(ids)
            self._rows.extend((len(self.parts), begin, total - begin))
        store.flush()
        if total:  # an empty file cannot be mapped, and no row then points into it
            self.parts.append(np.memmap(store, dtype=np.int32, mode="r", shape=(total,)))


def load_tokens(paths: list[str] | None, tokenizer, join: bool = False) -> Tokens:
    """The documents of `paths` (text, .jsonl, .npy, .bin, folders of them), or of the standard
    library where none are given (joined, as its files are short). join: texts become one."""
    if paths is None:
        tokens = Tokens("the Python standard library (default; --data for your own)")
        tokens.add_texts([[standard_library_text()]], tokenizer)
        return tokens
    tokens, files = Tokens(", ".join(map(str, paths))), find_files(paths)
    texts = read_texts([f for f in files if f.suffix not in (".npy", ".bin")])
    if join:
        separated = ((*([SEPARATOR] if i else []), *pieces) for i, pieces in enumerate(texts))
        texts = iter([itertools.chain.from_iterable(separated)])
    tokens.add_texts(texts, tokenizer)
    for file in files:
        if file.suffix in (".npy", ".bin"):
            tokens.add_array(read_tokens(file, tokenizer.vocab_size))
    return tokens


def load_reference(tokenizer) -> Tokens:
    """The language reference alone, as one document: prose that is on every machine."""
    tokens = Tokens("the language reference that ships with Python")
    tokens.add_texts([[standard_library_topics()]], tokenizer)
    return tokens


class Corpus:
    """Documents of at least min_tokens tokens, shorter ones are counted; `window` draws from them.

    remedy: what the caller's flags can do where no document is long enough (ValueError)."""

    def __init__(self, tokens: Tokens, min_tokens: int, remedy: str = "give longer texts"):
        sizes = tokens.documents[:, 2]
        self.source, self.parts = tokens.source, tokens.parts
        self.documents = tokens.documents[sizes >= min_tokens]
        self.too_short = len(sizes) - len(self.documents)
        self.tokens = int(self.documents[:, 2].sum())
        if len(self.documents) == 0:
            raise BadInput(
                f"{tokens.source}: no document reaches {min_tokens} tokens (the longest has"
                f" {max(sizes, default=0)}); {remedy}"
            )
        self._weights = torch.from_numpy(self.documents[:, 2].astype(np.float64))

    def window(self, tokens: int, generator: torch.Generator) -> torch.Tensor:
        """A random run of `tokens` ids (int64) of one document (a long one more likely), or all of
        it where it is shorter."""
        chosen = int(torch.multinomial(self._weights, 1, generator=generator))
        part, begin, size = self.documents[chosen].tolist()
        offset = begin + int(torch.randint(max(size - tokens, 0) + 1, (1,), generator=generator))
        ids = self.parts[part][offset : min(offset + tokens, begin + size)]
        return torch.from_numpy(ids.astype(np.int64))
