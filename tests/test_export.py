"""`python train.py --export DIR`: the very samples of train.py, in files that are whole."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_train import command, record, snapshot

import train
from support.runs.export import INDEX
from support.system.whole_files import only_writer


@pytest.fixture(scope="module")
def trained(toy_dir, prose_file, tmp_path_factory):
    """A tiny run of train.py (probe, analysis, extend, replay): its folder, and every micro-batch
    that it trained on."""
    out = tmp_path_factory.mktemp("run") / "out"
    with pytest.MonkeyPatch.context() as patch:
        seen = record(patch)
        train.main(command(toy_dir, prose_file, out))
    return out, [[(ids[0], positions[0]) for ids, positions, _ in batch] for batch in seen]


def flags(toy_dir, prose_file, trained, *more: str) -> list[str]:
    """Those of the run, with the types that its analysis found."""
    argv = command(toy_dir, prose_file, "unused", *more)
    return [*argv, "--impactful", str(trained[0] / "impactful.json")]


def export(folder, argv: list[str]) -> dict:
    train.main(["--export", str(folder), *argv])
    return json.loads((folder / INDEX).read_text())


def test_the_exported_samples_are_those_that_train_py_sees(trained, toy_dir, prose_file, tmp_path):
    """Token for token and position for position, in every stage; and the learning rates."""
    index = export(tmp_path / "samples", flags(toy_dir, prose_file, trained))
    assert index["status"] == "done" and index["torch"] and index["seconds"] >= 0
    assert len(index["steps"]) == len(trained[1]) == 9
    rows = [json.loads(x) for x in (trained[0] / "metrics.jsonl").read_text().splitlines()]
    for step, batch, row in zip(index["steps"], trained[1], rows, strict=True):
        tensors = load_file(tmp_path / "samples" / step["file"])
        assert {k: v.dtype for k, v in tensors.items()} == dict.fromkeys(tensors, torch.int32)
        assert tensors["input_ids"].shape == (step["samples"], step["tokens"])
        for i, (ids, positions) in enumerate(batch):
            assert torch.equal(tensors["input_ids"][i].long(), ids)
            assert torch.equal(tensors["position_ids"][i].long(), positions)
        assert (step["stage"], step["lr"]) == (row["stage"], row["lr"])
        assert step["samples"] * step["tokens"] == row["tokens"]
    assert [s["stage"] for s in index["steps"]] == ["probe"] * 2 + ["extend"] * 4 + ["replay"] * 3
    run = json.loads((trained[0] / "run.json").read_text())["settings"]
    same = ("model", "target_len", "rope_base", "lr", "weight_decay", "clip", "seed", "data")
    assert all(index["settings"][k] == run[k] for k in same)
    yarn = export(tmp_path / "yarn", [*flags(toy_dir, prose_file, trained), "--rope", "yarn"])
    assert index["settings"]["rope_scaling"] is None
    assert yarn["settings"]["rope_scaling"]["rope_type"] == "yarn"
    assert yarn["settings"]["rope_base"] == 10_000.0


@pytest.mark.parametrize("method", ["pose", "full"])
def test_other_flags_too(method, toy_dir, prose_file, tmp_path, monkeypatch):
    """Selection without an analysis, other positions, another text for the replay."""
    other = tmp_path / "other.txt"
    other.write_text("Zoe sings. " * 400)
    more = f"--method {method} --select digits --seed 5 --replay_data {other}".split()
    more += ["--train_len", "512"] if method == "full" else []
    seen = record(monkeypatch)
    train.main(command(toy_dir, prose_file, tmp_path / "out", *more))
    index = export(tmp_path / "samples", command(toy_dir, prose_file, "unused", *more))
    for step, batch in zip(index["steps"], seen, strict=True):
        tensors = load_file(tmp_path / "samples" / step["file"])
        for number, name in enumerate(("input_ids", "position_ids")):
            assert torch.equal(tensors[name].long(), torch.cat([b[number] for b in batch]))
    assert index["settings"]["impactful_types"] is None


def test_an_export_that_was_stopped_goes_on(
    trained, toy_dir, prose_file, tmp_path, monkeypatch, capsys
):
    """Ctrl-C within the fifth step: four files are whole, and the same command makes the rest."""
    argv = flags(toy_dir, prose_file, trained)
    export(tmp_path / "whole", argv)
    folder, calls, original = tmp_path / "samples", [], train.draw

    def stopping(stage, step, *rest):
        calls.append(step)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return original(stage, step, *rest)

    monkeypatch.setattr(train, "draw", stopping)
    with pytest.raises(SystemExit) as stop:
        export(folder, argv)
    last = capsys.readouterr().err.splitlines()[-1]
    told = f"4 of 9 steps are whole in {folder}; the same command goes on"
    assert stop.value.code == 130 and last == f"interrupted; {told}"
    assert json.loads((folder / INDEX).read_text())["status"] == "running"
    (folder / "step_00004.safetensors.writing").write_bytes(b"half")  # of a kill -9
    calls[:] = range(10)
    before = {f.name: f.stat().st_mtime_ns for f in folder.glob("step_0000[0-3].safetensors")}
    index = export(folder, argv)
    assert calls[10:] == [4, 5, 6, 7, 8] and index["status"] == "done"
    assert all((folder / name).stat().st_mtime_ns == at for name, at in before.items())
    files = {f.name: f.read_bytes() for f in folder.glob("step_*")}
    assert files == {f.name: f.read_bytes() for f in (tmp_path / "whole").glob("step_*")}
    before = snapshot(folder)
    assert export(folder, argv) == index and snapshot(folder) == before  # all is there


def test_an_export_goes_on_in_another_working_directory(
    trained, toy_dir, prose_file, tmp_path, monkeypatch
):
    """The same files under other names: paths are kept as absolute ones."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    (tmp_path / "prose.txt").write_bytes(prose_file.read_bytes())
    argv = flags(toy_dir, "../prose.txt", trained)
    index = export(Path("samples"), argv)
    assert index["settings"]["data"] == [str(tmp_path / "prose.txt")]
    (here / "samples" / "step_00003.safetensors").unlink()
    monkeypatch.chdir(tmp_path)
    argv[argv.index("../prose.txt")] = "prose.txt"
    export(Path("here/samples"), argv)
    assert (here / "samples" / "step_00003.safetensors").is_file()


def test_an_export_does_not_go_on_with_other_data(trained, toy_dir, prose_file, tmp_path, capsys):
    """The same path and as many tokens, another text."""
    text = tmp_path / "prose.txt"
    text.write_bytes(prose_file.read_bytes())
    argv = flags(toy_dir, text, trained)
    index = export(tmp_path / "samples", argv)
    (tmp_path / "samples" / "step_00003.safetensors").unlink()
    text.write_text(text.read_text().replace("7", "8"))
    before = snapshot(tmp_path)
    with pytest.raises(SystemExit) as stop:
        export(tmp_path / "samples", argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 2 and snapshot(tmp_path) == before
    assert error.startswith(f"error: {text} has changed since the start (sha256: ")
    text.write_bytes(prose_file.read_bytes())
    assert export(tmp_path / "samples", argv) == index


def test_what_an_export_refuses(trained, toy_dir, prose_file, tmp_path, capsys):
    """One line, exit code 2, nothing written."""
    plain = command(toy_dir, prose_file, "unused")
    argv = flags(toy_dir, prose_file, trained)
    done, busy = tmp_path / "done", tmp_path / "busy"
    export(done, argv)
    busy.mkdir()
    (busy / "note.txt").write_text("mine")
    for folder, given, match in (
        (tmp_path / "new", plain, r"needs the impactful types beforehand: --impactful FILE.*--out"),
        (tmp_path / "new", [*argv, "--plan"], "goes with neither --resume nor --plan"),
        (tmp_path / "new", [*argv, "--train_len", "1"], "--train_len 1 must be between 2"),
        (tmp_path / "new", [*argv, "--figure", "r.png"], "unrecognized arguments: --figure r.png"),
        (done, [*argv, "--seed", "1"], r"samples with another seed \(0, now 1\)"),
        (done, [*argv, "--data", str(busy / "note.txt")], "no document reaches"),
        (busy, argv, f"--export {busy} is not empty"),
        (busy / "note.txt", argv, "is not empty"),
    ):
        before = snapshot(tmp_path)
        with pytest.raises(SystemExit) as stop:
            train.main(["--export", str(folder), *given])
        lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
        assert stop.value.code == 2 and len(lines) == 1 and re.search(match, lines[0]), lines
        assert snapshot(tmp_path) == before


def test_flags_that_change_no_sample_may_differ(trained, toy_dir, prose_file, tmp_path):
    argv = flags(toy_dir, prose_file, trained)
    index = export(tmp_path, argv)
    assert export(tmp_path, [*argv, "--dtype", "bfloat16", "--save_minutes", "1"]) == index


def test_an_export_of_an_older_version_goes_on(trained, toy_dir, prose_file, tmp_path, capsys):
    """Settings that it does not name have their defaults."""
    argv = flags(toy_dir, prose_file, trained)
    index = export(tmp_path, argv)
    for name in ("rope", "rope_scaling", "min_segment_tokens"):
        del index["settings"][name]
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert export(tmp_path, argv) == index
    with pytest.raises(SystemExit):
        export(tmp_path, [*argv, "--min_segment_tokens", "9"])
    assert "another min_segment_tokens (1, now 9)" in capsys.readouterr().err


def test_one_writer_at_a_time(trained, toy_dir, prose_file, tmp_path, capsys):
    with only_writer(tmp_path / "samples"), pytest.raises(SystemExit):
        export(tmp_path / "samples", flags(toy_dir, prose_file, trained))
    assert "another run is writing to" in capsys.readouterr().err


def test_the_data_set_of_the_docstring_reads_them(trained, toy_dir, prose_file, tmp_path):
    import safetensors

    from support.runs import export as module

    folder = tmp_path / "samples"
    export(folder, flags(toy_dir, prose_file, trained))
    code = re.search(r"\n(    class Samples.*?)\n\n", module.__doc__, re.DOTALL)[1]
    names = {"torch": torch, "json": json, "safetensors": safetensors}
    exec("if True:\n" + code, names)
    samples = names["Samples"](folder)
    assert len(samples) == 18
    for n, (ids, positions) in enumerate(x for batch in trained[1] for x in batch):
        sample = samples[n]
        assert torch.equal(sample["input_ids"], ids) and torch.equal(sample["labels"], ids)
        assert torch.equal(sample["position_ids"], positions)
        assert sample["attention_mask"].tolist() == [1] * len(ids)
