"""support/data/text.py: every kind of --data, and memory that does not grow with it."""

import bz2
import gzip
import json
import lzma
import os
import re
import tracemalloc

import numpy as np
import pytest
import torch
from conftest import PROSE

import recipe
import train
from model import load_tokenizer
from support.data.sources import load_tokens
from support.data.text import Corpus, check_outside
from support.system.bad_input import BadInput


@pytest.fixture(scope="module")
def tokenizer(toy_dir):
    return load_tokenizer(toy_dir)


def documents(path, tokenizer, **options) -> list[list[int]]:
    tokens = load_tokens([str(path)], tokenizer, **options)
    return [tokens.parts[p][b : b + n].tolist() for p, b, n in tokens.documents.tolist()]


def test_every_kind_of_file_in_one_folder(tokenizer, tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("Ada had 7 apples.\n")
    (tmp_path / "sub" / "b.md").write_text("Bob é.")
    rows = [{"text": "One."}, {"text": "", "meta": 1}, {"text": "Two\nlines."}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    np.save(tmp_path / "d.npy", np.arange(12, dtype=np.uint16).reshape(2, 6))
    np.save(tmp_path / "e.npy", np.arange(5))
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "f.bin")
    for name in ("g.parquet", "h.PARQUET", "i.tar.gz", "LICENSE", ".hidden.txt"):
        (tmp_path / name).write_bytes(b"\xff")
    texts = ["Ada had 7 apples.\n", "One.", "", "Two\nlines.", "Bob é."]
    expected = [tokenizer.encode(t) for t in texts]
    expected += [list(range(6)), list(range(6, 12)), list(range(5)), list(range(9))]
    assert documents(tmp_path, tokenizer) == expected
    said = "1 .bin, 1 .jsonl, 1 .md, 2 .npy, 1 .txt"
    said += "; left out: 1 without a suffix, 2 .parquet, 1 .tar.gz"
    assert f"folder {tmp_path}: {said}\n" in capsys.readouterr().err


RECORDS = [{"text": "Ada had 7 apples.\n"}, {"meta": [1], "text": "\u00e9 {}"}]
LINES, LIST = "".join(json.dumps(r) + "\n" for r in RECORDS).encode(), json.dumps(RECORDS).encode()
BOM, TWO, ONE = b"\xef\xbb\xbf", [record["text"] for record in RECORDS], ["Ada.\n"]


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.JSONL", LINES, TWO),
        ("a.ndjson", BOM + LINES.replace(b"\n", b"\r\n") + b"  \n\n", TWO),
        ("a.json", LINES, TWO),
        ("a.json", json.dumps(RECORDS, indent=1).encode(), TWO),
        ("a.json", BOM + LIST, TWO),
        ("a.jsonl.gz", gzip.compress(LINES), TWO),
        ("a.json.xz", lzma.compress(LIST), TWO),
        ("a.ndjson.BZ2", bz2.compress(LINES), TWO),
        ("essay", b"Ada.\n", ONE),
        ("a.TXT", BOM + b"Ada.\n", ONE),
        ("a.md.gz", gzip.compress(b"Ada.\n"), ONE),
        ("a.xz", lzma.compress(b"Ada.\n"), ONE),
        ("a.json", b'{\n"text": "Ada.\\n"}', ONE),
    ],
)
def test_text_is_read_in_every_form(name, content, texts, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert documents(tmp_path / name, tokenizer) == [tokenizer.encode(text) for text in texts]


def test_links_in_a_folder_are_followed_once_and_named_where_they_lead_nowhere(tokenizer, tmp_path):
    for name in ("data", "linked", "linked/.hidden"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text(name)
    (tmp_path / "data" / "there").symlink_to(tmp_path / "linked")
    (tmp_path / "linked" / "back").symlink_to(tmp_path / "data")
    os.mkfifo(tmp_path / "data" / "pipe.txt")  # opening it would wait
    found = documents(tmp_path / "data", tokenizer)
    assert [tokenizer.decode(d) for d in found] == ["data", "linked"]
    for target in ("gone", "b.txt"):  # nowhere, and itself
        (tmp_path / "data" / "b.txt").unlink(missing_ok=True)
        (tmp_path / "data" / "b.txt").symlink_to(tmp_path / "data" / target)
        with pytest.raises(OSError, match="data/b.txt"):
            documents(tmp_path / "data", tokenizer)


def test_documents_are_joined_only_on_request(tokenizer, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Text {i}.")
    one = documents(tmp_path, tokenizer, join=True)
    assert [tokenizer.decode(d) for d in one] == ["Text 0.\n\n\nText 1.\n\n\nText 2."]
    assert len(documents(tmp_path, tokenizer)) == 3


def test_windows_are_uniform_over_the_tokens(tokenizer, tmp_path):
    """Two documents of 100 and 300 tokens: a window of 50 is from the second with chance 3/4; 2,000
    draws, standard error 0.0097, 6 of them allowed: chance of accident 2e-9."""
    for name, n in (("a", 100), ("b", 300)):
        np.save(tmp_path / f"{name}.npy", np.full(n, ord(name), dtype=np.int32))
    np.save(tmp_path / "short.npy", np.zeros(49, dtype=np.int32))
    corpus = Corpus(load_tokens([str(tmp_path)], tokenizer), 50)
    assert (corpus.too_short, corpus.tokens) == (1, 400)
    g = torch.Generator().manual_seed(0)
    draws = [corpus.window(50, g) for _ in range(2000)]
    assert all(len(d) == 50 and d.dtype == torch.int64 for d in draws)
    share = sum(int(d[0]) == ord("b") for d in draws) / 2000
    assert abs(share - 0.75) < 6 * 0.0097
    assert len(corpus.window(1000, g)) in (100, 300)  # a whole document where it is shorter


def test_too_short_texts_name_the_flags_that_the_caller_has(toy_dir, prose_file, tmp_path, capsys):
    """Each command and each kind of data says its own; a Corpus by itself knows no flag."""
    short = tmp_path / "short.txt"
    short.write_text("One. Two.")
    with pytest.raises(ValueError, match=r"give longer texts$"):
        Corpus(load_tokens([str(short)], load_tokenizer(toy_dir)), 5000)
    none = re.escape(f"{short}: no document reaches ") + r"\d+ tokens \(the longest has \d+\); "
    text = f"--text {short} --figure {tmp_path}/r.png"
    data = f"--data {short} --out {tmp_path}/out"
    replay = f"--data {prose_file} --replay_data {short} --out {tmp_path}/out"
    remedy = "give longer texts with --{}, join them with --join, or lower --{}"
    for main, flags, says in (
        (recipe.main, text, "give a longer --text, or lower --train_len or --target_len"),
        (train.main, data, remedy.format("data", "train_len")),
        (train.main, replay, remedy.format("replay_data", "replay_len")),
    ):
        with pytest.raises(SystemExit):
            main(f"--model {toy_dir} --target_len 2000 {flags}".split())
        assert re.search(f"^error: {none}{says}$", capsys.readouterr().err, re.MULTILINE), flags


POINTER = b"version https://git-lfs.github.com/spec/v1\noid x"
BAD = [
    ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "a.jsonl, line 2"),
    ("a.jsonl", b"[1]\n", "a.jsonl, line 1"),
    ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1"),
    ("a.jsonl", LINES + b'{"text": null}\n', 'a.jsonl, line 3: .* a "text" that is null'),
    ("a.jsonl", LINES + b'{"text": "\xe9"}\n', "a.jsonl, line 3 is not UTF-8 .*iconv"),
    ("a.jsonl", LINES.decode().encode("utf-16"), "a.jsonl, line 1 is not UTF-8"),
    ("a.jsonl", LINES + b'{"text": ' + b"[" * 200_000, "a.jsonl, line 3 is not valid JSON"),
    ("a.json", b'[{"text": "x"}, {"content": 1}]', "a.json, record 2: .* the keys 'content'"),
    ("a.json", b"7", "a.json, record 1: .* int"),
    ("a.json", b"", "a.json is not valid JSON"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-9], "a.jsonl.gz is damaged"),
    ("a.txt.xz", lzma.compress(LINES)[:-9], "a.txt.xz is damaged"),
    ("a.txt", b"\xff\xfe", "a.txt is not UTF-8 .*iconv"),
    ("a.txt", b"text\0text", "a.txt holds zero bytes"),
    ("a.csv", b"text\nAda\n", "a.csv: .csv files are not read; write its texts to a .jsonl"),
    ("a.tsv", b"x", "pandas"),
    ("a.parquet", b"PAR1", "pandas"),
    ("a.arrow", b"x", "pandas"),
    ("a.html", b"<p>", "a.html: .html files are not read; save its text as .* a.txt"),
    ("a.pdf", b"%PDF", "a.txt"),
    ("a.DOCX", b"PK", "a.txt"),
    ("a.txt.zst", b"x", "a.txt.zst: .zst files are not read; unpack it first"),
    ("a.zip", b"PK", "unpack it first"),
    ("a.tar.gz", b"x", "unpack it first"),
    ("a.npy.gz", b"x", "unpack it first"),
    ("a.npz", b"PK", "save its token ids as a.npy"),
    ("a.txt.gz", b"text", "a.txt.gz is damaged or not a .gz file"),
    ("a.txt.gz", gzip.compress(b"text") + b"text", "a.txt.gz is damaged or not a .gz file"),
    ("a.jsonl.gz", gzip.compress(LINES)[:-8] + bytes(8), "a.jsonl.gz is damaged"),
    ("a.jsonl.bz2", b"text", "a.jsonl.bz2 is damaged or not a .bz2 file"),
    ("a.txt.xz", b"text", "a.txt.xz is damaged or not a .xz file"),
    ("a.md", POINTER, "a.md is a git-lfs pointer"),
    ("a.jsonl", POINTER, "is a git-lfs pointer"),
    ("a.txt", "It\u2019s".encode("cp1252"), "a.txt is not UTF-8 .*iconv"),
    ("a.txt", "Ada".encode("utf-16-le"), "a.txt holds zero bytes"),
    ("a.jsonl", LINES.replace(b"\n", b"\r"), "a.jsonl, line 1 is not valid JSON"),
    ("a.jsonl", LINES + b"\0\0\n", "a.jsonl, line 3 is not valid JSON"),
    ("a.jsonl", b'{"text": {"text": "x"}}', 'line 1: .* a "text" that is {"text": "x"}'),
    (
        "a.jsonl",
        b'{"text": "x", "id": %s}' % (b"9" * 5000),
        "1 is not valid JSON.*4300 digits",
    ),
    ("a.json", b'{"text": ["x", "y"]}', 'line 1: .* a "text" that is \\["x", "y"\\]'),
    ("a.bin", np.arange(9, dtype=np.uint32).tobytes(), "every second id is 0"),
    ("a.bin", np.arange(9, dtype=np.int64).tobytes(), "every second id is 0"),
    ("a.bin", b"\x01", "whole uint16"),
    ("a.bin", b"", "is empty"),
    ("a.bin", b"\xff\xff", "ids 65535 to 65535, the tokenizer has"),
    ("a.npy", b"\x93NUMPY", "."),
    ("a.npy", b"", "is empty"),
    ("a.npy", np.zeros(4), "float64"),
    ("a.npy", np.array([3, -1]), "ids -1 to 3"),
    ("a.npy", np.array(["a"], dtype=object), "pickle|object"),
    ("a.npy", np.zeros((2, 2, 2), dtype=np.int64), "token ids are"),
    ("a.npy", np.zeros(0, dtype=np.int64), "token ids are"),
]


@pytest.mark.parametrize(("name", "content", "match"), BAD)
def test_bad_files_are_named(name, content, match, tokenizer, tmp_path):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        np.save(tmp_path / name, content)
    with pytest.raises((BadInput, OSError), match=match):
        Corpus(load_tokens([str(tmp_path / name)], tokenizer), 1)


UNITS = {
    "t.txt": PROSE[:2000],
    "t.jsonl": json.dumps({"text": PROSE[:2000]}) + "\n",
    "chinese.txt": "我能吞下玻璃而不伤身体，因为我练习过很多年。" * 30,
    "csv.txt": ",".join(str(i) for i in range(500)) + ",",  # one line
    "thai.txt": "ฉันกินกระจกได้" * 50,
}


@pytest.mark.parametrize("name", UNITS)
def test_memory_does_not_grow_with_the_data(name, tokenizer, tmp_path, monkeypatch):
    """The peak of what Python and numpy take while a text is read, and one four times as long. Of
    these 300 kB more a list of the ids would take a million bytes; the text itself, 300,000."""
    monkeypatch.setattr("support.data.text.PIECE", 8000)
    monkeypatch.setattr("support.data.text.TAIL", 500)
    peaks, unit = [], UNITS[name]
    for size in (50_000, 100_000, 400_000):  # the first fills caches
        (tmp_path / name).write_text(unit * (size // len(unit.encode())))
        tracemalloc.start()
        Corpus(load_tokens([str(tmp_path / name)], tokenizer), 10)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] - peaks[1] < 50_000, peaks


def test_a_hidden_folder_may_be_written_inside_one_that_is_read(tmp_path):
    check_outside("--out", str(tmp_path / ".runs" / "a"), [str(tmp_path)])
    with pytest.raises(BadInput, match="give another --out"):
        check_outside("--out", str(tmp_path / "runs" / ".a" / ".."), [str(tmp_path)])
