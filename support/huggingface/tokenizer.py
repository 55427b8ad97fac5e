"""A checkpoint's tokenizer: encode, decode and the bytes of a token; ids equal to `tokenizers`.

Byte-level BPE behind the usual pre-tokenizers runs on the package `regex`, which splits the text,
and on tiktoken, which merges the pieces: see `split_pattern`; also tiktoken's own format
(tokenizer.model). Any other tokenizer.json goes through the optional package `tokenizers`.
Text is data: special tokens are never made from it, their strings are encoded as plain text.
"""

import base64
import contextlib
import functools
import itertools
import json
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import regex
import tiktoken

from support.huggingface.config import read_json
from support.system.bad_input import BadInput

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# With a Digits step in front, digits are pieces of their own, and white space may end at one.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@functools.cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable substitutes for bytes: character -> byte.

    >>> byte_alphabet()["A"], byte_alphabet()["Ġ"]  # Ġ represents the space
    (65, 32)
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


SURROGATES = regex.compile("[\ud800-\udfff]")

# ---- the two kinds of tokenizer ----------------------------------------------------------------


class Tokenizer:
    """encode(text) -> ids, no special tokens among them; decode(ids) -> text; token_bytes(id).

    `vocab_size`: largest id + 1. `bos_id`, `eos_id`: int or None. `eos_ids`: every id that ends a
    text (config files may name several). `adds_bos`: whether the checkpoint itself puts a BOS in
    front of a text. `added`: the added tokens, text -> id."""

    def __init__(self, tokens: dict[int, bytes], added: dict[str, int], settings: dict):
        self.added = added
        self._bytes = tokens | {i: text.encode() for text, i in added.items()}
        self.vocab_size = max(self._bytes) + 1
        self.bos_id, self.eos_id = (self._special_id(settings, name) for name in ("bos", "eos"))
        first = first_of_post_processor(settings)
        self.bos_id = self.bos_id if first is None else first
        ends = [self.eos_id] * (self.eos_id is not None) + settings.get("eos_ids", [])
        self.eos_ids = tuple(dict.fromkeys(ends))
        adds = first is not None or bool(settings.get("add_bos_token"))
        self.adds_bos = self.bos_id is not None and adds
        if self.adds_bos and self.bos_id not in self._bytes:
            raise BadInput(f"the tokenizer begins a text with id {self.bos_id}, which it lacks")

    def __eq__(self, other) -> bool:
        """Same tokens under the same ids. (How text is split may still differ.)"""
        return isinstance(other, Tokenizer) and self._bytes == other._bytes

    __hash__ = object.__hash__

    def _special_id(self, settings: dict, name: str) -> int | None:
        token = settings.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in self.added:
            return self.added[token]
        return next(iter(ids_in(settings.get(f"{name}_token_id"))), None)

    def encode(self, text: str, continued: bool = False) -> list[int]:
        """continued: the text goes on from an earlier one, so that a tokenizer that puts a space
        in front of each text puts none in front of this one. Half a surrogate pair is U+FFFD."""
        return self._encode(SURROGATES.sub("\ufffd", text), continued)

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; ids that no token has (padding of the vocabulary) are empty."""
        return self._bytes.get(int(token_id), b"")

    def decode(self, ids) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")


class ByteLevelTokenizer(Tokenizer):
    """Byte-level BPE. ranks: token bytes -> order of merging, the 256 bytes first; to_id: token
    bytes -> id; pattern: its matches and what lies between them are merged one by one."""

    def __init__(self, ranks, to_id: dict[bytes, int], pattern, nfc, added_tokens, settings):
        added = {token["content"]: token["id"] for token in added_tokens}
        super().__init__({i: t for t, i in to_id.items()}, added, settings)
        self._before, self._after = (  # normalisation
            AddedTokens([t for t in added_tokens if bool(t.get("normalized")) == normalized])
            for normalized in (False, True)
        )
        # subtle: ranks are not ids. A byte that the vocabulary lacks needs a rank all the same
        # (tiktoken panics otherwise); it is taken out of the text before merging.
        self._rank_to_id = [to_id.get(token, -1) for token in sorted(ranks, key=ranks.get)]
        self._lacking = bytes(b for b in range(256) if bytes([b]) not in to_id)
        self._bpe = tiktoken.Encoding("", pat_str="", mergeable_ranks=ranks, special_tokens={})
        # subtle: tiktoken could split as well, but panics at a million spaces in a row
        self._pieces = regex.compile(rf"{pattern}|(?:(?!{pattern})(?s:.))+")
        self._ids_of_word = functools.lru_cache(1 << 15)(self._merge)
        self._nfc = nfc

    def _encode(self, text: str, continued: bool) -> list[int]:
        def normalised(text: str) -> list[int]:
            text = unicodedata.normalize("NFC", text) if self._nfc else text
            return self._after.encode(text, self._encode_pieces)

        return self._before.encode(text, normalised)

    def _encode_pieces(self, text: str) -> list[int]:
        ids = []
        for match in self._pieces.finditer(text):
            piece = match.group()
            ids += self._ids_of_word(piece) if len(piece) < 32 else self._merge(piece)
        return ids

    def _merge(self, piece: str) -> list[int]:
        data = piece.encode().translate(None, self._lacking)
        ranks = self._bpe._encode_single_piece(data) if data else []
        return [self._rank_to_id[rank] for rank in ranks]


class AddedTokens:
    """Tokens that are one id wherever their text occurs: the leftmost first, and the longest of
    those that begin there. A special one takes the place of any inside it, but stays text."""

    def __init__(self, tokens: list[dict]):
        self._ids = {t["content"]: t["id"] for t in tokens if not t.get("special")}
        texts = sorted((t["content"] for t in tokens if t["content"]), key=len, reverse=True)
        self._find = regex.compile("|".join(map(regex.escape, texts))) if self._ids else None

    def encode(self, text: str, encode_rest: Callable[[str], list[int]]) -> list[int]:
        """The ids of a text; encode_rest gives those of what lies between the tokens."""
        ids, done = [], 0
        for match in self._find.finditer(text) if self._find else ():
            if match.group() in self._ids:
                ids += encode_rest(text[done : match.start()])
                ids.append(self._ids[match.group()])
                done = match.end()
        return ids + encode_rest(text[done:])


class LibraryTokenizer(Tokenizer):
    """Any other tokenizer.json, through the package `tokenizers`."""

    def __init__(self, data: dict, settings: dict, file: Path):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            why = "is not one of the byte-level BPEs that are read here"
            raise BadInput(f"{file} {why}; `pip install tokenizers` reads it") from None
        # settings for batches and for training must not change a text's ids
        data = data | {"truncation": None, "padding": None}
        data["model"] = data["model"] | ({"dropout": None} if "dropout" in data["model"] else {})
        steps = {name: without_prefix(data.get(name)) for name in ("normalizer", "pre_tokenizer")}
        with errors_of_library(f"{file} is damaged"):
            self._whole, self._continued = (
                Library.from_str(json.dumps(d)) for d in (data, data | steps)
            )
        for library in (self._whole, self._continued):
            library.encode_special_tokens = True  # text is data
        parts = ("normalizer", "pre_tokenizer", "decoder")
        kinds = {step.get("type") for name in parts for step in steps_of(data.get(name))}
        self._byte_level = "ByteLevel" in kinds
        vocabulary = self._whole.get_vocab(with_added_tokens=False)
        tokens = {i: bytes_of(token, data["model"], kinds) for token, i in vocabulary.items()}
        every = self._whole.get_added_tokens_decoder()
        super().__init__(tokens, {token.content: i for i, token in every.items()}, settings)

    def _encode(self, text: str, continued: bool) -> list[int]:
        library = self._continued if continued else self._whole
        # such as a character for which a vocabulary has no token
        with errors_of_library("the tokenizer cannot encode a text"):
            return library.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        if self._byte_level:  # the library would read added tokens as bytes too
            return super().decode(ids)
        return self._whole.decode([int(i) for i in ids], skip_special_tokens=False)


@contextlib.contextmanager
def errors_of_library(what: str) -> Iterator[None]:
    """`tokenizers` has no class of its own for errors, and its panics pass `except Exception`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BadInput(f"{what}: {error}") from error


def without_prefix(part):
    """A normalizer or pre-tokenizer that treats the beginning of a text like any other place."""
    if isinstance(part, list):
        return [without_prefix(inner) for inner in part]
    if not isinstance(part, dict):
        return part
    off = {"add_prefix_space": False, "prepend_scheme": "never", "prepend": "", "strip_left": False}
    return {name: off.get(name, without_prefix(value)) for name, value in part.items()}


def bytes_of(token: str, model: dict, kinds: set[str]) -> bytes:
    """The bytes that a token of a vocabulary spells; kinds: of the steps of its tokenizer."""
    alphabet = byte_alphabet()
    if "ByteLevel" in kinds and all(c in alphabet for c in token):
        return bytes(alphabet[c] for c in token)
    by_bytes = "ByteFallback" in kinds or model.get("byte_fallback")
    if by_bytes and regex.fullmatch("<0x[0-9A-F]{2}>", token):
        return bytes.fromhex(token[3:5])
    go_on = model.get("continuing_subword_prefix") or ""  # "##ing" goes on with a word
    end = model.get("end_of_word_suffix") or ""  # "word</w>" ends one
    if model.get("type") == "WordPiece" and not token.startswith(go_on):
        token = " " + token
    if end and token.endswith(end):
        token = token.removesuffix(end) + " "
    return token.removeprefix(go_on).replace("▁", " ").encode(errors="replace")


# ---- reading the files -------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. BadInput names what is not supported."""
    path, settings, ends = Path(path), {}, []
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        if (path / name).is_file():
            found = read_json(path / name)
            ends += ids_in(found.get("eos_token_id"))
            settings |= found
    settings["eos_ids"] = ends
    file = path / "tokenizer.json"
    if not file.is_file():
        if (path / "tokenizer.model").is_file():
            return from_tiktoken_file(path / "tokenizer.model", settings)
        raise BadInput(f"{path} holds no tokenizer.json and no tokenizer.model")
    data = read_json(file)
    try:
        settings["post_processor"] = data.get("post_processor")
        if (pattern := split_pattern(data)) is None:
            return LibraryTokenizer(data, settings, file)
        return from_bpe(data, pattern, settings)
    except BadInput:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, regex.error) as e:
        raise BadInput(f"{file} is damaged: {e!r}") from e


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """BadInput if the model's vocabulary lacks some of the tokenizer's ids."""
    if tokenizer.vocab_size > vocab_size:
        beyond = [f"{text!r} has id {i}" for text, i in tokenizer.added.items() if i >= vocab_size]
        added = f", or the embedding was not resized for an added token ({', '.join(beyond[:3])})"
        raise BadInput(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only"
            f" {vocab_size}: they do not belong together{added if beyond else ''}"
        )


def from_bpe(data: dict, pattern: str, settings: dict) -> Tokenizer:
    """data: of tokenizer.json; pattern: see split_pattern. BadInput if merges do not fit."""
    model, alphabet = data["model"], byte_alphabet()
    to_id = {
        bytes(alphabet[c] for c in token): i
        for token, i in model["vocab"].items()
        if all(c in alphabet for c in token)  # no text gives any other, except as added tokens
    }
    ids = model["vocab"].values()
    if odd := [i for i in ids if type(i) is not int or not 0 <= i < 2**31]:
        raise BadInput(f"tokenizer.json: {str(odd[0])[:50]} is no id: 0 to 2^31 - 1 are")
    ranks = {bytes([b]): b for b in range(256)}
    # subtle: tiktoken ranks the merged token, `tokenizers` the pair. The ids are the same, except
    # for hand-made merges that no training gives: with "b c", "a b", "ab c", abc is not a + bc.
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(bytes(alphabet[c] for c in left + right), len(ranks))
    # subtle: `tokenizers` ignores the "id" of an added token: it counts on from the vocabulary, so
    # where the ids of a file have a gap it gives others
    tokens = {t["content"]: t for t in data.get("added_tokens") or [] if t["content"]}
    new = [content for content in tokens if content not in model["vocab"]]
    new_id = {content: i for i, content in enumerate(new, len(model["vocab"]))}
    added = [t | {"id": (model["vocab"] | new_id)[content]} for content, t in tokens.items()]
    if model.get("ignore_merges"):  # whole pieces of the vocabulary need no merges
        special = {token["id"] for token in added if token.get("special")}
        for token in sorted(to_id, key=to_id.get):
            if to_id[token] not in special:
                ranks.setdefault(token, len(ranks))
    unknown = [t for t in ranks if len(t) > 1 and t not in to_id]
    if unknown or not to_id:
        raise BadInput(f"tokenizer.json: merges make tokens beyond the vocabulary: {unknown[:3]}")
    nfc = bool(steps_of(data.get("normalizer")))
    return ByteLevelTokenizer(ranks, to_id, pattern, nfc, added, settings)


def from_tiktoken_file(path: Path, settings: dict) -> Tokenizer:
    """tokenizer.model as Llama 3 ships it: a token in base64 and its rank on each line."""
    try:
        lines = path.read_bytes().splitlines()
        ranks = {base64.b64decode(t, validate=True): int(i) for t, i in map(bytes.split, lines)}
    except ValueError as error:
        raise BadInput(
            f"{path} is not in tiktoken's format (SentencePiece?): a tokenizer.json is needed"
        ) from error
    # subtle: tiktoken panics, past `except Exception`, where a rank occurs twice or a byte has none
    if sorted(ranks.values()) != list(range(len(ranks))) or sum(len(t) == 1 for t in ranks) != 256:
        raise BadInput(f"{path} is damaged: its ranks are not 0, 1, 2, ... with every byte in it")
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    added = [{"content": n, "id": len(ranks) + i, "special": True} for i, n in enumerate(names)]
    settings = {"add_bos_token": True, "bos_token": names[0], "eos_token": names[1]} | settings
    return ByteLevelTokenizer(ranks, ranks, LLAMA3_SPLIT, False, added, settings)


def steps_of(section: dict | None) -> list[dict]:
    """The steps of a section of tokenizer.json, those of a Sequence one by one."""
    if not section:
        return []
    if section.get("type") != "Sequence":
        return [section]
    kinds = ("normalizers", "pretokenizers", "decoders", "processors")
    names = [n for n in kinds if n in section]
    return [step for part in section[names[0]] for step in steps_of(part)]


# What `regex` and Oniguruma, by which `tokenizers` splits, may read differently: sets in sets,
# anchors, possessive or lazy bounds, groups that capture or set flags, rarer escapes.
DIFFERENT = regex.compile(
    r"&&|--|\[[^\]\\]*\[|(?<!\[)\^|\$|\{\d+,?\d*\}[+?]"
    r"|(?<!\\)\((?!\?(?:i?:|=|!|<[=!]))|\\(?![pPsSrnt]|\W)"
)


def split_pattern(data: dict) -> str | None:
    """The pattern by which a byte-level BPE splits its text. None for any other tokenizer, and for
    settings that only `tokenizers` knows."""
    model, steps = data["model"], steps_of(data.get("pre_tokenizer"))
    if any(step.get("type") != "NFC" for step in steps_of(data.get("normalizer"))):
        return None
    others = ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model.get("type", "BPE") != "BPE" or any(model.get(name) for name in others):
        return None
    if model.get("unk_token") is not None and not set(byte_alphabet()) <= set(model["vocab"]):
        return None
    flags = ["lstrip", "rstrip", "single_word"] + ["normalized"] * bool(data.get("normalizer"))
    for token in data.get("added_tokens") or []:
        if not token.get("special") and any(token.get(flag) for flag in flags):
            return None
    kinds = [step.get("type") for step in steps]
    if kinds[-1:] != ["ByteLevel"] or steps[-1].get("add_prefix_space"):
        return None
    first, by_regex = steps[0], steps[-1].get("use_regex", True)
    if kinds == ["ByteLevel"] and by_regex:
        return GPT2_SPLIT
    if kinds == ["Digits", "ByteLevel"] and by_regex:
        return DIGITS_SPLIT % (r"\p{N}" if first.get("individual_digits") else r"\p{N}+")
    isolated = first.get("behavior") == "Isolated" and not first.get("invert")
    pattern = (first.get("pattern") or {}).get("Regex")
    plain = kinds == ["Split", "ByteLevel"] and not by_regex and isolated and pattern
    understood = plain and not DIFFERENT.search(pattern) and not regex.match(pattern, "")
    return pattern if understood else None


def ids_in(value) -> list[int]:
    """The ids that a config file names: one, several or none."""
    values = value if isinstance(value, list) else [value]
    return [i for i in values if type(i) is int and i >= 0]


def first_of_post_processor(settings: dict) -> int | None:
    """The id that the tokenizer's own post-processor puts in front of a single text, if any: that
    of BOS, whatever the config files say. BadInput if it puts several there."""
    for step in steps_of(settings.get("post_processor")):
        if step.get("type") in ("BertProcessing", "RobertaProcessing"):
            return step["cls"][1]
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            front = itertools.takewhile(lambda part: "SpecialToken" in part, step["single"])
            names = [part["SpecialToken"].get("id") for part in front]
            ids = [i for name in names for i in ids_in(step["special_tokens"][name]["ids"])]
            if len(ids) > 1:
                raise BadInput(
                    f"the tokenizer begins a text with {names}, ids {ids}: one is supported"
                )
            if ids:
                return ids[0]
    return None
