"""Nothing lost: kills, full disks, too little memory, NaN, two runs at once, damaged files."""

import ast
import contextlib
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import children
import fuzz
import pytest
import torch
from children import ROOT
from conftest import PROSE
from safetensors.torch import load_file

import train
from model import load_pretrained, load_tokenizer
from support.data import sources as corpora
from support.needles.results import Results
from support.runs import run_folder as run_state
from support.runs.analysis import read_impactful
from support.runs.run_folder import RunFolder
from support.system.bad_input import BadInput
from support.system.signals import signals_raise

FLAGS = (
    "--target_len 512 --train_len 128 --steps 5 --probe_steps 2 --replay_steps 3"
    " --batch_sequences 2 --analysis_samples 2 --lr 5e-3 --replay_lr 1e-3 --warmup_steps 2"
    " --save_minutes 0"
).split()


@pytest.fixture(scope="module")
def place(toy_dir, prose_file, tmp_path_factory):
    """A folder with a model and a text, in which runs start: their relative paths lead from it."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(toy_dir, folder / "model")
    shutil.copy(prose_file, folder / "prose.txt")
    return folder


def flags(out, *more: str) -> list[str]:
    return ["--model", "model", "--data", "prose.txt", "--out", str(out), *FLAGS, *more]


def finish(place, argv, log, event=None, name="train") -> tuple[int, str]:
    child = children.start(name, argv, log, place, event)
    child.join()
    return child.exitcode, log.read_text()


@pytest.fixture(scope="module")
def uninterrupted(place):
    """(folder, seconds) of a run that nothing disturbs; it writes nothing outside --out."""
    finish(place, ["--help"], place / "log")  # the server starts
    (place / "log").unlink()
    before, started = sorted(place.rglob("*")), time.monotonic()
    code, log = finish(place, flags("whole"), place / "whole.log")
    assert code == 0, log
    after = sorted(p for p in place.rglob("*") if "whole" not in p.parts[-1:] + p.parent.parts[-1:])
    assert [p for p in after if p.name != "whole.log"] == before
    return place / "whole", time.monotonic() - started


def read_metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(out: Path, whole: Path) -> None:
    """Same weights to the byte, same metrics, each step exactly once."""
    assert (out / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert (out / "impactful.json").read_bytes() == (whole / "impactful.json").read_bytes()
    rows, expected = read_metrics(out), read_metrics(whole)
    assert [r["step"] for r in rows] == list(range(1, 9))
    for name in ("stage", "loss", "lr", "grad_norm", "skipped"):
        assert [r[name] for r in rows] == [r[name] for r in expected]
    assert not list(out.glob("state.pt*")) and not (out / "replayed").exists()


# ---- kill -9 -----------------------------------------------------------------------------------


def kill_somewhere(place, argv, log, seconds: float, rng: random.Random) -> bool:
    """At a random time; at a random file operation; or while a state is being written. False: the
    run was over before."""
    kind = rng.choice(("time", "operation", "writing"))
    event = ("/", rng.randint(1, 250), signal.SIGKILL) if kind == "operation" else None
    if event:
        event = (str(argv[argv.index("--out") + 1]), *event[1:])
    child = children.start("train", argv, log, place, event)
    if kind == "time":
        child.join(rng.random() * seconds)
    elif kind == "writing":
        nth = rng.randint(1, 8)
        beside = place / argv[argv.index("--out") + 1] / "state.pt.writing"
        while nth and child.is_alive():
            nth -= beside.exists()
            time.sleep(0.002 * rng.random())
    if child.is_alive() and kind != "operation":
        children.kill(child)
    child.join()
    return child.exitcode == -signal.SIGKILL


def killed_and_resumed(seed: int, place, uninterrupted, kills: int) -> None:
    rng, out, log = random.Random(seed), place / f"killed{seed}", place / f"killed{seed}.log"
    whole, seconds = uninterrupted
    argv = flags(out.name)
    while kills:
        if kill_somewhere(place, argv, log, seconds, rng):
            kills -= 1
        else:  # over before the kill: from the start once more
            assert_same(out, whole)
            shutil.rmtree(out)
        resumable = (out / "run.json").is_file()
        argv = ["--resume", "--out", out.name] if resumable else flags(out.name)
    code, said = finish(place, argv, log)
    assert code == 0, said
    assert_same(out, whole)


@pytest.mark.parametrize("seed", range(3))
def test_kill_9_at_random_moments(seed, place, uninterrupted):
    """1, 2 and 2 kills, each followed by --resume."""
    killed_and_resumed(seed, place, uninterrupted, kills=1 + (seed > 0))


def test_killed_before_the_first_file_is_whole(place, uninterrupted):
    """The same command begins again: there is nothing to resume."""
    out = place / "begun"
    code, _ = finish(place, flags("begun"), place / "log", ("begun/run.json", 2, signal.SIGKILL))
    assert code == -signal.SIGKILL
    assert {f.name for f in out.iterdir()} == {".lock", "run.json.writing"}
    code, said = finish(place, flags("begun"), place / "log")
    assert code == 0, said
    assert_same(out, uninterrupted[0])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 120))
def test_kill_9_twenty_times(seed, place, uninterrupted):
    killed_and_resumed(seed, place, uninterrupted, kills=1 + seed % 3)


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_amid_a_save_lets_it_end(number, code, word, place, uninterrupted):
    """The third save is being written: it becomes complete, and the last line tells of it."""
    out = place / word
    event = (f"{word}/state.pt.writing", 3, number)
    found, log = finish(place, flags(word), place / f"{word}.log", event)
    assert found == code and "Traceback" not in log
    told = rf"{word}; saved up to step (\d) in {word}/state.pt; to go on: python train.py --resume"
    step = int(re.match(told, log.splitlines()[-1])[1])
    state = torch.load(out / "state.pt", weights_only=True)
    assert state["step"] == step and not list(out.glob("*.writing"))
    code, log = finish(place, ["--resume", "--out", word], place / f"{word}.log")
    assert code == 0, log
    assert_same(out, uninterrupted[0])


def with_ctrl_c(function, call: int = 1):
    """The function; its call of that number begins with Ctrl-C."""
    calls = itertools.count(1)

    def interrupted(*args):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args)

    return interrupted


def test_a_second_ctrl_c_does_not_cost_the_save(toy_dir, prose_file, tmp_path, monkeypatch, capsys):
    """The first in the fourth step; the second as the save for it begins."""
    monkeypatch.setattr(train, "accumulate", with_ctrl_c(train.accumulate, call=4))
    monkeypatch.setattr(train.Trainer, "save", with_ctrl_c(train.Trainer.save))
    more = "--save_minutes 60 --probe_steps 0 --select random".split()  # no save of its own
    with pytest.raises(SystemExit) as stop:
        train.main(in_process(toy_dir, prose_file, tmp_path / "out", *more))
    last = capsys.readouterr().err.splitlines()[-1]
    assert stop.value.code == 130 and last.startswith("interrupted; saved up to step 3 in"), last
    assert RunFolder(tmp_path / "out").load()["step"] == 3


def test_ctrl_c_as_a_save_looks_for_nan_lets_it_end(tmp_path, monkeypatch):
    monkeypatch.setattr(run_state, "not_finite", with_ctrl_c(run_state.not_finite))
    with signals_raise(), pytest.raises(KeyboardInterrupt):
        RunFolder(tmp_path).save({"step": 1, "weights": torch.ones(3)})
    assert RunFolder(tmp_path).load()["step"] == 1


# ---- disk, memory, files that go away ----------------------------------------------------------


def one_error(code: int, log: str) -> str:
    """The one `error:` line, which is the last; exit code 2, no traceback."""
    lines = log.splitlines()
    assert code == 2 and "Traceback" not in log, log
    assert [x for x in lines if x.startswith("error:")] == lines[-1:], log
    return lines[-1]


@contextlib.contextmanager
def small_disk(folder: Path, size: str):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(command, check=False, capture_output=True).returncode:
        pytest.skip("a small disk needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(("size", "saved"), [("4k", False), ("64k", False), ("1200k", True)])
def test_a_full_disk_keeps_the_last_save(size, saved, place, uninterrupted):
    """A tmpfs that holds nothing, the first metrics, or one state but not two. Given more room, the
    run ends with the same bytes."""
    folder = place / f"disk{size}"
    with small_disk(folder, size):
        out = folder / "out"
        log = place / f"disk{size}.log"
        assert "does not fit" in one_error(*finish(place, flags(out), log))  # said beforehand
        error = one_error(*finish(place, flags(out), log, children.PLENTY))
        assert "No space left" in error
        assert (out / "state.pt").is_file() == saved and not list(out.glob("*.writing"))
        if saved:
            assert "; saved up to step" in error
            assert torch.load(out / "state.pt", weights_only=True)["step"] >= 1
        subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)
        resumable = (out / "run.json").is_file()
        argv = ["--resume", "--out", str(out)] if resumable else flags(out)
        code, said = finish(place, argv, log)
        assert code == 0, said
        assert_same(out, uninterrupted[0])


def test_a_folder_that_cannot_be_written_is_one_line(place):
    """As root too: a file in the way, and a file system that takes nothing."""
    for out in ("prose.txt/out", "/proc/nowhere/out"):
        one_error(*finish(place, flags(out), place / "log"))


def test_too_little_memory_is_one_line(place, uninterrupted):
    """The cap comes after the first save; the replay needs more."""
    more = ("--replay_len", "8192", "--target_len", "9000", "--train_len", "128")
    event = ("capped/state.pt.writing", 2, "cap")
    error = one_error(*finish(place, flags("capped", *more), place / "log", event))
    assert "out of memory" in error and "; saved up to step" in error, error
    code, log = finish(place, ["--resume", "--out", "capped"], place / "log")
    assert code == 0, log
    assert [r["step"] for r in read_metrics(place / "capped")] == list(range(1, 9))


def test_data_that_vanished_and_resume_from_another_folder(place, uninterrupted):
    (place / "sub").mkdir()
    code, _ = finish(place, flags("moved"), place / "log", ("moved/metrics", 4, signal.SIGKILL))
    assert code == -signal.SIGKILL
    (place / "prose.txt").rename(place / "gone.txt")
    before = {p: p.read_bytes() for p in (place / "moved").iterdir() if p.name != ".lock"}
    try:
        error = one_error(*finish(place, ["--resume", "--out", "moved"], place / "log"))
        assert "prose.txt does not exist" in error
        after = {p: p.read_bytes() for p in (place / "moved").iterdir() if p.name != ".lock"}
        assert after == before
    finally:
        (place / "gone.txt").rename(place / "prose.txt")
    code, log = finish(place / "sub", ["--resume", "--out", "../moved"], place / "log")
    assert code == 0, log
    assert_same(place / "moved", uninterrupted[0])


def test_data_or_weights_that_changed_are_named_by_resume(toy_dir, tmp_path, monkeypatch, capsys):
    """Refused before anything is written; put back, the run goes on, as one does that was begun by
    a version that wrote no data down."""
    model, texts, out = tmp_path / "model", tmp_path / "texts", tmp_path / "out"
    shutil.copytree(toy_dir, model)
    texts.mkdir()
    for i in range(3):
        (texts / f"{i}.txt").write_text(PROSE)
    other = tmp_path / "other.txt"
    other.write_text(PROSE)
    monkeypatch.setattr(train, "accumulate", with_ctrl_c(train.accumulate, call=2))
    with pytest.raises(SystemExit):
        train.main(in_process(model, texts, out, "--replay_data", str(other)))
    began, resume = json.loads((out / "run.json").read_text()), ["--resume", "--out", str(out)]
    weights = model / "model.safetensors"
    for path, changed, what in (
        (texts, texts / "2.txt", "bytes"),
        (other, other, "bytes"),
        (model, weights, "sha256"),
        (model, model / "tokenizer.json", "tokenizer"),
    ):
        whole = changed.read_bytes()
        changed.write_bytes(whole[:-1] + b"@" if changed == weights else whole + b"\n")
        before = {p: p.read_bytes() for p in out.iterdir()}
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            train.main(resume)
        error = one_error(stop.value.code, capsys.readouterr().err)
        assert f"{path} has changed since the start ({what}: " in error, error
        assert {p: p.read_bytes() for p in out.iterdir()} == before
        changed.write_bytes(whole)
    (out / "run.json").write_text(json.dumps({k: v for k, v in began.items() if k != "data"}))
    train.main(resume)
    assert json.loads((out / "run.json").read_text())["data"] == began["data"] != []


def test_every_change_of_the_data_shows(tmp_path):
    """A file of the folder is large: pieces of it are looked at, the first and the last among
    them."""
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "a.txt").write_bytes(b"a" * 4_000_000)
    (texts / "b.txt").write_bytes(b"b" * 200_000)
    os.mkfifo(texts / "pipe.txt")  # left out: opened it would wait for ever
    first = corpora.content(texts)
    assert (first["files"], first["bytes"]) == (2, 4_200_000) and first == corpora.content(texts)
    for name, places in (("a.txt", (0, 3_999_999)), ("b.txt", range(0, 200_000, 9_999))):
        for place in places:
            with open(texts / name, "r+b") as file:
                file.seek(place)
                file.write(b"x")
                file.flush()
                assert corpora.content(texts) | {"sha256": ""} == first | {"sha256": ""}
                assert corpora.content(texts) != first
                file.seek(place)
                file.write(name[:1].encode())
    assert corpora.content(texts) == first
    (texts / "b.txt").rename(texts / "c.txt")
    assert corpora.content(texts) != first
    settings = train.Settings(replay_data=[str(texts)])
    python, folder = corpora.contents(settings)
    assert python.pop("path") == "the Python standard library"
    assert python == corpora.content(None) and python["python"] == platform.python_version()
    assert folder == {"path": str(texts), **corpora.content(texts)}


def test_changes_of_the_text_of_python_and_of_the_toys_weaving_show(tmp_path, monkeypatch):
    """Another text of the same version, and other words or sentences woven into it."""
    settings = train.Settings()
    began = corpora.contents(settings)
    assert corpora.changed(began, corpora.contents(settings)) is None
    root, files = corpora.standard_library_files()
    assert began[0]["files"] == len(files) + 1  # the language reference
    with monkeypatch.context() as patch:
        patch.setattr(corpora, "standard_library_files", lambda: (root, files[1:]))
        change = corpora.changed(began, corpora.contents(settings))
    assert change.startswith("the Python standard library has changed since the start (files: ")
    names = ("support/data/toy.py", "assets/tiny/needle.json")
    for name in names:
        for file in names:
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(corpora.toy.ROOT / file, tmp_path / file)
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("a", "b", 1))  # of the same size
        with monkeypatch.context() as patch:
            patch.setattr(corpora.toy, "ROOT", tmp_path)
            change = corpora.changed(began, corpora.contents(settings))
        assert re.fullmatch(r"support/data/toy.py, .* has changed since the start \(sha.*", change)
    older = [{"path": "the Python standard library", "python": platform.python_version()}]
    assert corpora.changed(older, began) is None


# ---- two at once -------------------------------------------------------------------------------


def test_two_runs_on_one_folder(place, uninterrupted):
    """The first is stopped in the middle of its run, not ended; the second is refused."""
    event = ("busy/metrics", 3, signal.SIGSTOP)
    first = children.start("train", flags("busy"), place / "busy.log", place, event)
    while " T " not in Path(f"/proc/{first.pid}/stat").read_text():
        time.sleep(0.01)
    judge = ["--model", "model", "--haystack", "prose.txt", "--out", "busy", "--lengths", "300"]
    for name, argv in (
        ("train", flags("busy")),
        ("train", ["--resume", "--out", "busy"]),
        ("eval_needle", judge),
    ):
        error = one_error(*finish(place, argv, place / "second.log", name=name))
        assert "another run is writing to busy" in error
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0
    assert_same(place / "busy", uninterrupted[0])
    code, log = finish(place, ["--resume", "--out", "busy"], place / "second.log")
    assert code == 0 and "finished: nothing to do" in log


def test_a_killed_evaluation_goes_on(place):
    """Rows once each, and the same as those of an evaluation that nothing disturbs; a second start
    runs nothing."""
    argv = "--model model --haystack prose.txt --lengths 300 --depths 0 0.5 1 --n 2 --out".split()
    assert finish(place, [*argv, "e1"], place / "log", name="eval_needle")[0] == 0
    event = ("e2/needle.jsonl", 6, signal.SIGKILL)
    code, _ = finish(place, [*argv, "e2"], place / "log", event, "eval_needle")
    assert code == -signal.SIGKILL
    for finished in (False, True):
        code, log = finish(place, [*argv, "e2"], place / "log", name="eval_needle")
        assert code == 0 and ("nothing was run" in log) == finished, log
    rows = [
        [json.loads(x) | {"seconds": 0} for x in (place / e / "needle.jsonl").open()]
        for e in ("e1", "e2")
    ]
    # a kill changes which part of a prompt is in the cache already, and so how sums are rounded
    nats = [[row.pop("answer_logprob") for row in found] for found in rows]
    assert nats[0] == pytest.approx(nats[1], abs=1e-4)
    assert rows[0] == rows[1] and len(rows[0]) == 6


# ---- what is not finite ------------------------------------------------------------------------


def in_process(toy_dir, prose_file, out, *more) -> list[str]:
    return ["--model", str(toy_dir), "--data", str(prose_file), "--out", str(out), *FLAGS, *more]


def spoil(monkeypatch, bad_steps: dict[int, str]) -> list:
    """The loss or the gradient of some steps (1-based) is not finite; returns the batches seen."""
    seen, original = [], train.accumulate

    def spoiled(model, batch, *rest):
        seen.append(batch)
        loss = original(model, batch, *rest)
        what = bad_steps.get(len(seen))
        if what == "gradient":
            model.lm_head.weight.grad[3, 5] = torch.inf
        return torch.nan if what == "loss" else loss

    monkeypatch.setattr(train, "accumulate", spoiled)
    return seen


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(
    what, toy_dir, prose_file, tmp_path, monkeypatch
):
    """The steps before and after it are taken; the state is the one of the step before."""
    states, original = {}, RunFolder.save
    monkeypatch.setattr(
        RunFolder,
        "save",
        lambda run, state: (
            states.update({state["step"]: [m.clone() for m in state["optimizer"]["masters"]]}),
            original(run, state),
        ),
    )
    spoil(monkeypatch, {4: what, 6: what, 7: what})
    train.main(in_process(toy_dir, prose_file, tmp_path / "out"))
    rows = read_metrics(tmp_path / "out")
    assert [r["skipped"] for r in rows] == [0, 0, 0, 1, 1, 2, 3, 3]
    assert [None in (r["loss"], r["grad_norm"]) for r in rows] == [
        r["step"] in (4, 6, 7) for r in rows
    ]
    for step in range(2, 9):
        same = all(torch.equal(a, b) for a, b in zip(states[step - 1], states[step], strict=True))
        assert same == (step in (4, 6, 7))
    load_pretrained(tmp_path / "out")  # refuses weights that are not finite


def test_three_in_a_row_stop_the_run_with_the_batch(
    toy_dir, prose_file, tmp_path, monkeypatch, capsys
):
    """Counted over a --resume as well. What is saved is finite, and the run can pass over them."""
    out, original = tmp_path / "out", train.accumulate
    seen = spoil(monkeypatch, {3: "loss", 4: "gradient", 5: "loss"})
    with pytest.raises(SystemExit):
        train.main(in_process(toy_dir, prose_file, out))
    error = one_error(2, capsys.readouterr().err)
    assert "steps 3 to 5 had no finite loss" in error and "; saved up to step 5" in error
    batch = load_file(out / "skipped_batch.safetensors")
    assert torch.equal(batch["input_ids"], torch.cat([b[0] for b in seen[4]]))
    assert torch.equal(batch["position_ids"], torch.cat([b[1] for b in seen[4]]))
    state = torch.load(out / "state.pt", weights_only=True)
    assert all(m.isfinite().all() for m in state["optimizer"]["masters"])
    monkeypatch.setattr(train, "accumulate", original)
    spoil(monkeypatch, {1: "loss"})  # the sixth step: the fourth in a row
    with pytest.raises(SystemExit):
        train.main(["--resume", "--out", str(out)])
    assert "steps 4 to 6 had no" in one_error(2, capsys.readouterr().err)
    monkeypatch.setattr(train, "accumulate", original)
    train.main(["--resume", "--out", str(out)])
    assert [r["skipped"] for r in read_metrics(out)] == [0, 0, 1, 2, 3, 4, 4, 4]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
    run, state = RunFolder(tmp_path), {"step": 1, "optimizer": {"masters": [torch.ones(3)]}}
    run.save(state)
    for bad in (torch.nan, torch.inf):
        state["optimizer"]["masters"][0][1] = bad
        with pytest.raises(ValueError, match="not saved: optimizer.masters.0 of the state"):
            run.save(state | {"step": 2})
    assert run.load()["step"] == 1


def test_a_damaged_state_is_named(tmp_path):
    RunFolder(tmp_path).save({"step": 1, "weights": torch.ones(300)})
    whole = (tmp_path / "state.pt").read_bytes()
    for damaged in (whole[:-400], b"", b"x" * 100):
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"state.pt is damaged"):
            RunFolder(tmp_path).load()


# ---- damaged files -----------------------------------------------------------------------------


def use_tokenizer(folder) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("The 12 apples, isn't it?\n\n é 我 \x00"))


READERS = {
    "config.json": (load_pretrained, lambda data, rng: fuzz.damage_json(data.decode(), rng)),
    "tokenizer.json": (use_tokenizer, lambda data, rng: fuzz.damage_json(data.decode(), rng)),
    "tokenizer_config.json": (
        use_tokenizer,
        lambda data, rng: fuzz.damage_json(data.decode(), rng),
    ),
    "tokenizer.model": (use_tokenizer, fuzz.damage_bytes),
    "model.safetensors": (load_pretrained, fuzz.damage_safetensors),
    "impactful.json": (
        lambda folder: read_impactful(folder / "impactful.json", 2048),
        lambda data, rng: fuzz.damage_json(data.decode(), rng),
    ),
    "needle.jsonl": (Results, fuzz.damage_bytes),
}
RECORDED = ROOT / "assets" / "results" / "tiny_16k"


def feed(name: str, seeds: range, toy_dir, folder) -> None:
    """Damaged files are read or refused by an error that main() reports, in time and memory."""
    shutil.copytree(toy_dir, folder)
    if (RECORDED / name).is_file():
        lines = (RECORDED / name).read_bytes().splitlines(keepends=True)
        (folder / name).write_bytes(b"".join(lines if name.endswith(".json") else lines[:4]))
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
        tokens = [bytes([b]) for b in range(256)] + [b"th", b"the"]
        lines = [fuzz.base64_line(token, i) for i, token in enumerate(tokens)]
        (folder / name).write_bytes(b"".join(lines))
    read, damage = READERS[name]
    good, refused = (folder / name).read_bytes(), 0
    read(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        (folder / name).write_bytes(damage(good, random.Random(seed)))
        started = time.process_time()  # of this process: others may be busy
        try:
            read(folder)
        except (BadInput, OSError):
            refused += 1
        assert time.process_time() - started < 5, f"seed {seed}"
    assert refused > len(seeds) / 10
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"{grown:.0f} MiB"


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_refused(name, toy_dir, tmp_path):
    """7 x 400."""
    feed(name, range(400), toy_dir, tmp_path / "m")


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_files_are_refused(name, toy_dir, tmp_path):
    """7 x 10,000."""
    feed(name, range(1000, 11_000), toy_dir, tmp_path / "m")


def test_no_pickle_is_loaded_except_weights_only():
    """Every call of torch.load says weights_only=True, every np.load allow_pickle=False."""
    wanted, found = (
        {"torch": "weights_only", "np": "allow_pickle"},
        0,
    )
    for file in (*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py")):
        text = file.read_text()
        assert not re.search(r"pickle\.loads?\(|Unpickler\(", text), file
        for call in ast.walk(ast.parse(text)):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("torch.load", "np.load"):
                flag = wanted[call.func.value.id]
                safe = f"{flag}={flag == 'weights_only'}"
                assert safe in ast.unparse(call), (file, ast.unparse(call))
                found += 1
    assert found == 1
