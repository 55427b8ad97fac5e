"""huggingface/tokenizer.py against the `tokenizers` library, which made the files it reads."""

import base64
import itertools
import json
import random
import sys
import time
import unicodedata

import pytest
from conftest import PROSE, write_tokenizer
from hypothesis import example, given, settings
from hypothesis import strategies as st
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
    "llama2": [pre.Metaspace()],  # in its training only
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
SENTENCEPIECE = decoders.Sequence([*FROM_BYTES, decoders.Strip(" ", 1, 0)])
DECODERS = {
    "bert": decoders.WordPiece(),
    "unigram": decoders.Metaspace(),
    "metaspace": SENTENCEPIECE,
    "llama2": SENTENCEPIECE,
}
PREFIXED = ("add_prefix_space", "unigram", "metaspace", "llama2")  # a space before each text


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
    elif kind in ("metaspace", "llama2"):  # unknown characters as tokens of bytes
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
    text = standard_library_topics()[:100_000]
    tokenizer.train_from_iterator([text, *[SCRIPTS] * 30], trainer)
    if kind == "llama2":
        spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Sequence(spaces), None
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


def only(*kinds: str):
    return pytest.mark.parametrize("pair", kinds, indirect=True)


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


@pytest.mark.parametrize("examples", [200, pytest.param(10_000, marks=pytest.mark.slow)])
def test_ids_equal_on_any_text(pair, examples):
    """A tenth as many where the ids are made by the same library."""

    @given(st.text(max_size=40) | MIXED.map(" ".join))
    @example("a \u0130'S ſt \r\n \u2003x <|begin|> \x1c\x85\u200b\u180e")
    @settings(
        max_examples=examples // (10 if isinstance(pair[0], LibraryTokenizer) else 1),
        deadline=None,
        database=None,
    )
    def check(text):
        round_trip(pair, text)

    check()


RNG = random.Random(0)
LONG = {  # text: whether its parts are joined without encoding all of it at once
    PROSE[:5000] + "x = 3.14  # wide   gaps\n\n\té 你好 " * 12 + "word" * 230: True,
    "我能吞下玻璃而不伤身体，因为我练习过很多年。" * 275: True,
    ",".join(str(i) for i in range(1400)): True,
    SCRIPTS.replace(" ", "") * 12: True,
    "".join(RNG.choices("0123456789abcdef", k=6000)): None,  # one word: WordPiece takes it whole
    "".join(RNG.choice("ab.…-") * RNG.randint(1, 30) for _ in range(400)): None,
    "-" * 6001: False,
    "ᚠ" * 6000: False,
}


def in_pieces(text: str, characters: int, tokenizer) -> list[list[int]]:
    pieces = [text[i : i + characters] for i in range(0, len(text), characters)]
    return list(encode_pieces(pieces, tokenizer))


def joined(parts) -> list[int]:
    return list(itertools.chain.from_iterable(parts))


def test_pieces_of_a_long_text_give_the_ids_of_the_whole(pair, monkeypatch):
    monkeypatch.setattr("support.data.text.TAIL", 1024)
    tokenizer, theirs = pair
    for text, in_parts in LONG.items():
        parts = in_pieces(text, 1251, tokenizer)
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
        ids = joined(in_pieces(text, rng.randint(400, 1600), pair[0]))
        assert ids == pair[0].encode(text), seed


def test_parts_of_a_text_that_are_encoded_apart_give_the_ids_of_the_whole(pair, request):
    """Only the first begins with the space that some tokenizers put in front of a text. Half of a
    surrogate pair is a replacement character."""
    ours, parts = pair[0], ["hello", " hello", " world", " \ud83d"]
    ids = [ours.encode(part, continued=n > 0) for n, part in enumerate(parts)]
    assert joined(ids) == ours.encode("".join(parts)) == ours.encode("hello hello world \ufffd")
    differs = ours.encode("hello") != ours.encode("hello", continued=True)
    assert differs == (request.node.callspec.params["pair"] in PREFIXED)


@only(*FAST)
def test_ids_equal_on_every_kind_of_character(pair):
    """All that this Python knows, in a random order, and real text. Without letters that have no
    case (130,000) and accents, whose order in new scripts `tokenizers` does not know yet."""
    every = (c for c in map(chr, range(sys.maxunicode + 1)) if not unicodedata.combining(c))
    known = [c for c in every if unicodedata.category(c) not in ("Cn", "Co", "Cs", "Lo")]
    random.Random(0).shuffle(known)
    assert len(known) > 15_000
    round_trip(pair, "".join(known) + standard_library_text()[:100_000])


@only("smollm2", "llama3")
@pytest.mark.parametrize("run", [" ", "\t ", "中"])
def test_a_million_characters_in_a_row(pair, run):
    """Without the panic of tiktoken's own splitting, and in time that grows with the length."""
    text = "a" + run * (1_200_000 // len(run)) + "word"
    started = time.monotonic()
    assert pair[0].decode(pair[0].encode(text)) == text
    assert time.monotonic() - started < 60  # about 2 s; quadratic would be hours


# ---- what the other files of a folder say, and what tokenizer.json may hold ---------------------


def edit(folder, **fields) -> dict:
    data = json.loads((folder / "tokenizer.json").read_text()) | fields
    (folder / "tokenizer.json").write_text(json.dumps(data))
    return data


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
}
SEQUENCE = {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}
NESTED, LAST = SEQUENCE | {"processors": [SEQUENCE]}, {"SpecialToken": {"id": "</s>", "type_id": 0}}
BOTH = TEMPLATE | {"single": [*TEMPLATE["single"], LAST]}
AT_THE_END = TEMPLATE | {"single": [TEMPLATE["single"][1], LAST]}
ROBERTA = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
BOS = [(None, {}), (None, {"add_bos_token": True}), (None, {"add_bos_token": False})]
BOS += [(TEMPLATE, {}), (SEQUENCE, {}), (ROBERTA, {}), (TEMPLATE, {"bos_token": None})]
BOS += [(TEMPLATE, {"bos_token": "</s>"})]  # a config that names another token
BOS += [(NESTED, {}), (BOTH, {}), (AT_THE_END, {})]


@pytest.mark.parametrize(("post_processor", "options"), BOS)
def test_a_bos_is_added_only_where_the_checkpoint_does(post_processor, options, tmp_path):
    write_tokenizer(tmp_path, PROSE, 300, **options)
    edit(tmp_path, post_processor=post_processor)
    adds = post_processor not in (None, AT_THE_END) or bool(options.get("add_bos_token"))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.adds_bos) == (0, 1, adds)


def test_a_tokenizer_that_puts_two_tokens_in_front_is_refused(tmp_path):
    write_tokenizer(tmp_path, PROSE, 300)
    edit(tmp_path, post_processor=TEMPLATE | {"single": TEMPLATE["single"][:1] * 2})
    with pytest.raises(
        BadInput, match=r"begins a text with \['<s>', '<s>'\], ids \[0, 0\]: one is"
    ):
        load_tokenizer(tmp_path)


def test_every_id_that_ends_a_text_is_known(tmp_path):
    write_tokenizer(tmp_path, PROSE, 300)
    (tmp_path / "config.json").write_text('{"eos_token_id": [7, 8]}')
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 9}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id == 1 and sorted(tokenizer.eos_ids) == [1, 7, 8, 9]


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


@only("llama2")
def test_what_goes_through_the_library(pair, tmp_path, monkeypatch):
    """Truncation, padding and dropout of the file are switched off; without the package the error
    says what to install."""
    text, (ours, theirs) = "hello hello hello hello", pair
    spoilt = Tokenizer.from_str(theirs.to_str())
    spoilt.enable_truncation(3)
    spoilt.enable_padding(length=90, pad_token="<|end|>")
    spoilt.model.dropout = 0.9
    spoilt.save(str(tmp_path / "tokenizer.json"))
    assert edit(tmp_path)["model"]["dropout"] > 0.8 and len(spoilt.encode(text).ids) == 90
    assert load_tokenizer(tmp_path).encode(text) == ours.encode(text) and len(ours.encode(text)) > 3
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(BadInput, match="pip install tokenizers"):
        load_tokenizer(tmp_path)


def test_added_tokens_are_counted_on_from_the_vocabulary_as_tokenizers_does(tmp_path):
    """Whatever the file says: after a gap, in another order, with an id that is taken. One beyond
    the model's vocabulary is named."""
    theirs = write_tokenizer(tmp_path, PROSE, 300)
    theirs.add_tokens(["<think>", "<a>", "<b>"])
    theirs.save(str(tmp_path / "tokenizer.json"))
    tokens = edit(tmp_path)["added_tokens"]
    for token, new_id in zip(tokens[2:], (1000, 5, 700), strict=True):
        token["id"] = new_id
    tokens.append(tokens[2] | {"content": ""})
    edit(tmp_path, added_tokens=tokens[:2] + tokens[:1:-1])
    ours, theirs = load_tokenizer(tmp_path), Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert ours.encode("<think><a> <b>") == theirs.encode("<think><a> <b>").ids
    assert (ours.vocab_size, ours.bos_id) == (theirs.get_vocab_size(), 0)
    last = ours.decode([302])
    with pytest.raises(BadInput, match=rf"resized for an added token \('{last}' has id 302\)"):
        check_fits(ours, 302)


BPE = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
DAMAGED = [
    {"model": None},
    {"model": BPE | {"vocab": {"▁a": 0}, "merges": []}},
    {"model": BPE | {"merges": [7]}},
    *({"model": BPE | {"vocab": BPE["vocab"] | {"b": x}}} for x in (1.5, float("nan"), -1, 10**30)),
    {"model": BPE | {"vocab": BPE["vocab"] | {"｜": 1.5}}},  # of no bytes
    {"model": BPE | {"vocab": {"a": 0, "b": 1}}},
    {"model": BPE | {"vocab": {}, "merges": []}},
    # `tokenizers` panics: the prefix is longer than what it is to be taken from
    {"model": BPE | {"continuing_subword_prefix": "##"}},
    {"added_tokens": [{"id": 5}]},
    {"post_processor": ROBERTA | {"cls": ["<s>", 999]}},
    {"added_tokens": 5},
]


def test_damaged_files_are_bad_input(tmp_path):
    write_tokenizer(tmp_path, PROSE, 300)
    good = edit(tmp_path)
    for change in DAMAGED:
        edit(tmp_path, **good | change)
        with pytest.raises(BadInput):
            load_tokenizer(tmp_path)
