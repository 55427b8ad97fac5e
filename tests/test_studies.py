"""studies/: rows are compared on the same texts, kept at once, and made from the same tokens."""

from argparse import Namespace

import common
import pytest
import real_study
import tiny_study
from common import Table, lead

from model import LlamaConfig


def test_lead_of_a_row_compares_the_same_haystacks_by_hand():
    ours = {"0": {"scores": {"64": [[1, 1], [1, 0]]}}, "1": {"scores": {"64": [[1, 1], [0, 0]]}}}
    other = {"0": {"scores": {"64": [[1, 0], [1, 0]]}}, "2": {"scores": {"64": [[0, 0], [0, 0]]}}}
    found = lead(ours, other, 64)  # seed 0 alone is in both: differences 1/2 and 0
    assert found["mean"] == 0.25 and found["n"] == 2 and lead(other, ours, 64)["mean"] == -0.25

    gains = [0.5, 0.25, 0.25, 0.0, 0.5, 0.125, 0.375, 0.0]  # t of 7 degrees: 2.3646, by table
    ours = {"0": {"scores": {"64": [[1, gain] for gain in gains]}}}
    other = {"0": {"scores": {"64": [[1, -gain] for gain in gains]}}}
    mean = sum(gains) / 8
    half = 2.3646 * (sum((g - mean) ** 2 for g in gains) / 7 / 8) ** 0.5
    found = lead(ours, other, 64)["interval_95"]
    assert found == pytest.approx((mean - half, mean + half), rel=1e-3)


def test_a_row_of_the_study_takes_the_analysis_of_longrecipe_under_its_own_base():
    args = Namespace(target=32_768, steps=40, n=8)
    for name, analyst in {
        "pose": "longrecipe",
        "pose, paper's base": "longrecipe, paper's base",
    }.items():
        flags = tiny_study.flags_of(name, 1, args)
        assert f"--impactful {tiny_study.types_of(analyst, 1, args)} --probe_steps 5" in flags
    ours, *others = (
        common.recipe_in(common.settings_of(tiny_study.flags_of(name, 1, args)))
        for name in ("longrecipe", "pose", "yarn")
    )
    differ = [{k for k in ours if ours[k] != other[k]} for other in others]
    assert differ == [{"method"}, {"rope", "rope_base"}]  # the very same tokens


def test_the_untrained_row_of_yarn_has_its_scaling_and_the_theta_of_the_original(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(common.ROOT)
    monkeypatch.setattr(tiny_study, "RUNS", tmp_path)
    args = Namespace(target=32_768, steps=40, n=8)
    made = tiny_study.make_model("untrained with yarn", 0, args)
    assert made == {"flags": "--rope_base 10000.0 --rope yarn", "seconds": 0}
    config = LlamaConfig.from_dir(tiny_study.folder("untrained with yarn", 0, args))
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, scaling)
    assert config.max_position_embeddings == 32_768


def test_a_recipe_is_the_same_until_a_setting_differs_that_both_versions_know():
    flags = "--target_len 32768 --steps 40 --lr 1e-3"
    then = common.recipe_in(common.settings_of(flags)) | {"of_an_older_version": 1}
    del then["prefix"]
    assert common.same_recipe(then, flags)
    assert not common.same_recipe(then | {"lr": 2e-3}, flags)


def test_rows_are_kept_at_once_and_the_table_tells_them_apart(tmp_path, capsys):
    table = Table(tmp_path / "rows.json", (8, 64), ["untrained", "longrecipe", "none"])
    found = {  # hits and nats at the target of 3 texts
        "longrecipe": ([[1, 1], [1, 0], [1, 1]], [[-0.5, -0.5], [-1.0, -1.0], [-0.5, -0.5]]),
        "none": ([[0, 1], [0, 0], [0, 0]], [[-2.0, -3.0], [-3.0, -3.0], [-4.0, -3.0]]),
    }
    for name, (hits, nats) in found.items():
        results = [
            {"task": "x", "length": length, "repeat": i, "score": hit, "answer_logprob": nat}
            for length in (8, 64)
            for i in (2, 0, 1)  # by text, whatever their order
            for hit, nat in zip(hits[i], nats[i], strict=True)
        ]
        table.keep(name, 0, common.measured(results), steps=40)
        assert table.row(name, 0)["scores"]["64"] == hits
    assert table.row("none", 1) == {} and table.read()["steps"] == 40
    runs = table.read()["runs"]
    assert table.shown() == table.best_first(runs) == ["longrecipe", "none"]
    assert table.best_first({"none": runs["longrecipe"], "longrecipe": runs["none"]})[0] == "none"
    table.report()
    line = capsys.readouterr().out.splitlines()[-1]
    # by hand: hits +0.5, +0.5, +1; nats +2, +2, +3
    assert line.startswith("plain positions") and "+66.7 (" in line and "+2.33 (" in line
    table.draw("hand-made")
    assert (tmp_path / "rows.png").is_file()


def test_the_real_study_trains_on_the_same_tokens_and_outlives_its_models(
    smollm2_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(common.ROOT)
    args = real_study.parse(["--out", str(tmp_path)])
    args.table = Table(tmp_path / "rows.json", (8192, 16_384), real_study.NAMES)
    recipe = {
        name: common.recipe_in(common.settings_of(real_study.flags_of(name, 0, args)))
        for name in ("longrecipe", "none", "rpes, paper's theta")
    }
    ours, none, rpes = recipe.values()
    assert {k for k in ours if ours[k] != none[k]} == {"method"}
    assert {k for k in none if none[k] != rpes[k]} == {"method", "rope_base"}

    row = {"recipe": ours, "texts": 12, "impactful": {"5": [" the", 1.0]}}
    row["scores"] = {"8192": [[1.0]], "16384": [[0.0]]}
    assert not real_study.is_done(row | {"scores": {}}, "longrecipe", 0, args)
    assert real_study.is_done(row, "longrecipe", 0, args)
    assert not real_study.is_done(row | {"texts": 16}, "longrecipe", 0, args)
    assert not real_study.is_done(row | {"recipe": ours | {"steps": 7}}, "longrecipe", 0, args)
    args.table.keep("longrecipe", 0, row)
    assert common.read_json(real_study.types_of("none", 0, args)) == row["impactful"]


def test_the_rows_of_the_real_study_on_a_cpu_stay_what_they_were():
    """Studies that were begun with another version go on with this one."""
    args = real_study.parse(["--out", "runs"])
    assert real_study.train_flags(args) == (
        "--model models/smollm2 --target_len 16384 --data data/prose --join --batch_sequences 1"
        " --steps 32 --probe_steps 4 --analysis_samples 4 --log_softmax --rebased_analysis"
        " --replay_steps 4 --lr 2e-4 --replay_lr 2e-5 --dtype bfloat16 --save_minutes 10"
    )
    assert real_study.judge_flags(args) == (
        "--tasks needles_8 --haystack data/essays --lengths 8192 16384 --dtype bfloat16"
    )
    assert str(real_study.folder("none, paper's theta", 1, args)) == "runs/none__paper_s_theta_1"
    assert real_study.TABLE.file.name == "smollm2_study.json"
    of_a_gpu = real_study.train_flags(real_study.parse(["--samples", "512", "--target", "32768"]))
    assert "--batch_sequences 8 --steps 64 --probe_steps 8" in of_a_gpu


def test_a_row_of_the_real_study_holds_the_answers_of_its_own_model(tmp_path, monkeypatch):
    """needle.jsonl names a model by its folder."""
    args = real_study.parse(["--out", str(tmp_path), "--texts", "1"])
    results = [
        {"model": model, "task": "needles_8", "length": length, "repeat": 0, "score": score}
        | {"answer_logprob": -1.0}
        for model, score in (("longrecipe_0", 1.0), ("none_0", 0.0))
        for length in (8192, 16_384)
    ]
    monkeypatch.setattr(real_study, "make_model", lambda *_: {})
    monkeypatch.setattr(real_study, "run", lambda _: None)
    monkeypatch.setattr(real_study, "read_lines", lambda _: results)
    row = real_study.measure("longrecipe", 0, args)
    assert row["scores"] == {"8192": [[1.0]], "16384": [[1.0]]}
    assert real_study.is_done(row, "longrecipe", 0, args)


def test_rows_are_made_in_their_order_until_the_minutes_are_over(tmp_path, monkeypatch, capsys):
    table, now = Table(tmp_path / "rows.json", (8, 64), ["a", "b", "c", "d"]), [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Table, "draw", lambda *_: None)
    table.keep("b", 0, {"made": "before"})

    def measure(name, seed, args):
        now[0] += 50
        return {"made": name}

    rows = [(name, 0) for name in "dbac"]
    is_done = lambda row, *_: bool(row)  # noqa: E731
    common.make_rows(table, rows, is_done, measure, Namespace(minutes=2), "", steps=40)
    made = {name: row["0"]["made"] for name, row in table.read()["runs"].items()}
    assert made == {"b": "before", "d": "d", "a": "a"} and table.read()["steps"] == 40
    assert "--minutes 2: stopped before c, seed 0" in capsys.readouterr().err
    common.make_rows(table, rows, is_done, measure, Namespace(minutes=2), "")
    assert table.row("c", 0) == {"made": "c"}


def test_a_row_that_is_not_there_is_refused(capsys):
    for study, flag in ((tiny_study, "--score"), (real_study, "--only")):
        with pytest.raises(SystemExit) as stop:
            study.main([flag, "nowhere"])
        assert stop.value.code == 2 and "'nowhere' is none of the rows" in capsys.readouterr().err
