"""Nothing lost: kills, full disks, too little memory, NaN, two runs at once, damaged files."""

import contextlib
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
from unittest import mock

import children
import fuzz
import pytest
import torch
from children import ROOT
from conftest import PROSE, one_error
from safetensors.torch import load_file
from test_train import command, model_bytes, read_metrics, read_run, run_stopped, watched

import train
from model import load_pretrained, load_tokenizer
from support.data import sources as corpora
from support.needles.results import Results
from support.runs.analysis import read_impactful
from support.runs.run_folder import RunFolder
from support.system.bad_input import BadInput
from support.system.signals import signals_wait

# ---- runs in processes of their own ------------------------------------------------------------


@pytest.fixture(scope="module")
def place(toy_dir, prose_file, tmp_path_factory):
    """A folder with a model and a text, in which runs start: their relative paths lead from it."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(toy_dir, folder / "model")
    shutil.copy(prose_file, folder / "prose.txt")
    return folder


def flags(out, *more: str, model="model", data="prose.txt") -> list[str]:
    """Eight steps, each of them saved."""
    return command(model, data, out, "--steps", "5", "--save_minutes", "0", *more)


def finish(folder, argv, event=None, name="train") -> tuple[int, str]:
    """(exit code, log) of a child that starts in the folder; event: see children.start."""
    log = folder / "log"
    child = children.start(name, argv, log, folder, event)
    child.join()
    return child.exitcode, log.read_text()


@pytest.fixture(scope="module")
def whole(place) -> Path:
    """A run that nothing disturbs; it writes nothing outside --out."""
    before = set(place.rglob("*"))
    code, log = finish(place, flags("whole"))
    assert code == 0, log
    made = {path.relative_to(place).parts[0] for path in {*place.rglob("*")} - before}
    assert made - {"log"} == {"whole"}
    return place / "whole"


def assert_same(out: Path, whole: Path) -> None:
    """Same weights to the byte, same metrics, each step exactly once."""
    assert model_bytes(out) == model_bytes(whole)
    assert (out / "impactful.json").read_bytes() == (whole / "impactful.json").read_bytes()
    rows, expected = read_metrics(out), read_metrics(whole)
    assert [r["step"] for r in rows] == list(range(1, 9))
    for name in ("stage", "loss", "lr", "grad_norm", "skipped"):
        assert [r[name] for r in rows] == [r[name] for r in expected]
    assert not list(out.glob("state.pt*")) and not (out / "replayed").exists()


def resume_or_begin(place, out) -> list[str]:
    resumable = (place / out / "run.json").is_file()
    return ["--resume", "--out", str(out)] if resumable else flags(out)


def go_on(place, out, whole: Path) -> None:
    """The run in out ends like the whole one."""
    code, log = finish(place, resume_or_begin(place, out))
    assert code == 0, log
    assert_same(place / out, whole)


# ---- killed or told to stop --------------------------------------------------------------------

MORE = [pytest.param(seed, marks=pytest.mark.slow) for seed in range(100, 120)]


@pytest.mark.parametrize("seed", [0, 1, 2, *MORE])
def test_kill_9_at_random_moments(seed, place, whole):
    """One or two kills, each at a random operation on any file of the run or on its state, each
    followed by --resume."""
    rng, out, kills = random.Random(seed), f"killed{seed}", 1 + seed % 2
    while kills:
        part, operations = rng.choice(((out, 250), (f"{out}/state.pt.writing", 16)))
        event = (part, rng.randint(1, operations), signal.SIGKILL)
        code, log = finish(place, resume_or_begin(place, out), event)
        if code == -signal.SIGKILL:
            kills -= 1
        else:  # over before the kill: from the start once more
            assert code == 0, log
            assert_same(place / out, whole)
            shutil.rmtree(place / out)
    go_on(place, out, whole)


def test_killed_before_the_first_file_is_whole(place, whole):
    """The same command begins again: there is nothing to resume."""
    code, _ = finish(place, flags("begun"), ("begun/run.json", 2, signal.SIGKILL))
    assert code == -signal.SIGKILL
    assert {f.name for f in (place / "begun").iterdir()} == {".lock", "run.json.writing"}
    go_on(place, "begun", whole)


@pytest.mark.parametrize(
    ("name", "code", "word"),
    [
        ("SIGTERM", 143, "terminated"),
        ("SIGINT", 130, "interrupted"),
        ("SIGHUP", 143, "terminated"),
    ],
)
def test_a_signal_amid_a_save_lets_it_end(name, code, word, place, whole):
    """The third save is being written: it becomes complete, and the last line tells of it."""
    event = (f"{name}/state.pt.writing", 3, getattr(signal, name))
    found, log = finish(place, flags(name), event)
    assert found == code and "Traceback" not in log
    told = rf"{word}; saved up to step (\d) in {name}/state.pt; to go on: python train.py --resume"
    step = int(re.match(told, log.splitlines()[-1])[1])
    state = torch.load(place / name / "state.pt", weights_only=True)
    assert state["step"] == step and not list((place / name).glob("*.writing"))
    go_on(place, name, whole)


NO_SAVE_OF_ITS_OWN = "--save_minutes 60 --probe_steps 0 --select random".split()


def test_the_end_of_what_reads_the_log_costs_no_step(toy_dir, prose_file, tmp_path):
    """`python train.py 2>&1 | tee log`, and tee is killed in the fourth step."""
    argv = flags(tmp_path / "out", *NO_SAVE_OF_ITS_OWN, model=toy_dir, data=prose_file)
    with mock.patch("os.dup2"):  # it would silence pytest
        assert run_stopped(argv, 3, BrokenPipeError) == 1
    assert RunFolder(tmp_path / "out").load()["step"] == 3


def test_a_signal_that_waits_is_not_lost_where_the_body_fails():
    with pytest.raises(KeyboardInterrupt), signals_wait():
        signal.raise_signal(signal.SIGINT)
        raise OSError


def test_a_second_ctrl_c_does_not_cost_the_save(toy_dir, prose_file, tmp_path, capsys):
    """The first in the fourth step; the second as the save for it begins."""
    argv = flags(tmp_path / "out", *NO_SAVE_OF_ITS_OWN, model=toy_dir, data=prose_file)
    save = train.Trainer.save

    def stopped_save(trainer):
        signal.raise_signal(signal.SIGINT)
        save(trainer)

    with mock.patch.object(train.Trainer, "save", stopped_save):
        assert run_stopped(argv, 3) == 130
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("interrupted; saved up to step 3 in"), last
    assert RunFolder(tmp_path / "out").load()["step"] == 3


# ---- disk, memory, files that go away ----------------------------------------------------------


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
def test_a_full_disk_keeps_the_last_save(size, saved, place, whole):
    """A tmpfs that holds nothing, the first metrics, or one state but not two. Given more room, the
    run ends with the same bytes."""
    folder = place / f"disk{size}"
    with small_disk(folder, size):
        out = folder / "out"
        assert "does not fit" in one_error(*finish(place, flags(out)))  # said beforehand
        error = one_error(*finish(place, flags(out), children.PLENTY))
        assert "No space left" in error
        assert (out / "state.pt").is_file() == saved and not list(out.glob("*.writing"))
        if saved:
            assert "; saved up to step" in error
            assert torch.load(out / "state.pt", weights_only=True)["step"] >= 1
        subprocess.run(["mount", "-o", "remount,size=50m", str(folder)], check=True)
        go_on(place, out, whole)


def test_a_folder_that_cannot_be_written_is_one_line(place):
    """As root too: a file in the way, and a file system that takes nothing."""
    for out in ("prose.txt/out", "/proc/nowhere/out"):
        one_error(*finish(place, flags(out)))


def test_too_little_memory_is_one_line(place):
    """The cap comes after the first save; the replay needs more."""
    more = "--replay_len 4096 --replay_steps 1 --target_len 4608 --batch_sequences 1".split()
    error = one_error(*finish(place, flags("capped", *more), ("capped/state.pt.writing", 2, "cap")))
    assert "out of memory" in error and "; saved up to step" in error, error
    code, log = finish(place, ["--resume", "--out", "capped"])
    assert code == 0, log
    assert [r["step"] for r in read_metrics(place / "capped")] == list(range(1, 7))


# ---- data that changed -------------------------------------------------------------------------


def test_data_that_vanished_or_changed_is_named_by_resume(toy_dir, tmp_path, monkeypatch, error_of):
    """Refused before anything is written; put back, the run goes on from another folder, as one
    does that was begun by a version that wrote no data down."""
    monkeypatch.chdir(tmp_path)
    model, texts, out, other = map(Path, ("model", "texts", "out", "other.txt"))
    shutil.copytree(toy_dir, model)
    texts.mkdir()
    for path in (other, *(texts / f"{i}.txt" for i in range(3))):
        path.write_text(PROSE)
    run_stopped(flags(out, "--replay_data", str(other), model=model, data=texts), 1)
    began, resume = read_run(out), ["--resume", "--out", str(tmp_path / out)]
    for path, changed, end, message in (
        (other, other, None, "does not exist"),
        (other, other, b"@\n", "has changed since the start (bytes: "),
        (texts, texts / "2.txt", b"@\n", "has changed since the start (bytes: "),
        (model, model / "tokenizer.json", b"}\n", "has changed since the start (tokenizer: "),
        (model, model / "model.safetensors", b"@", "has changed since the start (sha256: "),
    ):
        whole = changed.read_bytes()
        changed.unlink()
        if end:
            changed.write_bytes(whole[:-1] + end)
        error = error_of(train.main, resume, out)
        assert f"{tmp_path / path} {message}" in error, error
        changed.write_bytes(whole)
    (out / "run.json").write_text(json.dumps({k: v for k, v in began.items() if k != "data"}))
    monkeypatch.chdir(texts)
    train.main(resume)
    monkeypatch.chdir(tmp_path)
    now, then = ([entry | {"path": ""} for entry in run["data"]] for run in (read_run(out), began))
    assert now == then != []


@pytest.fixture()
def library(monkeypatch) -> list[Path]:
    """The files of the standard library that a run reads; here only a few."""
    root, files = corpora.standard_library_files()
    few = files[:9]
    monkeypatch.setattr(corpora, "standard_library_files", lambda: (root, few[:]))
    return few


def test_every_change_of_the_data_shows(tmp_path, library):
    """A file of the folder is large: pieces of it are looked at, the first and the last among
    them. And another text of the same version of Python."""
    os.mkfifo(tmp_path / "pipe.txt")  # left out: opened it would wait for ever
    files = {"a.txt": (4_000_000, [0, 3_999_999]), "b.txt": (200_000, range(0, 200_000, 9_999))}
    for name, (size, _) in files.items():
        (tmp_path / name).write_bytes(bytes(size))
    settings = train.Settings(replay_data=[str(tmp_path)])
    began = corpora.contents(settings)
    assert (began[1]["path"], began[1]["files"]) == (str(tmp_path), 2)
    older = [{"path": "the Python standard library", "python": platform.python_version()}]

    def change() -> str | None:
        now = corpora.contents(settings)
        assert corpora.changed(older, now) is None
        return corpora.changed(began, now)

    for name, (size, places) in files.items():
        for place in places:
            (tmp_path / name).write_bytes(bytes(place) + b"x" + bytes(size - place - 1))
            assert f"{tmp_path} has changed since the start (sha256: " in change()
        (tmp_path / name).write_bytes(bytes(size))
    assert change() is None
    (tmp_path / "b.txt").rename(tmp_path / "c.txt")
    assert f"{tmp_path} has changed since the start (sha256: " in change()
    library.pop()
    assert "the Python standard library has changed since the start (files: 10 then" in change()


def test_changes_of_the_words_woven_into_the_toys_text_show(tmp_path, library, monkeypatch):
    settings, names = train.Settings(), ("support/data/toy.py", "assets/tiny/needle.json")
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True)
        shutil.copy(corpora.toy.ROOT / name, tmp_path / name)
    monkeypatch.setattr(corpora.toy, "ROOT", tmp_path)
    began = corpora.contents(settings)
    for name in names:
        text = (tmp_path / name).read_text()
        (tmp_path / name).write_text(text.replace("a", "b", 1))
        change = corpora.changed(began, corpora.contents(settings))
        assert change.startswith(f"{', '.join(names)} has changed since the start (sha256: ")
        (tmp_path / name).write_text(text)


# ---- two at once, and an evaluation ------------------------------------------------------------


def test_two_runs_on_one_folder(place, whole):
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
        error = one_error(*finish(place, argv, name=name))
        assert "another run is writing to busy" in error
    os.kill(first.pid, signal.SIGCONT)
    first.join()
    assert first.exitcode == 0
    assert_same(place / "busy", whole)


def test_a_killed_evaluation_goes_on(place):
    """Rows once each, and the same as those of an evaluation that nothing disturbs; a second start
    runs nothing."""
    argv = "--model model --haystack prose.txt --lengths 300 --depths 0 0.5 1 --n 2 --out".split()
    assert finish(place, [*argv, "e1"], name="eval_needle")[0] == 0
    event = ("e2/needle.jsonl", 6, signal.SIGKILL)
    assert finish(place, [*argv, "e2"], event, "eval_needle")[0] == -signal.SIGKILL
    for finished in (False, True):
        code, log = finish(place, [*argv, "e2"], name="eval_needle")
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


def spoilt(bad_steps: dict[int, str]):
    """The loss or the gradient of some steps (1-based) is not finite."""
    accumulate, steps = train.accumulate, iter(range(1, 99))

    def spoil(model, *rest):
        loss, what = accumulate(model, *rest), bad_steps.get(next(steps))
        if what == "gradient":
            model.lm_head.weight.grad[3, 5] = torch.inf
        return torch.nan if what == "loss" else loss

    return watched(train, "accumulate", spoil)


def test_a_step_that_is_not_finite_changes_nothing(toy_dir, prose_file, tmp_path):
    """The steps before and after it are taken; the state is the one of the step before."""
    states, save = {}, RunFolder.save

    def keep(run, state):
        states[state["step"]] = [m.clone() for m in state["optimizer"]["masters"]]
        save(run, state)

    bad = {3: "gradient", 4: "loss", 6: "loss", 7: "gradient"}
    with spoilt(bad), mock.patch.object(RunFolder, "save", keep):
        train.main(flags(tmp_path / "out", model=toy_dir, data=prose_file))
    rows = read_metrics(tmp_path / "out")
    assert [r["skipped"] for r in rows] == [0, 0, 1, 2, 2, 3, 4, 4]
    assert [r["step"] for r in rows if None in (r["loss"], r["grad_norm"])] == list(bad)
    for step in range(2, 9):
        same = all(torch.equal(a, b) for a, b in zip(states[step - 1], states[step], strict=True))
        assert same == (step in bad)
    load_pretrained(tmp_path / "out")  # refuses weights that are not finite


def test_three_in_a_row_stop_the_run_with_the_batch(toy_dir, prose_file, tmp_path, error_of):
    """Counted over a --resume as well. What is saved is finite, and the run can pass over them."""
    out, resume = tmp_path / "out", ["--resume", "--out", str(tmp_path / "out")]
    with spoilt({3: "loss", 4: "gradient", 5: "loss"}) as accumulated:
        error = error_of(train.main, flags(out, model=toy_dir, data=prose_file))
    # the bar of the training is closed first: nothing is drawn below the error line
    assert "steps 3 to 5 had no finite loss" in error and "; saved up to step 5" in error
    batch, last = load_file(out / "skipped_batch.safetensors"), accumulated.call_args.args[1]
    assert torch.equal(batch["input_ids"], torch.cat([ids for ids, _, _ in last]))
    assert torch.equal(batch["position_ids"], torch.cat([positions for _, positions, _ in last]))
    state = torch.load(out / "state.pt", weights_only=True)
    assert all(m.isfinite().all() for m in state["optimizer"]["masters"])
    with spoilt({1: "loss"}):  # the sixth step: the fourth in a row
        assert "steps 4 to 6 had no" in error_of(train.main, resume)
    train.main(resume)
    assert [r["skipped"] for r in read_metrics(out)] == [0, 0, 1, 2, 3, 4, 4, 4]


def test_a_state_that_is_not_finite_is_not_saved_and_a_damaged_one_is_named(tmp_path):
    run, state = RunFolder(tmp_path), {"step": 1, "optimizer": {"masters": [torch.ones(300)]}}
    run.save(state)
    for bad in (torch.nan, torch.inf):
        state["optimizer"]["masters"][0][1] = bad
        with pytest.raises(BadInput, match="not saved: optimizer.masters.0 of the state"):
            run.save(state | {"step": 2})
    assert run.load()["step"] == 1
    whole = (tmp_path / "state.pt").read_bytes()
    for damaged in (whole[:-400], b"", b"x" * 100):
        (tmp_path / "state.pt").write_bytes(damaged)
        with pytest.raises(BadInput, match=r"state.pt is damaged"):
            run.load()


# ---- damaged files -----------------------------------------------------------------------------


def use_tokenizer(folder) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(tokenizer.encode("The 12 apples, isn't it?\n\n é 我 \x00"))


TOY_TOKENIZER = load_tokenizer(ROOT / "assets" / "tiny")


def read_types(folder) -> None:
    read_impactful(folder / "impactful.json", TOY_TOKENIZER, TOY_TOKENIZER.vocab_size)


READERS = {
    "config.json": (load_pretrained, fuzz.damage_json),
    "tokenizer.json": (use_tokenizer, fuzz.damage_json),
    "tokenizer_config.json": (use_tokenizer, fuzz.damage_json),
    "tokenizer.model": (use_tokenizer, fuzz.damage_bytes),
    "model.safetensors": (load_pretrained, fuzz.damage_safetensors),
    "impactful.json": (read_types, fuzz.damage_json),
    "needle.jsonl": (Results, fuzz.damage_bytes),
}
RECORDED = ROOT / "assets" / "results" / "tiny_16k"
MANY = pytest.param(range(1000, 11_000), marks=pytest.mark.slow)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("seeds", [range(400), MANY], ids=["some", "many"])
def test_damaged_files_are_refused(name, seeds, toy_dir, tmp_path):
    """Read, or refused by an error that main() reports, in time and memory."""
    folder, file = tmp_path / "model", tmp_path / "model" / name
    shutil.copytree(toy_dir, folder)
    if (RECORDED / name).is_file():
        lines = (RECORDED / name).read_bytes().splitlines(keepends=True)
        file.write_bytes(b"".join(lines if name.endswith(".json") else lines[:4]))
    if name == "tokenizer.model":
        (folder / "tokenizer.json").unlink()
        tokens = [bytes([b]) for b in range(256)] + [b"th", b"the"]
        file.write_bytes(b"".join(fuzz.base64_line(token, i) for i, token in enumerate(tokens)))
    read, damage = READERS[name]
    good, refused = file.read_bytes(), 0
    read(folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in seeds:
        file.write_bytes(damage(good, random.Random(seed)))
        started = time.process_time()  # of this process: others may be busy
        try:
            read(folder)
        except (BadInput, OSError):
            refused += 1
        assert time.process_time() - started < 5, f"seed {seed}"
    assert refused > len(seeds) / 10
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"{grown:.0f} MiB"


def test_no_pickle_is_loaded_except_weights_only():
    """torch.load and np.load unpickle nothing else unless they are told to."""
    told = re.compile(r"pickle\.loads?\(|Unpickler\(|weights_only=False|allow_pickle=True")
    for file in (*ROOT.glob("*.py"), *ROOT.glob("support/**/*.py")):
        assert not told.search(file.read_text()), file
