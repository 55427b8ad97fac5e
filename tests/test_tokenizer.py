"""huggingface/tokenizer.py against the `tokenizers` library, which made the files it reads."""

import base64
import itertools
import json
import random
import sys
import time
import zipfile

import pytest
from conftest import PROSE, write_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
from smollm2 import download
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, trainers
from tokenizers import pre_tokenizers as pre

from model import load_tokenizer
from support.data.sources import standard_library_text, standard_library_topics
from support.data.text import encode_pieces
from support.huggingface.tokenizer import LLAMA3_SPLIT, LibraryTokenizer, check_fits
from support.system.bad_input import BadInput

QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SCRIPTS = (
    "Съешь же ещё этих мягких французских булок. 我能吞下玻璃而不伤身体。"
    " 私はガラスを食べられます。"
    " أنا قادر على أكل الزجاج و هذا لا يؤلمني. मैं काँच खा सकता हूँ। Μπορώ να φάω σπασμένα γυαλιά."
    " אני יכול לאכול זכוכית וזה לא מזיק לי. 나는 유리를 먹을 수 있어요."
    " ฉันกินกระจกได้ Ég get etið gler."
    " naïve café 🙂👩‍👩‍👧 १२३ ٤٥٦ ½ ² x² \u212b\u0041\u030a e\u0301 ﬁ"
)
VIKING_SPLIT = r" ?[^(\s|[.,!?…。，、।۔،])]+"  # sets in sets; punctuation is in no match
GAPS_SPLIT = r" ?[^\s.,!?]+"


def split(pattern: str, behavior: str = "isolated", invert: bool = False):
    return pre.Split(Regex(pattern), behavior, invert)


BY_REGEX = pre.ByteLevel(add_prefix_space=False, use_regex=True)
PLAIN = pre.ByteLevel(add_prefix_space=False, use_regex=False)
DIGITS = pre.Digits(individual_digits=True)
PIECES = [split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+")]
STEPS = {  # what splits a text, by the name of a family or of the step that matters
    "smollm2": [DIGITS, BY_REGEX],
    "digits": [pre.Digits(individual_digits=False), BY_REGEX],
    "llama3": [split(LLAMA3_SPLIT), PLAIN],
    "qwen2": [split(QWEN2_SPLIT), PLAIN],
    "gaps": [split(GAPS_SPLIT), PLAIN],
    "sequence of NFC": [DIGITS, BY_REGEX],
    "added tokens": [DIGITS, BY_REGEX],
    "viking": [split(VIKING_SPLIT), DIGITS, PLAIN],
    "sets in sets": [split(VIKING_SPLIT), PLAIN],
    "deepseek": [*PIECES, DIGITS, PLAIN],
    "midm": [split(LLAMA3_SPLIT, "removed", invert=True), PLAIN],
    "falcon3": [pre.Punctuation(), BY_REGEX, DIGITS, split(r"[0-9][0-9][0-9]")],
    "add_prefix_space": [pre.ByteLevel(add_prefix_space=True)],
    "bert": [pre.BertPreTokenizer()],
    "unigram": [pre.Metaspace()],
    "metaspace": [pre.Metaspace(prepend_scheme="first")],
    "added tokens, NFC": [DIGITS, BY_REGEX],
    "added tokens, flags": [DIGITS, BY_REGEX],
}
FAST = list(STEPS)[:7]  # which run on tiktoken; the others on `tokenizers`
NFC = normalizers.NFC()
NORMALIZERS = {
    "qwen2": NFC,
    "added tokens, NFC": NFC,
    "sequence of NFC": normalizers.Sequence([NFC]),
    "bert": normalizers.BertNormalizer(),
    "unigram": normalizers.NFKC(),
}
FROM_BYTES = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
DECODERS = {
    "bert": decoders.WordPiece(),
    "unigram": decoders.Metaspace(),
    "metaspace": decoders.Sequence([*FROM_BYTES, decoders.Strip(" ", 1, 0)]),
}


def train_tokenizer(folder, kind: str):
    """A small tokenizer with the settings of a real family, trained on several scripts:
    (ours, that of `tokenizers`)."""
    special = ["<|begin|>", "<|end|>"]
    shared = {"vocab_size": 3000, "special_tokens": special, "show_progress": False}
    if kind == "bert":
        model, trainer = models.WordPiece(unk_token="<|end|>"), trainers.WordPieceTrainer(**shared)
    elif kind == "unigram":
        trainer = trainers.UnigramTrainer(**shared, unk_token="<|end|>")
        model = models.Unigram()
    elif kind == "metaspace":
        special += [f"<0x{b:02X}>" for b in range(256)]
        model = models.BPE(byte_fallback=True, unk_token="<|end|>", fuse_unk=True)
        trainer = trainers.BpeTrainer(**shared, limit_alphabet=60)
    else:
        model = models.BPE(ignore_merges=kind == "llama3")
        trainer = trainers.BpeTrainer(**shared, initial_alphabet=pre.ByteLevel.alphabet())
    tokenizer = Tokenizer(model)
    tokenizer.decoder = DECODERS.get(kind, decoders.ByteLevel())
    tokenizer.pre_tokenizer = pre.Sequence(STEPS[kind])
    if kind in NORMALIZERS:
        tokenizer.normalizer = NORMALIZERS[kind]
    text = standard_library_topics()[:300_000]
    tokenizer.train_from_iterator([text, *[SCRIPTS] * 30], trainer)
    if kind.startswith("added tokens"):
        word = {"single_word": kind.endswith("flags")}
        for token in ("<think>", "  ", "it", "it's", "café", "the"):  # the last is one as it is
            tokenizer.add_tokens([AddedToken(token, normalized=len(token) < 6, **word)])
        tokenizer.add_special_tokens([AddedToken("'s 7", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # text is data
    return load_tokenizer(folder), tokenizer


@pytest.fixture(scope="module", params=STEPS)
def pair(request, tmp_path_factory):
    pair = train_tokenizer(tmp_path_factory.mktemp("kind"), request.param)
    assert isinstance(pair[0], LibraryTokenizer) == (request.param not in FAST)
    return pair


def round_trip(pair, text: str) -> None:
    """The ids of `tokenizers`; decoded, those of byte-level BPE give the (normalised) text back,
    all others the text of `tokenizers`; and so do the bytes of the tokens."""
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    back, told = ours.decode(ids), b"".join(ours.token_bytes(i) for i in ids)
    if type(theirs.decoder).__name__ == "ByteLevel":
        expected = theirs.normalizer.normalize_str(text) if theirs.normalizer else text
        assert back in (expected, " " + expected) and told.decode() == back
    else:
        assert back == theirs.decode(ids, skip_special_tokens=False)


WORDS = ["it's", "they'LL", "  ", "\n\n", "\t", "12345", "3.14", "<think>", "'s 7", "café"]
MIXED = st.lists(st.sampled_from([*SCRIPTS.split(), *WORDS]) | st.text(max_size=4), max_size=12)


@pytest.mark.parametrize("examples", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_ids_equal_on_any_text(pair, examples):
    @given(st.text(max_size=40) | MIXED.map(" ".join))
    @example("a \u0130'S ſt \r\n \u2003x <|begin|> \x1c\x85\u200b\u180e")
    @settings(max_examples=examples, deadline=None, database=None)
    def check(text):
        round_trip(pair, text)

    check()


RNG = random.Random(0)
LONG = {  # text: whether its parts are joined without encoding all of it at once
    PROSE[:20_000] + "x = 3.14  # wide   gaps\n\n\té 你好 " * 50 + "word" * 900: True,
    "我能吞下玻璃而不伤身体，因为我练习过很多年。" * 1100: True,
    ",".join(str(i) for i in range(5000)): True,
    SCRIPTS.replace(" ", "") * 50: True,
    "".join(RNG.choices("0123456789abcdef", k=24_000)): None,  # one word: WordPiece takes it whole
    "".join(RNG.choice("ab.…-") * RNG.randint(1, 30) for _ in range(1500)): None,
    "-" * 24_001: False,
    "ᚠ" * 24_000: False,
}


def pieces_of(text: str, characters: int) -> list[str]:
    return [text[i : i + characters] for i in range(0, len(text), characters)]


def joined(parts) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def test_pieces_of_a_long_text_give_the_ids_of_the_whole(pair):
    tokenizer, theirs = pair
    for text, in_parts in LONG.items():
        parts = list(encode_pieces(pieces_of(text, 5001), tokenizer))
        ids, whole = joined(parts), theirs.encode(text, add_special_tokens=False).ids
        if type(theirs.model).__name__ == "Unigram" and "-" in text:  # equally likely divisions
            assert tokenizer.decode(ids) == tokenizer.decode(whole) and sorted(ids) == sorted(whole)
        else:
            assert ids == whole
        assert in_parts is None or (len(parts) > 1) == in_parts


def test_pieces_of_any_length_give_the_ids_of_the_whole(pair, monkeypatch):
    """Characters of all scripts at random, hardly a space among them."""
    monkeypatch.setattr("support.data.text.TAIL", 300)
    characters = sorted(set(SCRIPTS + ".,!?()'’-|…。、0123456789\n") - {" "})
    for seed in range(12):
        rng = random.Random(seed)
        kinds = rng.sample(characters, (3, 9, 40, len(characters))[seed % 4])
        text = "".join(rng.choices(kinds, k=3000))
        pieces = pieces_of(text, rng.randint(400, 1600))
        assert joined(encode_pieces(pieces, pair[0])) == pair[0].encode(text), seed


def test_text_is_data(pair):
    """Special tokens in it are plain text, and a lone surrogate is a replacement character."""
    ours, theirs = pair
    assert ours.encode("a \ud83d b") == ours.encode("a \ufffd b")
    if type(theirs.model).__name__ != "Unigram":  # whose unknown characters have that id, too
        assert ours.added["<|begin|>"] not in ours.encode("a <|begin|> b")


@pytest.mark.parametrize("pair", FAST[:4], indirect=True)
def test_ids_equal_on_megabytes_of_real_text_in_many_scripts(pair, tmp_path_factory):
    """2 MB: Python sources and, from the package faker, words and names of some 60 languages."""
    folder = tmp_path_factory.mktemp("faker")
    try:
        wheel = zipfile.ZipFile(download("faker==37.1.0", folder))
    except OSError as error:
        pytest.skip(f"faker cannot be had: {error}")
    names = sorted(n for n in wheel.namelist() if n.endswith("__init__.py"))
    foreign = "\n".join(wheel.read(n).decode() for n in names[::2])[:1_500_000]
    assert sum(ord(c) > 0x2FF for c in foreign) > 100_000
    text = foreign + standard_library_text()[: 2_000_000 - len(foreign)]
    round_trip(pair, text)


def edit_tokenizer(folder, **fields) -> dict:
    data = json.loads((folder / "tokenizer.json").read_text()) | fields
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return data


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}
SEQUENCE = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
BOS = [(None, {}), (None, {"add_bos_token": True}), (None, {"add_bos_token": False})]
BOS += [(TEMPLATE, {}), (SEQUENCE, {}), (ROBERTA, {})]


@pytest.mark.parametrize(("post_processor", "options"), BOS)
def test_a_bos_is_added_only_where_the_checkpoint_does(post_processor, options, tmp_path):
    write_tokenizer(tmp_path, PROSE, 300, **options)
    edit_tokenizer(tmp_path, post_processor=post_processor)
    adds = bool(post_processor or options.get("add_bos_token"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (0, 1, adds)


def test_tiktokens_own_format(tmp_path):
    """tokenizer.model as Llama 3 ships it: base64 token, rank; special tokens come after."""
    tokens = [bytes([b]) for b in range(256)] + [b"th", b"the", b" the"]
    lines = [base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(tokens)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("the the") == [257, 258]
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (259, 260, True)
    for content, match in (
        (b"\x0a\x0e\x0a\x05<unk>\x15", "SentencePiece"),
        (b"".join(lines[1:]), "its ranks are not 0, 1, 2"),
    ):
        (tmp_path / "tokenizer.model").write_bytes(content)
        with pytest.raises(BadInput, match=match):
            load_tokenizer(tmp_path)


REPLACE = normalizers.Replace(" ", "▁")
PREPEND = normalizers.Sequence([normalizers.Prepend("▁"), REPLACE])


def sentencepiece_style(folder, normalizer=PREPEND, prepend_scheme=None):
    """Like Llama 2's and Mistral's: spaces as an underscore, unknown characters as byte tokens;
    (ours, that of `tokenizers`)."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    tokens += ["▁", "h", "e", "l", "o", "▁h", "he", "ll", "▁he", "▁hell", "▁hello"]
    merges = [("▁", "h"), ("h", "e"), ("l", "l"), ("▁h", "e"), ("▁he", "ll"), ("▁hell", "o")]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.decoder = normalizer, DECODERS["metaspace"]
    if prepend_scheme:
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer.add_special_tokens(tokens[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder), tokenizer


def test_sentencepiece_style_goes_through_the_library(tmp_path, monkeypatch):
    ours, theirs = sentencepiece_style(tmp_path)
    assert isinstance(ours, LibraryTokenizer)
    ids = ours.encode("hello é")
    assert ids == theirs.encode("hello é", add_special_tokens=False).ids
    assert ours.decode(ids) == "hello é"
    assert b"".join(ours.token_bytes(i) for i in ids).decode() == " hello é"
    assert ours.added["<s>"] not in ours.encode("<s>")  # text is data here too
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BadInput, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("steps", [(PREPEND,), (REPLACE, "always"), (REPLACE, "first")])
def test_parts_of_a_text_that_are_encoded_apart_give_the_ids_of_the_whole(steps, tmp_path):
    """Only the first begins with the space that these tokenizers put in front of a text."""
    tokenizer, _ = sentencepiece_style(tmp_path, *steps)
    parts = ["hello", " hello", "\n", "hell", " oh", "é"]
    ids = [i for n, part in enumerate(parts) for i in tokenizer.encode(part, continued=n > 0)]
    assert ids == tokenizer.encode("".join(parts))
    assert tokenizer.encode("hello") != tokenizer.encode("hello", continued=True)


def test_truncation_padding_and_dropout_of_the_file_are_switched_off(tmp_path):
    ours, theirs = sentencepiece_style(tmp_path)
    theirs.enable_truncation(3)
    theirs.enable_padding(length=90, pad_token="<unk>")
    theirs.model.dropout = 0.9
    theirs.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["dropout"] > 0.8
    text = "hello hello hello hello"
    assert load_tokenizer(tmp_path).encode(text) == ours.encode(text) and len(ours.encode(text)) > 3


@pytest.mark.parametrize("pair", ["smollm2", "llama3"], indirect=True)
@pytest.mark.parametrize("run", [" ", "\n", "\t ", "中", "="])
def test_a_million_characters_in_a_row(pair, run):
    """Without the panic of tiktoken's own splitting, and in time that grows with the length."""
    text = "a" + run * (1_200_000 // len(run)) + "word"
    started = time.monotonic()
    assert pair[0].decode(pair[0].encode(text)) == text
    assert time.monotonic() - started < 60  # about 2 s; quadratic would be hours


def test_every_id_that_ends_a_text_is_known(tmp_path):
    write_tokenizer(tmp_path, PROSE, 300)
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 1 and sorted(tokenizer.eos_ids) == [1, 7, 8, 9]


def test_added_tokens_are_counted_on_from_the_vocabulary_as_tokenizers_does(tmp_path):
    """Whatever the file says: after a gap, in another order, with an id that is taken."""
    theirs = write_tokenizer(tmp_path, PROSE, 300)
    theirs.add_tokens(["<think>", "<a>", "<b>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    tokens = data["added_tokens"]
    for token, new_id in zip(tokens[2:], (1000, 5, 700), strict=True):
        token["id"] = new_id
    tokens.append(tokens[2] | {"content": ""})
    edit_tokenizer(tmp_path, added_tokens=tokens[:2] + tokens[:1:-1])
    ours, theirs = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode("<think><a> <b>") == theirs.encode("<think><a> <b>").ids
    assert (ours.vocab_size, ours.bos_id) == (theirs.get_vocab_size(), 0)


def test_an_added_token_beyond_the_model_is_named(tmp_path):
    tokenizer = write_tokenizer(tmp_path, PROSE, 300)
    tokenizer.add_special_tokens(["[PAD]"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(BadInput, match=r"resized for an added token \('\[PAD\]' has id 300\)"):
        check_fits(load_tokenizer(tmp_path), 300)


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
DAMAGED = [
    {"model": None},
    {"model": BPE | {"vocab": {"▁a": 0}, "merges": []}},
    {"model": BPE | {"merges": [7]}},
    {"model": BPE | {"vocab": {"a": 0, "b": 1}}},
    {"model": BPE | {"vocab": {}, "merges": []}},
    # `tokenizers` panics: the prefix is longer than what it is to be taken from
    {"model": BPE | {"continuing_subword_prefix": "##"}},
    {"added_tokens": [{"id": 5}]},
    {"added_tokens": 5},
]


@pytest.mark.parametrize("change", DAMAGED)
def test_damaged_files_are_bad_input(change, tmp_path):
    write_tokenizer(tmp_path, PROSE, 300)
    edit_tokenizer(tmp_path, **change)
    with pytest.raises(BadInput):
        load_tokenizer(tmp_path)
