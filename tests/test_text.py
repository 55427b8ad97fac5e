"""support/data/text.py: every kind of --data, and memory that does not grow with it."""

import itertools
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import PROSE

import recipe
import train
from model import load_tokenizer
from support.data.sources import load_tokens
from support.data.text import Corpus, read_pieces


@pytest.fixture(scope="module")
def tokenizer(toy_dir):
    return load_tokenizer(toy_dir)


def documents(tokens) -> list[list[int]]:
    return [tokens.parts[p][b : b + n].tolist() for p, b, n in tokens.documents.tolist()]


def test_every_kind_of_file_in_one_folder(tokenizer, tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("Ada had 7 apples.\n")
    (tmp_path / "sub" / "b.md").write_text("Bob é.")
    rows = [{"text": "One."}, {"text": "", "meta": 1}, {"text": "Two\nlines."}]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    np.save(tmp_path / "d.npy", np.arange(12, dtype=np.uint16).reshape(2, 6))
    np.save(tmp_path / "e.npy", np.arange(5))
    np.arange(9, dtype=np.uint16).tofile(tmp_path / "f.bin")
    (tmp_path / "ignored.pdf").write_bytes(b"\xff")
    found = documents(load_tokens([str(tmp_path)], tokenizer))
    texts = ["Ada had 7 apples.\n", "One.", "", "Two\nlines.", "Bob é."]
    expected = [tokenizer.encode(t) for t in texts]
    expected += [list(range(6)), list(range(6, 12)), list(range(5)), list(range(9))]
    assert found == expected


def test_documents_are_joined_only_on_request(tokenizer, tmp_path):
    for i in range(3):
        (tmp_path / f"{i}.txt").write_text(f"Text {i}.")
    one = documents(load_tokens([str(tmp_path)], tokenizer, join=True))
    assert [tokenizer.decode(d) for d in one] == ["Text 0.\n\n\nText 1.\n\n\nText 2."]
    assert len(documents(load_tokens([str(tmp_path)], tokenizer))) == 3


def test_pieces_of_a_large_file_give_the_ids_of_the_whole(tokenizer, tmp_path, smollm2_dir):
    file = tmp_path / "large.txt"
    text = (PROSE + "x = 3.14  # wide   gaps\n\n\té 你好 " * 50 + "word" * 900) * 2
    file.write_text(text)
    pieces = list(read_pieces(file, characters=777))
    assert "".join(pieces) == text and len(pieces) > 100
    for tok in (tokenizer, load_tokenizer(smollm2_dir)):
        assert [i for p in pieces for i in tok.encode(p)] == tok.encode(text)
    assert all(re.search(r"\w$", a) and re.match(r" \w", b) for a, b in itertools.pairwise(pieces))


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


def test_too_short_texts_name_the_flags_that_the_caller_has(toy_dir, tmp_path, capsys):
    """Each command and each kind of data says its own; a Corpus by itself knows no flag."""
    long, short = tmp_path / "long.txt", tmp_path / "short.txt"
    long.write_text(PROSE)
    short.write_text("One. Two.")
    tokens = load_tokens([str(short)], load_tokenizer(toy_dir))
    with pytest.raises(ValueError, match=r"give longer texts$"):
        Corpus(tokens, 5000)

    def error(main, *flags) -> str:
        with pytest.raises(SystemExit):
            main([str(f) for f in ("--model", toy_dir, "--target_len", 2000, *flags)])
        return re.search("^error: (.*)", capsys.readouterr().err, re.MULTILINE)[1]

    said = error(recipe.main, "--text", short, "--figure", tmp_path / "r.png")
    assert said.startswith(f"{short}: no document reaches 640 tokens (the longest has ")
    assert said.endswith("give a longer --text, or lower --train_len or --target_len")
    out = ("--out", tmp_path / "out")
    said = error(train.main, "--data", short, *out)
    assert said.endswith("longer texts with --data, join them with --join, or lower --train_len")
    said = error(train.main, "--data", long, "--replay_data", short, *out)
    assert said.endswith("with --replay_data, join them with --join, or lower --replay_len"), said


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"txt": 1}\n', "a.jsonl, line 2"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1"),
        ("a.jsonl", b'{"text": 5}\n', "a.jsonl, line 1"),
        ("a.txt", b"\xff\xfe", "not UTF-8"),
        ("a.bin", b"\x01", "whole uint16"),
        ("a.bin", b"", "is empty"),
        ("a.bin", b"\xff\xff", "ids 65535 to 65535, the tokenizer has"),
        ("a.npy", b"\x93NUMPY", "."),
        ("a.npy", b"", "is empty"),
    ],
)
def test_bad_files_are_named(name, content, match, tokenizer, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=match):
        Corpus(load_tokens([str(tmp_path / name)], tokenizer), 1)


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros(4), "float64"),
        (np.array([3, -1]), "ids -1 to 3"),
        (np.array(["a"], dtype=object), "pickle|object"),
        (np.zeros((2, 2, 2), dtype=np.int64), "wanted"),
        (np.zeros(0, dtype=np.int64), "wanted"),
    ],
)
def test_bad_arrays_are_named(array, match, tokenizer, tmp_path):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(ValueError, match=match):
        load_tokens([str(tmp_path / "a.npy")], tokenizer)


MEMORY = """
import resource, sys
sys.path.insert(0, ".")
from model import load_tokenizer
from support.data.sources import load_tokens
from support.data.text import Corpus
tokenizer = load_tokenizer(sys.argv[1])
tokens = load_tokens([sys.argv[2]], tokenizer)
corpus = Corpus(tokens, 10)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, corpus.tokens)
"""


def peak_mib(toy_dir, file) -> float:
    command = [sys.executable, "-c", MEMORY, str(toy_dir), str(file)]
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=".").stdout
    return float(out.split()[0])


def grow(folder, suffix: str, megabytes: int):
    file = folder / f"{megabytes}{suffix}"
    line = PROSE[:2000] if suffix == ".txt" else json.dumps({"text": PROSE[:2000]}) + "\n"
    with open(file, "w") as stream:
        for _ in range(megabytes * 1_000_000 // len(line)):
            stream.write(line)
    return file


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_does_not_grow_with_the_data(suffix, toy_dir, tmp_path):
    """5 MB against 15 MB of text: less than 15 MiB more, where a list of ids would take 100."""
    small, large = (peak_mib(toy_dir, grow(tmp_path, suffix, n)) for n in (5, 15))
    assert large - small < 15, (small, large)


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_memory_is_flat_on_two_gigabytes(suffix, toy_dir, tmp_path):
    small, large = (peak_mib(toy_dir, grow(tmp_path, suffix, n)) for n in (10, 2000))
    assert large - small < 200, (small, large)
