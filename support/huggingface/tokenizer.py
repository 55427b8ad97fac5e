"""A checkpoint's tokenizer, read into tiktoken: byte-level BPE, ids equal to those of `tokenizers`.

Supported here: normalizer none or NFC; pre-tokenizer ByteLevel, Digits + ByteLevel, or Split +
ByteLevel (tokenizer.json), and tiktoken's own format (tokenizer.model). Other kinds (SentencePiece
style) go through the optional package `tokenizers`.
Text is data: the strings of special tokens inside a text are encoded as plain text.
"""

import base64
import json
from pathlib import Path

import regex

from support.huggingface.config import read_json
from support.huggingface.tokenizer_classes import ByteLevelTokenizer, LibraryTokenizer, Tokenizer
from support.system.bad_input import BadInput

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
        raise BadInput(f"{path} holds no tokenizer.json and no tokenizer.model")
    data = read_json(path / "tokenizer.json")
    try:
        special = {t["content"]: int(t["id"]) for t in data.get("added_tokens") or []}
        settings["post_processor"] = data.get("post_processor")
        pattern, reason = split_pattern(data)
        if pattern is None:
            reason = f"{path}: {reason} is not byte-level BPE"
            return LibraryTokenizer(path / "tokenizer.json", special, settings, reason)
        return from_bpe(data["model"], pattern, data.get("normalizer"), special, settings)
    except BadInput:
        raise
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
        OverflowError,
        regex.error,
    ) as error:
        raise BadInput(f"{path / 'tokenizer.json'} is damaged: {error!r}") from error


def check_fits(tokenizer: Tokenizer, vocab_size: int) -> None:
    """ValueError if the model's vocabulary lacks some of the tokenizer's ids."""
    if tokenizer.vocab_size > vocab_size:
        raise BadInput(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocabulary only"
            f" {vocab_size}: they do not belong together"
        )


def from_bpe(model: dict, pattern: str, normalizer, special: dict, settings: dict) -> Tokenizer:
    alphabet, added = byte_alphabet(), set(special.values())
    to_id = {
        bytes(alphabet[c] for c in token): i
        for token, i in model["vocab"].items()
        if i not in added
    }
    ranks = {bytes([b]): b for b in range(256)}
    # subtle: tiktoken ranks the merged token, `tokenizers` the pair. The ids are the same, except
    # for hand-made merges that no training gives: with "b c", "a b", "ab c", abc is not a + bc.
    for merge in model["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        ranks.setdefault(bytes(alphabet[c] for c in left + right), len(ranks))
    if model.get("ignore_merges"):  # whole pieces of the vocabulary need no merges
        for token in sorted(to_id, key=to_id.get):
            ranks.setdefault(token, len(ranks))
    unknown = [t for t in ranks if len(t) > 1 and t not in to_id]
    if unknown or not to_id:
        raise BadInput(f"tokenizer.json: merges make tokens beyond the vocabulary: {unknown[:3]}")
    return ByteLevelTokenizer(ranks, to_id, pattern, normalizer is not None, special, settings)


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
