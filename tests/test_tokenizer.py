"""huggingface/tokenizer.py against the `tokenizers` library, which made the files it reads."""

import base64
import json
import sys
import zipfile

import pytest
from conftest import PROSE, write_tokenizer
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from smollm2 import download

from model import load_tokenizer
from support.data.sources import standard_library_text, standard_library_topics
from support.huggingface.tokenizer import LLAMA3_SPLIT, LibraryTokenizer

QWEN2_SPLIT = LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
SCRIPTS = (
    "Съешь же ещё этих мягких французских булок. 我能吞下玻璃而不伤身体。"
    " 私はガラスを食べられます。"
    " أنا قادر على أكل الزجاج و هذا لا يؤلمني. मैं काँच खा सकता हूँ। Μπορώ να φάω σπασμένα γυαλιά."
    " אני יכול לאכול זכוכית וזה לא מזיק לי. 나는 유리를 먹을 수 있어요."
    " ฉันกินกระจกได้ Ég get etið gler."
    " naïve café 🙂👩‍👩‍👧 १२३ ٤٥٦ ½ ² x² \u212b\u0041\u030a e\u0301 ﬁ"
)


def train_tokenizer(folder, kind: str):
    """A small byte-level BPE with the settings of a real family, trained on several scripts."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, trainers
    from tokenizers import pre_tokenizers as pre

    tokenizer = Tokenizer(models.BPE(ignore_merges=kind == "llama3"))
    by_regex = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    plain = pre.ByteLevel(add_prefix_space=False, use_regex=False)
    steps = {
        "smollm2": [pre.Digits(individual_digits=True), by_regex],
        "digits": [pre.Digits(individual_digits=False), by_regex],
        "llama3": [pre.Split(Regex(LLAMA3_SPLIT), "isolated"), plain],
        "qwen2": [pre.Split(Regex(QWEN2_SPLIT), "isolated"), plain],
    }[kind]
    tokenizer.pre_tokenizer = pre.Sequence(steps)
    tokenizer.normalizer = normalizers.NFC() if kind == "qwen2" else None
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=3000,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = standard_library_topics()[:300_000]
    tokenizer.train_from_iterator([text, *[SCRIPTS] * 30], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder), tokenizer


@pytest.fixture(scope="module", params=["smollm2", "digits", "llama3", "qwen2"])
def pair(request, tmp_path_factory):
    return train_tokenizer(tmp_path_factory.mktemp(request.param), request.param)


def same(pair, text: str) -> list[int]:
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text, add_special_tokens=False).ids, repr(text)
    return ids


def round_trip(pair, text: str) -> None:
    """Equal ids, and decoded they give the (normalised) text back."""
    normalizer = pair[1].normalizer
    expected = normalizer.normalize_str(text) if normalizer else text
    assert pair[0].decode(same(pair, text)) == expected


words = st.sampled_from([*SCRIPTS.split(), "it's", "they'LL", "  ", "\n\n", "\t", "12345", "3.14"])
mixed = st.lists(words | st.text(max_size=4), max_size=12).map(" ".join)


@given(st.text(max_size=40) | mixed)
@example("a \u0130'S ſt \r\n \u2003x")
@settings(max_examples=2600, deadline=None, suppress_health_check=list(HealthCheck), database=None)
def test_ids_equal_on_any_text(pair, text):
    """4 x 2,600 strings."""
    if "<|" not in text:  # there the library parses special tokens, ours takes text as data
        round_trip(pair, text)


def test_ids_equal_on_megabytes_of_real_text_in_many_scripts(pair, tmp_path_factory):
    """5 MB: Python sources and, from the package faker, words and names of some 60 languages."""
    folder = tmp_path_factory.mktemp("faker")
    try:
        wheel = zipfile.ZipFile(download("faker==37.1.0", folder))
    except OSError as error:
        pytest.skip(f"faker cannot be had: {error}")
    names = sorted(n for n in wheel.namelist() if n.endswith("__init__.py"))
    foreign = "\n".join(wheel.read(n).decode() for n in names)[:3_000_000]
    assert sum(ord(c) > 0x2FF for c in foreign) > 200_000
    text = foreign + standard_library_text()[: 5_000_000 - len(foreign)]
    round_trip(pair, text)


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
    from tokenizers import Tokenizer

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
    "change",
    [
        {"model": None},
        {"model": {"type": "BPE", "vocab": {"▁a": 0}, "merges": []}},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [7]}},
        {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}},
        {"model": {"type": "BPE", "vocab": {}, "merges": []}},
        {"added_tokens": [{"content": "x"}]},
        {"added_tokens": 5},
    ],
)
def test_damaged_files_are_a_value_error(change, tmp_path):
    write_tokenizer(tmp_path, PROSE, 300)
    data = json.loads((tmp_path / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError):
        load_tokenizer(tmp_path)
