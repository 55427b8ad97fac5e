"""Documents as arrays of token ids: which files are read, how, and what a sample is drawn from.

docs/running.md has the table of the kinds of files, and names the few things that memory holds as a
whole; all else is read in pieces. Any other file is refused; in a folder it is left out, and the
log says how many of which kind.
"""

import bz2
import collections
import contextlib
import gzip
import io
import itertools
import json
import lzma
import os
import tempfile
import zlib
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch

from support.huggingface.config import check_no_pointer, parse_json
from support.system.bad_input import BadInput, not_utf8
from support.system.console import log

SEPARATOR = "\n\n\n"  # between texts that are joined
PIECE = 1 << 18  # characters of a text that are read at a time
PLAIN = (".txt", ".text", ".md", ".rst")
RECORDS = (".jsonl", ".ndjson", ".json")
IDS = (".npy", ".bin")
PACKED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
ARCHIVES = (".zip", ".zst", ".tar", ".tgz", ".7z", ".rar")


# ---- which files are read ----------------------------------------------------------------------


def kind_of(file: Path) -> str:
    """The suffix that says how a file is read, in lower case; of a packed file the one before.

    >>> kind_of(Path("A.JSONL")), kind_of(Path("a.jsonl.gz")), kind_of(Path("a.zip"))
    ('.jsonl', '.jsonl', '.zip')
    """
    return (file.with_suffix("") if file.suffix.lower() in PACKED else file).suffix.lower()


def is_read(file: Path) -> bool:
    return kind_of(file) in PLAIN + RECORDS or file.suffix.lower() in IDS


def find_files(paths: list[str], say: bool = False) -> list[Path]:
    """The files of `paths`; folders are searched. BadInput names what is missing or of no kind
    that is read here. say: log what of each folder is read, and what is left out."""
    if not paths:
        raise BadInput("no file and no folder of texts is given (--data)")
    files = []
    for path in map(Path, paths):
        if not path.exists():
            raise BadInput(f"{path} does not exist (a file or a folder is needed)")
        if path.is_dir():
            found = files_below(path)
            read = [file for file in found if is_read(file)]
            left = counted([file for file in found if not is_read(file)])
            left_out = f"; left out: {left}" if left else ""
            if not read:
                kinds = ", ".join(PLAIN + RECORDS + IDS)
                raise BadInput(f"folder {path} holds no file of {kinds}{left_out}")
            if say:
                log(f"folder {path}: {counted(read)}{left_out}")
            files += read
        elif kind_of(path) and not is_read(path):
            raise BadInput(f"{path}: {path.suffix} files are not read; {way_out(path)}")
        else:
            files.append(path)
    return files


def check_outside(flag: str, folder: str, paths: Iterable[str]) -> None:
    """BadInput if a folder that is written is inside one that is read, and not hidden there: the
    next time its files would be taken for texts, and a run could not be resumed."""
    written = Path(folder).resolve()
    for path in paths:
        read = Path(path).resolve()
        if not read.is_dir() or not written.is_relative_to(read):
            continue
        if not any(part.startswith(".") for part in written.relative_to(read).parts):
            raise BadInput(f"{flag} {folder} is inside {path}, which is read: give another {flag}")


def way_out(file: Path) -> str:
    """What to do with a file that is not read, for an error message."""
    if file.suffix.lower() in (*ARCHIVES, *PACKED):
        return "unpack it first"
    if kind_of(file) in (".parquet", ".arrow", ".csv", ".tsv"):
        return 'write its texts to a .jsonl, {"text": ...} in each line (pandas: to_json)'
    if kind_of(file) in (".npz", ".pt", ".pth", ".safetensors", ".pkl"):
        return f"save its token ids as {file.stem}.npy"
    return f"save its text as plain text, for instance as {file.stem}.txt"


def files_below(folder: Path, seen: set[Path] | None = None) -> list[Path]:
    """All files of a folder and the folders in it, sorted; not the hidden ones. Links are followed,
    into each folder once; one that leads nowhere is among the files: reading it is an error."""
    seen = {folder.resolve()} if seen is None else seen
    found = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            if (target := path.resolve()) not in seen:
                seen.add(target)
                found += files_below(path, seen)
        elif path.is_file() or path.is_symlink():
            found.append(path)
    return found


def counted(files: list[Path]) -> str:
    """How many files there are of each suffix.

    >>> counted([Path("a.md"), Path("b.jsonl.gz"), Path("c.md")])
    '1 .jsonl.gz, 2 .md'
    """
    kinds = [kind_of(f) + f.suffix.lower() * (f.suffix.lower() in PACKED) for f in files]
    counts = sorted(collections.Counter(kinds).items())
    return ", ".join(f"{n} {kind or 'without a suffix'}" for kind, n in counts)


# ---- text files --------------------------------------------------------------------------------


def read_texts(files: list[Path]) -> Iterator[Iterator[str]]:
    """The documents of files of text or records, each as an iterator over its pieces.

    BadInput names the file, and the line or record, that cannot be read."""
    for file in files:
        if kind_of(file) in IDS:
            raise BadInput(f"{file} holds token ids where text is needed")
        if kind_of(file) in RECORDS:
            yield from (pieces_of(io.StringIO(text)) for text in read_records(file))
        else:
            yield read_pieces(file)


def pieces_of(stream) -> Iterator[str]:
    """A text of any length in pieces, cut anywhere: encode_pieces puts the tokens together."""
    return iter(lambda: stream.read(PIECE), "")


@contextlib.contextmanager
def opened(file: Path, mode: str, **options) -> Iterator:
    """An open file, unpacked while it is read. BadInput names one that is not what its suffix says
    or that is damaged."""
    try:
        if file.is_file():  # a pipe can be read only once
            check_no_pointer(file)
        with PACKED.get(file.suffix.lower(), open)(file, mode, **options) as stream:
            yield stream
    except UnicodeDecodeError as error:
        raise not_utf8(file, error) from error
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not a library's
            raise
        raise BadInput(f"{file} is damaged or not a {file.suffix} file: {error}") from error


def read_pieces(file: Path) -> Iterator[str]:
    """A text file in pieces of a megabyte at most."""
    with opened(file, "rt", encoding="utf-8-sig") as stream:
        for piece in pieces_of(stream):
            if "\0" in piece:
                raise BadInput(f"{file} holds zero bytes: it is not plain text in UTF-8")
            yield piece


def read_records(file: Path) -> Iterator[str]:
    """The texts of a file of JSON objects: one in each line, or (.json) one value for all."""
    one_value = kind_of(file) == ".json"
    with opened(file, "rb") as stream:
        if one_value:
            with contextlib.suppress(BadInput):  # the first line may be a record of its own
                one_value = not isinstance(parse_json(stream.readline(), file), dict)
            stream.seek(0)
        if one_value:
            value = parse_json(stream.read(), file)
            for number, record in enumerate(value if isinstance(value, list) else [value], 1):
                yield text_of(record, f"{file}, record {number}")
        else:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    where = f"{file}, line {number}"
                    yield text_of(parse_json(line, where), where)


def text_of(record, where: str) -> str:
    """The "text" of a record. BadInput names `where` it is from, and what it holds instead."""
    if not isinstance(record, dict):
        found = type(record).__name__
    elif "text" not in record:
        found = f"the keys {', '.join(map(repr, record))[:100] or 'none'}"
    elif isinstance(record["text"], str):
        return record["text"]
    else:
        found = f'a "text" that is {json.dumps(record["text"])[:20]}'
    raise BadInput(f'{where}: not a JSON object with a "text": it has {found}')


# ---- token ids ---------------------------------------------------------------------------------


def read_tokens(file: Path, vocab_size: int) -> np.ndarray:
    """Token ids of a .npy file (1-D: one document; 2-D: one a row) or a .bin file (one document;
    uint16 where the vocabulary fits, else uint32), mapped, not read into memory.

    BadInput says why the file cannot hold ids of this vocabulary."""
    if file.stat().st_size == 0:
        raise BadInput(f"{file} is empty")
    if file.suffix.lower() == ".bin":
        dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
        if file.stat().st_size % dtype.itemsize:
            raise BadInput(f"{file} does not hold whole {dtype.name} token ids")
        ids = np.memmap(file, dtype=dtype, mode="r")
        if len(ids) > 3 and not ids[1::2].any():
            raise BadInput(
                f"{file}: read as {dtype.name}, every second id is 0, so its ids must be wider;"
                " save them as .npy, which says how wide they are"
            )
    else:
        try:
            ids = np.lib.format.open_memmap(file, mode="r")
        except ValueError as error:  # numpy raises this for a damaged file
            raise BadInput(f"{file} is not an array of token ids: {error}") from None
    if ids.dtype.kind not in "iu" or ids.ndim not in (1, 2) or ids.size == 0:
        raise BadInput(f"{file} holds {ids.dtype} {ids.shape}, token ids are (N,) or (n, N)")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocab_size:
        raise BadInput(
            f"{file} holds ids {low} to {high}, the tokenizer has {vocab_size}: are they"
            f" another tokenizer's, or not stored as {ids.dtype.name}?"
        )
    return ids


TAIL = 4096  # characters that are encoded on both sides of a border
SURE, KINDS = 16, 4  # tokens in a row, and how many of them differ, where parts may be joined


def encode_pieces(pieces: Iterable[str], tokenizer, continued: bool = False) -> Iterator[list[int]]:
    """The ids of the text that the pieces make up, in parts, without ever holding all of it.

    A token may reach over the border of two pieces, and what is beside it may decide where a token
    ends. So the last TAIL characters before a border are encoded three times: after what precedes
    them, alone, and before what follows. Tokens that are the same each time depend on neither side;
    if there are SURE of them in a row, the parts are joined in their middle. Else (one character
    repeated a million times, say) the pieces are encoded together, and memory grows with their
    length. continued: see Tokenizer.encode.

    subtle: a Unigram model may divide "-----" into "---" "--" or "--" "---", which are equally
    likely; rounding decides, and so does the length of the whole run. Hence KINDS. (In a long text
    of hundreds of such runs some may still be divided the other way round.)"""
    pieces = iter(pieces)
    text = next(pieces, "")
    ids, done = tokenizer.encode(text, continued), 0  # of text; how many of them were yielded
    # where no place is found, the next try comes at twice the length
    while following := take(pieces, len(text) - TAIL):
        tail = text[-TAIL:]
        alone = tokenizer.encode(tail, continued=True)
        behind = tokenizer.encode(tail + following, continued=True)
        place = certain_place(ids[max(done, len(ids) - len(alone)) :], alone, behind)
        if place is not None:
            yield ids[done : len(ids) - len(alone) + place]
            text, ids, done, continued = tail + following, behind, place, True
        else:
            text += following
            ids = tokenizer.encode(text, continued)
    yield ids[done:]


def certain_place(before: list[int], alone: list[int], behind: list[int]) -> int | None:
    """A place in `alone`, which should end `before` and begin `behind`, around which all three have
    the same SURE tokens, of at least KINDS kinds; the one in the middle of all such places."""
    # in spite of its name, commonprefix takes any lists
    first = len(alone) - len(os.path.commonprefix((before[::-1], alone[::-1])))
    last = len(os.path.commonprefix((alone, behind)))
    half = SURE // 2
    places = range(first + half, last - half + 1)
    varied = [p for p in places if len(set(alone[p - half : p + half])) >= KINDS]
    return min(varied, key=lambda place: abs(place - (first + last) // 2), default=None)


def take(pieces: Iterator[str], characters: int) -> str:
    """The next pieces, together at least so many characters, or all that are left."""
    taken = ""
    while len(taken) < max(1, characters) and (piece := next(pieces, None)) is not None:
        taken += piece
    return taken


class Tokens:
    """All documents as token ids: `parts` are flat arrays, `documents` (n, 3) int64 says of each in
    which part it is, where it begins there, and how many tokens it has.

    Encoded text goes to an unnamed temporary file: memory stays flat however much there is."""

    def __init__(self, source: str):
        self.source, self.parts, self._rows = source, [], array("q")

    @property
    def documents(self) -> np.ndarray:
        return np.array(self._rows, dtype=np.int64).reshape(-1, 3)

    def add_array(self, ids: np.ndarray) -> None:
        """Token ids (N,), one document, or (n, N), n of them."""
        rows = 1 if ids.ndim == 1 else len(ids)
        size = ids.size // rows
        for i in range(rows):
            self._rows.extend((len(self.parts), i * size, size))
        self.parts.append(ids.reshape(-1))

    def add_texts(self, texts: Iterable[Iterable[str]], tokenizer, join: bool = False) -> None:
        """Texts, each in pieces: documents of their own, or (join) one document together."""
        store, total, begin = tempfile.TemporaryFile(), 0, 0  # noqa: SIM115 (its map needs it)
        separator = tokenizer.encode(SEPARATOR, continued=True)
        for i, pieces in enumerate(texts):
            parts = encode_pieces(pieces, tokenizer, continued=join and i > 0)
            for ids in itertools.chain([separator] if join and i else [], parts):
                store.write(np.array(ids, dtype=np.int32).tobytes())
                total += len(ids)
            if not join:
                self._rows.extend((len(self.parts), begin, total - begin))
                begin = total
        if join:
            self._rows.extend((len(self.parts), 0, total))
        store.flush()
        if total:  # an empty file cannot be mapped, and no row then points into it
            self.parts.append(np.memmap(store, dtype=np.int32, mode="r", shape=(total,)))


def read_files(paths: list[str], tokenizer, join: bool) -> Tokens:
    """The documents of files and folders; see sources.load_tokens."""
    tokens, files = Tokens(", ".join(map(str, paths))), find_files(paths, say=True)
    texts = [file for file in files if kind_of(file) not in IDS]
    tokens.add_texts(read_texts(texts), tokenizer, join)
    for file in (file for file in files if kind_of(file) in IDS):
        tokens.add_array(read_tokens(file, tokenizer.vocab_size))
    return tokens


class Corpus:
    """Documents of at least min_tokens tokens, shorter ones are counted; `window` draws from them.

    remedy: which of the caller's flags help if no document is long enough (part of BadInput)."""

    at_spaces = False  # whether segments end at spaces as well: for texts without sentence ends

    def __init__(self, tokens: Tokens, min_tokens: int, remedy: str = "give longer texts"):
        sizes = tokens.documents[:, 2]
        self.source, self.parts = tokens.source, tokens.parts
        self.documents = tokens.documents[sizes >= max(1, min_tokens)]
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

    def summary(self) -> str:
        """Where the documents are from, how many tokens are used, and what was left out."""
        return f"{self.source}: {self.tokens:,} tokens, {self.too_short} documents too short"
