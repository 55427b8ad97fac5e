"""tokenizer.json read into tiktoken: byte-level BPE, ids equal to those of the `tokenizers`
library.

Supported: normalizer none or NFC; pre-tokenizer ByteLevel, Digits + ByteLevel, or Split +
ByteLevel. Text is data: the strings of special tokens inside a text are encoded as plain text.
"""

import json
import unicodedata
from pathlib import Path

import regex
import tiktoken

from support.config_files import read_json

GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# With a Digits step in front, digits are pieces of their own, and a run of white space may end at
# one.
DIGITS_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+|%s| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"


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

    `bos_id`, `eos_id`: int or None. `adds_bos`: whether the checkpoint itself puts a BOS in
    front."""

    def __init__(self, path: str | Path):
        path = Path(path)
        if not (path / "tokenizer.json").is_file():
            raise ValueError(f"{path} holds no tokenizer.json")
        data = read_json(path / "tokenizer.json")
        model = data.get("model") or {}
        pattern = split_pattern(data.get("pre_tokenizer"), path)
        self._nfc = normalizer_is_nfc(data.get("normalizer"), path)
        if model.get("type", "BPE") != "BPE" or model.get("byte_fallback"):
            raise ValueError(f"{path}: tokenizer model {model.get('type')!r} is not byte-level BPE")
        alphabet = byte_alphabet()
        vocab: dict[str, int] = model.get("vocab") or {}
        added = {int(t["id"]): t for t in data.get("added_tokens", [])}

        def to_bytes(token: str) -> bytes:
            return bytes(alphabet[c] for c in token)

        # subtle: tiktoken wants ranks in merge order, and those are not the ids of the
        # vocabulary. So: the 256 bytes first, then the merges in order, and a table from rank to
        # id. A byte that the vocabulary lacks still needs a rank (tiktoken panics otherwise); it
        # is taken out of the text before merging.
        by_bytes = {to_bytes(t): i for t, i in vocab.items() if i not in added}
        ranks = {bytes([b]): b for b in range(256)}
        for merge in model.get("merges", []):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            ranks.setdefault(to_bytes(left + right), len(ranks))
        unknown = [t for t in ranks if len(t) > 1 and t not in by_bytes]
        if unknown or not vocab:
            raise ValueError(
                f"{path}: merges make tokens that the vocabulary lacks, e.g. {unknown[:3]}"
            )
        self._rank_to_id = [by_bytes.get(token, -1) for token in ranks]
        self._lacking = bytes(b for b in range(256) if bytes([b]) not in by_bytes)
        self._bpe = tiktoken.Encoding(
            path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens={}
        )
        self._split = regex.compile(pattern)
        self._bytes = {i: t for t, i in by_bytes.items()}
        self._bytes |= {i: t["content"].encode() for i, t in added.items()}
        self.vocab_size = max(self._bytes) + 1

        config = {}
        for name in ("generation_config.json", "config.json", "tokenizer_config.json"):
            if (path / name).is_file():
                config |= read_json(path / name)
        content_to_id = {t["content"]: i for i, t in added.items()}
        self.bos_id = special_id(config, "bos", content_to_id)
        self.eos_id = special_id(config, "eos", content_to_id)
        self.adds_bos = self.bos_id is not None and (
            bool(config.get("add_bos_token")) or post_processor_adds(data, self.bos_id)
        )

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

    def token_bytes(self, token_id: int) -> bytes:
        """Bytes of one token; ids that no token has (padding of the vocabulary) are empty."""
        return self._bytes.get(int(token_id), b"")

    def decode(self, ids) -> str:
        return b"".join(self.token_bytes(i) for i in ids).decode("utf-8", errors="replace")


def split_pattern(pre: dict | None, path: Path) -> str:
    steps = pre.get("pretokenizers", [pre]) if pre else []
    kinds = [step.get("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel" and not steps[-1].get("add_prefix_space"):
        if kinds == ["ByteLevel"]:
            return GPT2_SPLIT
        if kinds == ["Digits", "ByteLevel"] and steps[1].get("use_regex", True):
            return DIGITS_SPLIT % (r"\p{N}" if steps[0].get("individual_digits") else r"\p{N}+")
        split = steps[0]
        pattern = split.get("pattern", {})
        isolated = split.get("behavior") == "Isolated" and not split.get("invert")
        plain_bytes = kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True)
        if plain_bytes and isolated and "Regex" in pattern:
            return pattern["Regex"]
    raise ValueError(
        f"{path}: pre-tokenizer {json.dumps(pre)[:120]} is not supported"
        " (ByteLevel, Digits + ByteLevel and Split + ByteLevel are)"
    )


def normalizer_is_nfc(normalizer: dict | None, path: Path) -> bool:
    kind = normalizer.get("type") if normalizer else None
    if kind not in (None, "NFC"):
        raise ValueError(f"{path}: normalizer {kind!r} is not supported (none and NFC are)")
    return kind == "NFC"


def special_id(config: dict, which: str, content_to_id: dict[str, int]) -> int | None:
    token = config.get(f"{which}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if token in content_to_id:
        return content_to_id[token]
    token_id = config.get(f"{which}_token_id")
    return token_id[0] if isinstance(token_id, list) else token_id


def post_processor_adds(data: dict, bos_id: int) -> bool:
    """Does the tokenizer's own template start a single text with the BOS token?"""
    post = data.get("post_processor") or {}
    for step in post.get("processors", [post]):
        if step.get("type") == "TemplateProcessing" and step.get("single"):
            name = step["single"][0].get("SpecialToken", {}).get("id")
            if bos_id in step.get("special_tokens", {}).get(name, {}).get("ids", []):
                return True
    return False


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder. ValueError names what is not supported."""
    return Tokenizer(path)
