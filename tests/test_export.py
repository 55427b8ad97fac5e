"""`python train.py --export DIR`: the very samples of train.py, in files that are whole."""

import json
import re
from pathlib import Path
from unittest import mock

import pytest
import safetensors
import torch
from conftest import PROSE, snapshot
from safetensors.torch import load_file
from test_train import code_of, command, read_metrics, watched

import train
from support.runs import export as module
from support.runs.export import INDEX
from support.runs.flags import settings_of
from support.system.whole_files import only_writer


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("Zoe sings. " * 400)
    return path


@pytest.fixture(scope="module")
def trained(toy_dir, prose_file, other, tmp_path_factory):
    """A tiny run of train.py (probe, analysis, extend, replay of another text): its folder, and
    (ids, positions) of every sample that it saw, in order."""
    out = tmp_path_factory.mktemp("run") / "out"
    with watched(train, "accumulate") as accumulated:
        train.main(command(toy_dir, prose_file, out, "--replay_data", str(other)))
    batches = [call.args[1] for call in accumulated.call_args_list]
    return out, [(ids[0], places[0]) for batch in batches for ids, places, _ in batch]


@pytest.fixture(scope="module")
def flags(toy_dir, prose_file, other, trained):
    """Those of the run, with the types that its analysis found."""

    def make(*more: str, data=prose_file) -> list[str]:
        found = ["--impactful", str(trained[0] / "impactful.json"), "--replay_data", str(other)]
        return command(toy_dir, data, "unused", *found, *more)

    return make


def export(folder, argv: list[str]) -> dict:
    train.main(["--export", str(folder), *argv])
    return json.loads((folder / INDEX).read_text())


def test_the_exported_samples_are_those_that_train_py_sees(trained, flags, tmp_path):
    """In every stage, read by the data set of the docstring; and the learning rates."""
    index = export(tmp_path, flags())
    code = re.search(r"\n(    class Samples.*?)\n\n", module.__doc__, re.DOTALL)[1]
    names = {"torch": torch, "json": json, "safetensors": safetensors}
    exec("if True:\n" + code, names)
    samples, (out, seen) = names["Samples"](tmp_path), trained
    assert len(samples) == len(seen) == 18
    for n, (ids, positions) in enumerate(seen):
        sample = samples[n]
        assert torch.equal(sample["input_ids"], ids) and torch.equal(sample["labels"], ids)
        assert torch.equal(sample["position_ids"], positions)
        assert sample["attention_mask"].tolist() == [1] * len(ids)
    tensors = load_file(tmp_path / "step_00000.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.int32}

    assert index["status"] == "done" and index["torch"] and index["seconds"] >= 0
    for step, row in zip(index["steps"], read_metrics(out), strict=True):
        assert (step["stage"], step["lr"]) == (row["stage"], row["lr"])
        assert step["samples"] * step["tokens"] == row["tokens"]
    run = settings_of(out)
    same = ("model", "target_len", "rope_base", "lr", "weight_decay", "clip", "seed", "data")
    assert all(index["settings"][k] == run[k] for k in same)
    assert index["settings"]["rope_scaling"] is None


def test_an_export_with_another_rope_or_selection_says_so(flags, toy_dir, prose_file, tmp_path):
    yarn = export(tmp_path / "yarn", flags("--rope", "yarn"))["settings"]
    assert yarn["rope_scaling"]["rope_type"] == "yarn" and yarn["rope_base"] == 10_000.0
    argv = command(toy_dir, prose_file, "unused", *"--select digits --method pose".split())
    digits = export(tmp_path / "digits", argv)
    assert digits["settings"]["impactful_types"] is None and digits["status"] == "done"


def test_an_export_that_was_stopped_goes_on(flags, tmp_path, monkeypatch, capsys, error_of):
    """Ctrl-C within the fifth step: four files are whole, and the same command makes the rest, from
    another folder too (paths are kept as absolute ones), but not with another text of that name."""
    here, text = tmp_path / "here", tmp_path / "prose.txt"
    here.mkdir()
    text.write_text(PROSE)
    whole = export(tmp_path / "whole", flags(data=text))
    monkeypatch.chdir(here)
    with watched(train, "draw", [mock.DEFAULT] * 4 + [KeyboardInterrupt]):
        assert code_of(["--export", "samples", *flags(data="../prose.txt")]) == 130
    told = "4 of 9 steps are whole in samples; the same command goes on"
    assert capsys.readouterr().err.splitlines()[-1] == f"interrupted; {told}"
    assert json.loads((here / "samples" / INDEX).read_text())["status"] == "running"
    (here / "samples/step_00004.safetensors.writing").write_bytes(b"half")  # of a kill -9

    monkeypatch.chdir(tmp_path)
    folder, argv = Path("here/samples"), flags(data="prose.txt")
    text.write_text(PROSE.replace("7", "8"))
    error = error_of(train.main, ["--export", str(folder), *argv], tmp_path)
    assert error.startswith("error: prose.txt has changed since the start (sha256: ")
    text.write_text(PROSE)
    with watched(train, "draw") as drawn:
        index = export(folder, argv)
    assert [call.args[1] for call in drawn.call_args_list] == [4, 5, 6, 7, 8]
    assert index["status"] == "done" and index["settings"] == whole["settings"]
    files = {f.name: f.read_bytes() for f in folder.glob("step_*")}
    assert files == {f.name: f.read_bytes() for f in Path("whole").glob("step_*")}
    before = snapshot(folder)
    assert export(folder, argv) == index and snapshot(folder) == before  # all is there


def test_what_an_export_refuses(flags, toy_dir, prose_file, tmp_path, error_of):
    """One line, exit code 2, nothing written. Flags that change no sample may differ, and settings
    that an older version did not write down have their defaults."""
    plain = command(toy_dir, prose_file, "unused")
    new, done, busy = (tmp_path / name for name in ("new", "done", "busy"))
    index = export(done, flags())
    for name in ("rope", "rope_scaling", "min_segment_tokens"):
        del index["settings"][name]
    (done / INDEX).write_text(json.dumps(index))
    assert export(done, flags("--dtype", "bfloat16", "--save_minutes", "1")) == index
    busy.mkdir()
    (busy / "note.txt").write_text("mine")
    for folder, argv, match in (
        (new, plain, r"needs the impactful types beforehand: give the --impactful FILE.*--out"),
        (new, flags("--plan"), "goes with neither --resume nor --plan"),
        (new, flags("--train_len", "1"), "--train_len 1 must be between 2"),
        (new, flags("--figure", "r.png"), "unrecognized arguments: --figure r.png"),
        (done, flags("--seed", "1"), r"samples with another seed \(0, now 1\)"),
        (done, flags("--min_segment_tokens", "9"), r"another min_segment_tokens \(1, now 9\)"),
        (done, flags("--data", str(busy / "note.txt")), "no document reaches"),
        (busy, flags(), f"--export {busy} is not empty"),
        (busy / "note.txt", flags(), "is a file; a folder is needed"),
    ):
        error = error_of(train.main, ["--export", str(folder), *argv], tmp_path)
        assert re.search(match, error), error
    with only_writer(new):
        error = error_of(train.main, ["--export", str(new), *flags()], tmp_path)
    assert "another run is writing to" in error
