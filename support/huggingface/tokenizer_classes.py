"""Tokenizers behind one face: encode, decode, token_bytes, bos_id, eos_id, adds_bos, vocab_size."""

import unicodedata
from pathlib import Path

import regex
import tiktoken

from support.system.bad_input import BadInput


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
            raise BadInput(f"{reason}; `pip install tokenizers` reads it") from None
        try:
            self._library = Library.from_file(str(path))
        except Exception as error:  # the library has no class of its own
            raise BadInput(f"{path} is damaged: {error}") from error
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
