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
from tokenizers import Tokenizer

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


def train_tokenizer(folder, kind: str):
    """A small tokenizer with the settings of a real family, trained on several scripts:
    (ours, that of `tokenizers`)."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    def split(pattern: str, behavior: str = "isolated", invert: bool = False):
        return pre.Split(Regex(pattern), behavior, invert)

    by_regex = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    digits = pre.Digits(individual_digits=True)
    steps = {
        "smollm2": [digits, by_regex],
        "digits": [pre.Digits(individual_digits=False), by_regex],
        "llama3": [split(LLAMA3_SPLIT), plain],
        "qwen2": [split(QWEN2_SPLIT), plain],
        "gaps": [split(GAPS_SPLIT), plain],
        "viking": [split(VIKING_SPLIT), digits, plain],
        "sets in sets": [split(VIKING_SPLIT), plain],
        "deepseek": [split(r"[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), digits, plain],
        "midm": [split(LLAMA3_SPLIT, "removed", invert=True), plain],
        "falcon3": [pre.Punctuation(), by_regex, digits, split(r"[0-9][0-9][0-9]")],
        "add_prefix_space": [pre.ByteLevel(add_prefix_space=True)],
        "bert": [pre.BertPreTokenizer()],
        "unigram": [pre.Metaspace()],
        "metaspace": [pre.Metaspace(prepend_scheme="first")],
    }.get(kind, [digits, by_regex])
    special = ["<|begin|>", "<|end|>"]
    shared = {"vocab_size": 3000, "special_tokens": special, "show_progress": False}
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<|end|>"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.decoder = decoders.WordPiece()
        trainer = trainers.WordPieceTrainer(**shared)
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.normalizer = normalizers.NFKC()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(**shared, unk_token="<|end|>")
    elif kind == "metaspace":
        special += [f"<0x{b:02X}>" for b in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<|end|>", fuse_unk=True))
        steps_back = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*steps_back, decoders.Strip(" ", 1, 0)])
        trainer = trainers.BpeTrainer(**shared, limit_alphabet=60)
    else:
        tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(**shared, initial_alphabet=alphabet)
        if kind in ("qwen2", "added tokens, NFC"):
            tokenizer.normalizer = normalizers.NFC()
        elif kind == "sequence of NFC":
            tokenizer.normalizer = normalizers.Sequence([normalizers.NFC()])
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    text = standard_library_topics()[:300_000]
    tokenizer.train_from_iterator([text, *[SCRIPTS] * 30], trainer)
    if kind.startswith("added tokens"):
        flags = {"added tokens, flags": {"single_word": True}}.get(kind, {})
        for content in (
            "<think>",
            "  ",
            "it",
            "it's",
            "café",
            "the",
        ):  # the last is a token as it is
            tokenizer.add_tokens([AddedToken(content, normalized=len(content) < 6, **flags)])
        tokenizer.add_special_tokens([AddedToken("'s 7", special=True)])
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.encode_special_tokens = True  # text is data
    return load_tokenizer(folder), tokenizer


FAST = ["smollm2", "digits", "llama3", "qwen2", "gaps", "sequence of NFC", "added tokens"]
LIBRARY = ["viking", "sets in sets", "deepseek", "midm", "falcon3", "add_prefix_space", "bert"]
LIBRARY += ["unigram", "metaspace", "added tokens, NFC", "added tokens, flags"]


@pytest.fixture(scope="module", params=FAST + LIBRARY)
def pair(request, tmp_path_factory):
    pair = train_tokenizer(tmp_path_factory.mktemp("kind"), request.param)
    assert isinstance(pair[0], LibraryTokenizer) == (request.param in LIBRARY)
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


def round_trips(pair, examples: int) -> None:
    words = ["it's", "they'LL", "  ", "\n\n", "\t", "12345", "3.14", "<think>", "'s 7", "café"]
    mixed = st.lists(st.sampled_from([*SCRIPTS.split(), *words]) | st.text(max_size=4), max_size=12)

    @given(st.text(max_size=40) | mixed.map(" ".join))
    @example("a \u0130'S ſt \r\n \u2003x <|begin|> \x1c\x85\u200b\u180e")
    @settings(max_examples=examples, deadline=None, database=None)
    def check(text):
        round_trip(pair, text)

    check()


def test_ids_equal_on_any_text(pair):
    round_trips(pair, 300)


@pytest.mark.slow
def test_ids_equal_on_ten_thousand_texts(pair):
    round_trips(pair, 10_000)


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


def test_pieces_of_a_long_text_give_the_ids_of_the_whole(pair):
    tokenizer, theirs = pair
    for text, joined in LONG.items():
        parts = list(encode_pieces(pieces_of(text, 5001), tokenizer))
        ids = list(itertools.chain.from_iterable(parts))
        whole = theirs.encode(text, add_special_tokens=False).ids
        if type(theirs.model).__name__ == "Unigram" and "-" in text:  # equally likely divisions
            assert tokenizer.decode(ids) == tokenizer.decode(whole) and sorted(ids) == sorted(whole)
        else:
            assert ids == whole
        assert joined is None or (len(parts) > 1) == joined


def test_pieces_of_any_length_give_the_ids_of_the_whole(pair, monkeypatch):
    """Characters of all scripts at random, hardly a space among them."""
    monkeypatch.setattr("support.data.text.TAIL", 300)
    characters = sorted(set(SCRIPTS + ".,!?()'’-|…。、0123456789\n") - {" "})
    for seed in range(12):
        rng = random.Random(seed)
        kinds = rng.sample(characters, (3, 9, 40, len(characters))[seed % 4])
        text = "".join(rng.choices(kinds, k=3000))
        pieces = pieces_of(text, rng.randint(400, 1600))
        ids = list(itertools.chain.from_iterable(encode_pieces(pieces, pair[0])))
        assert ids == pair[0].encode(text), seed


def test_a_lone_surrogate_is_a_replacement_character(pair):
    ours = pair[0]
    assert ours.encode("a \ud83d b") == ours.encode("a \ufffd b")


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


@pytest.mark.parametrize("pair", FAST[:4], indirect=True)
def test_special_token_strings_are_data_everywhere(pair):
    ours = pair[0]
    ids = ours.encode("a <|begin|> b")
    assert ours.decode(ids) == "a <|begin|> b" and max(ids) < ours.vocab_size
    assert ours.bos_id not in ids


@pytest.mark.parametrize(
    ("settings_", "post", "adds"),
    [
        ({}, None, False),
        ({"add_bos_token": True}, None, True),
        ({"add_bos_token": False}, None, False),
        ({}, "template", True),
        ({}, "sequence", True),
        ({}, "roberta", True),
    ],
)
def test_a_bos_is_added_only_where_the_checkpoint_does(settings_, post, adds, tmp_path):
    write_tokenizer(tmp_path, PROSE, 300, **settings_)
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
    }
    data = json.loads((tmp_path / "tokenizer.json").read_text())
    data["post_processor"] = {
        None: None,
        "template": template,
        "roberta": {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]},
        "sequence": {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template]},
    }[post]
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
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
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0e\x0a\x05<unk>\x15")
    with pytest.raises(ValueError, match="SentencePiece"):
        load_tokenizer(tmp_path)


def write_sentencepiece_style(folder):
    """Like Llama 2's and Mistral's: spaces as an underscore, unknown characters as byte tokens."""
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    vocab += ["▁", "h", "e", "l", "o", "▁h", "he", "ll", "▁he", "▁hell", "▁hello"]
    merges = ["▁ h", "h e", "l l", "▁h e", "▁he ll", "▁hell o"]
    data = {
        "added_tokens": [{"id": i, "content": vocab[i], "special": True} for i in range(3)],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "byte_fallback": True,
            "vocab": {t: i for i, t in enumerate(vocab)},
            "merges": merges,
        },
    }
    for token in data["added_tokens"]:
        token |= dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    (folder / "tokenizer.json").write_text(json.dumps(data))


def test_sentencepiece_style_goes_through_the_library(tmp_path, monkeypatch):
    write_sentencepiece_style(tmp_path)
    ours, theirs = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert isinstance(ours, LibraryTokenizer)
    ids = ours.encode("hello é")
    assert ids == theirs.encode("hello é", add_special_tokens=False).ids
    assert ours.decode(ids) == "hello é"
    assert b"".join(ours.token_bytes(i) for i in ids).decode() == " hello é"
    assert ours.bos_id not in ours.encode("<s>")  # text is data here too
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": {"type": "Prepend", "prepend": "▁"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
    ],
)
def test_parts_of_a_text_that_are_encoded_apart_give_the_ids_of_the_whole(steps, tmp_path):
    """Only the first begins with the space that these tokenizers put in front of a text."""
    write_sentencepiece_style(tmp_path)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    edit_tokenizer(tmp_path, normalizer=replace)
    if "normalizer" in steps:
        steps = {"normalizer": {"type": "Sequence", "normalizers": [steps["normalizer"], replace]}}
    edit_tokenizer(tmp_path, **steps)
    tokenizer, parts = load_tokenizer(tmp_path), ["hello", " hello", "\n", "hell", " oh", "é"]
    ids = [i for n, part in enumerate(parts) for i in tokenizer.encode(part, continued=n > 0)]
    assert ids == tokenizer.encode("".join(parts))
    assert tokenizer.encode("hello") != tokenizer.encode("hello", continued=True)


def edit_tokenizer(folder, **fields) -> dict:
    data = json.loads((folder / "tokenizer.json").read_text()) | fields
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return data


def test_truncation_padding_and_dropout_of_the_file_are_switched_off(tmp_path):
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    pad = {"strategy": {"Fixed": 90}, "direction": "Right", "pad_to_multiple_of": None}
    pad |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"}
    write_sentencepiece_style(tmp_path)
    ids = load_tokenizer(tmp_path).encode("hello hello hello")
    model = edit_tokenizer(tmp_path, truncation=cut, padding=pad)["model"]
    edit_tokenizer(tmp_path, model=model | {"dropout": 0.9})
    assert load_tokenizer(tmp_path).encode("hello hello hello") == ids and len(ids) > 3


@pytest.mark.parametrize("kind", ["smollm2", "llama3"])
@pytest.mark.parametrize("run", [" ", "\n", "\t ", "中", "="])
def test_a_million_characters_in_a_row(kind, run, tmp_path):
    """Without the panic of tiktoken's own splitting, and in time that grows with the length."""
    write_tokenizer(tmp_path, PROSE, 400)
    if kind == "llama3":
        split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated"}
        plain = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
        steps = [split | {"invert": False}, plain | {"trim_offsets": True}]
        edit_tokenizer(tmp_path, pre_tokenizer={"type": "Sequence", "pretokenizers": steps})
    tokenizer = load_tokenizer(tmp_path)
    text = "a" + run * (1_200_000 // len(run)) + "word"
    started = time.monotonic()
    assert tokenizer.decode(tokenizer.encode(text)) == text
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


# `tokenizers` panics: the prefix is longer than what it is to be taken from
PANIC = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
PANIC = {"model": PANIC | {"continuing_subword_prefix": "##"}}


@pytest.mark.parametrize(
    "change",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"added_tokens": [{"id": 5}]},
        {"added_tokens": 5},
        PANIC,
    ],
)
def test_damaged_files_are_a_value_error(change, tmp_path):
    write_tokenizer(tmp_path, PROSE, 300)
    edit_tokenizer(tmp_path, **change)
    with pytest.raises(ValueError):
        load_tokenizer(tmp_path)
