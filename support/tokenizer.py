"""A checkpoint's tokenizer, read into tiktoken: byte-level BPE, ids equal to those of `tokenizers`.

Supported here: normalizer none or NFC; pre-tokenizer ByteLevel, Digits + ByteLevel, or Split +
ByteLevel (tokenizer.json), and tiktoken's own format (tokenizer.model). Other kinds (SentencePiece
style) go through the optional package `tokenizers`.
Text is data: the strings of special tokens inside a text are encoded as plain text.
"""

import json
import unicodedata
from pathlib import Path

import regex
import tiktoken
from tiktoken.load import load_tiktoken_bpe

from support.config_files import read_json

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# With a Digits step in front, digits are pieces of their own, and white space may end at one.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character -> byte.

    >>> byte_alphabet()["A"], byte_alphabet()["Ġ"]  # Ġ stands for the space
    (65, 32)
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


class Tokenizer:
    """encode(text) -> ids without special tokens; decode(ids) -> text; token_bytes(id) -> bytes.

    `vocab_size`: largest id + 1. `bos_id`, `eos_id`: int or None. `adds_bos`: whether the
    checkpoint itself puts a BOS in front of a text."""

    def __init__(self, tokens: dict[int, bytes], special: dict[str, int], settings: dict):
        self._bytes = tokens | {i: text.encode() for text, i in special.items()}
        self.vocab_size = max(self._bytes) + 1
        self.bos_id = special_id(settings, "bos", special)
        self.eos_id = special_id(settings, "eos", special)
        adds = settings.get("add_bos_token") or post_processor_adds(settings, self.bos_id)
        self.adds_bos = self.bos_id is not None and bool(adds)

    def __eq__(self, other) -> bool:
        """Same tokens under the same ids. (How text is split may still differ.)"""
        return isinstance(other, Tokenizer) and self._bytes == other._bytes

    __hash__ = object.__hash__

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; ids that no token has (padding of the vocabulary) are empty."""
        return self._bytes.get(int(token_id), b"")

    def decode(self, ids) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")


class ByteLevelTokenizer(Tokenizer):
    """Byte-level BPE in tiktoken. ranks: token bytes -> order of merging, the 256 bytes first."""

    def __init__(self, ranks, to_id: dict[bytes, int], pattern: str, nfc: bool, special, settings):
        super().__init__({i: t for t, i in to_id.items()}, special, settings)
        # subtle: ranks are not ids. A byte that the vocabulary lacks needs a rank all the same
        # (tiktoken panics otherwise); it is taken out of the text before merging.
        self._rank_to_id = [to_id.get(token, -1) for token in sorted(ranks, key=ranks.get)]
        self._lacking = bytes(b for b in range(256) if bytes([b]) not in to_id)
        self._bpe = tiktoken.Encoding(
            "checkpoint", pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self._split, self._nfc = regex.compile(pattern), nfc

    def encode(self, text: str) -> list[int]:
        if self._nfc:
            text = unicodedata.normalize("NFC", text)
        raw = text.encode("utf-8", errors="surrogatepass")
        if len(raw.translate(None, self._lacking)) == len(raw):
            ranks = self._bpe.encode_ordinary(text)
        else:
            ranks = []
            for piece in self._split.findall(text):
                kept = piece.encode("utf-8", errors="replace").translate(None, self._lacking)
                ranks += self._bpe._encode_single_piece(kept) if kept else []
        return [self._rank_to_id[r] for r in ranks]


class LibraryTokenizer(Tokenizer):
    """Any other tokenizer.json, through the package `tokenizers`."""

    def __init__(self, path: Path, special: dict[str, int], settings: dict, reason: str):
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ValueError(f"{reason}; `pip install tokenizers` reads it") from None
        self._library = Library.from_file(str(path))
        self._library.encode_special_tokens = True  # text is data
        vocabulary = self._library.get_vocab(with_added_tokens=False)
        super().__init__({i: piece_bytes(t) for t, i in vocabulary.items()}, special, settings)

    def encode(self, text: str) -> list[int]:
        return self._library.encode(text, add_special_tokens=False).ids

    def decode(self, ids) -> str:
        return self._library.decode([int(i) for i in ids], skip_special_tokens=False)


def piece_bytes(piece: str) -> bytes:
    """SentencePiece's way of writing bytes and spaces.

    >>> piece_bytes("<0x0A>"), piece_bytes("▁the")
    (b'\\n', b' the')
    """
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
        return bytes.fromhex(piece[3:5])
    return piece.replace("▁", " ").encode()


# ---- reading the files -------------------------------------------------------------------------


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. ValueError names what is not supported."""
    path, settings = Path(path), {}
    for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
        if (path / name).is_file():
            settings |= read_json(path / name)
    if not (path / "tokenizer.json").is_file():
        if (path / "tokenizer.model").is_file():
            return from_tiktoken_file(path / "tokenizer.model", settings)
        raise ValueError(f"{path} holds no tokenizer.json and no tokenizer.model")
    data = read_json(path / "tokenizer.json")
    try:
        special = {t["content"]: int(t["id"]) for t in data.get("added_tokens") or []}
        settings["post_processor"] = data.get("post_processor")
        pattern, reason = split_pattern(data)
        if pattern is None:
            reason = f"{path}: {reason} is not byte-level BPE"
            return LibraryTokenizer(path / "tokenizer.json", special, settings, reason)
        return from_bpe(data["model"], pattern, data.get("normalizer"), special, settings)
    except (KeyError, TypeError, AttributeError, regex.error) as error:
        raise ValueError(f"{path / 'tokenizer.json'} is damaged: {error!r}") from error


def from_bpe(model: dict, pattern: str, normalizer, special: dict, settings: dict) -> Tokenizer:
    alphabet, added = byte_alphabet(), set(special.values())
    to_id = {
        bytes(alphabet[c] for c in token): i
        for token, i in model["vocab"].items()
        if i not in added
    }
    ranks = {bytes([b]): b for b in range(256)}
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(bytes(alphabet[c] for c in left + right), len(ranks))
    if model.get("ignore_merges"):  # whole pieces of the vocabulary need no merges
        for token in sorted(to_id, key=to_id.get):
            ranks.setdefault(token, len(ranks))
    unknown = [t for t in ranks if len(t) > 1 and t not in to_id]
    if unknown or not to_id:
        raise ValueError(f"tokenizer.json: merges make tokens beyond the vocabulary: {unknown[:3]}")
    return ByteLevelTokenizer(ranks, to_id, pattern, normalizer is not None, special, settings)


def from_tiktoken_file(path: Path, settings: dict) -> Tokenizer:
    """tokenizer.model as Llama 3 ships it: a token in base64 and its rank on each line."""
    try:
        ranks = load_tiktoken_bpe(str(path))
    except ValueError as error:
        raise ValueError(
            f"{path} is not in tiktoken's format (SentencePiece?): a tokenizer.json is needed"
        ) from error
    names = ["<|begin_of_text|>", "<|end_of_text|>"]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    settings = {"add_bos_token": True, "bos_token": names[0], "eos_token": names[1]} | settings
    return ByteLevelTokenizer(ranks, ranks, LLAMA3_SPLIT, False, special, settings)


def split_pattern(data: dict) -> tuple[str | None, str]:
    """(pattern for tiktoken, "") or (None, what stands in the way)."""
    normalizer = (data.get("normalizer") or {}).get("type", "NFC")
    if normalizer != "NFC":
        return None, f"normalizer {normalizer}"
    model = data["model"]
    if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
        return None, f"a {model.get('type')} model"
    pre = data.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", [pre])
    kinds = [step.get("type") for step in steps]
    first, last = steps[0], steps[-1]
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space"):
        if kinds == ["ByteLevel"] and last.get("use_regex", True):
            return GPT2_SPLIT, ""
        if kinds == ["Digits", "ByteLevel"] and last.get("use_regex", True):
            return DIGITS_SPLIT % (r"\p{N}" if first.get("individual_digits") else r"\p{N}+"), ""
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        pattern = (first.get("pattern") or {}).get("Regex")
        plain = kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True)
        if plain and isolated and pattern:
            return pattern, ""
    return None, f"pre-tokenizer {json.dumps(pre)[:100]}"


def special_id(settings: dict, which: str, special: dict[str, int]) -> int | None:
    token = settings.get(f"{which}_token")
    token = token.get("content") if isinstance(token, dict) else token
    if token in special:
        return special[token]
    token_id = settings.get(f"{which}_token_id")
    return token_id[0] if isinstance(token_id, list) else token_id


def post_processor_adds(settings: dict, bos_id: int | None) -> bool:
    """Does the tokenizer's own template start a single text with the BOS token?"""
    post = settings.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            name = step["single"][0].get("SpecialToken", {}).get("id")
            if bos_id in step.get("special_tokens", {}).get(name, {}).get("ids", []):
                return True
    return False
