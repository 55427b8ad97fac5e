"""studies/: rows are compared on the same texts, kept at once, and made from the same tokens."""

from argparse import Namespace

import common
import pytest
import real_study
import tiny_study
from common import Study, Table, lead, recipe_in, settings_of

from model import LlamaConfig


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """The study of the toy, with its models and rows in an empty folder."""
    monkeypatch.chdir(common.ROOT)
    args = Namespace(target=32_768, steps=40, texts=8, again=False, model="assets/tiny")
    args.out = tmp_path / "models"
    return tiny_study.TinyStudy(args, Table(tmp_path / "rows.json", 32_768, ["none"]))


def real_of(folder, *flags):
    args = real_study.parse(["--out", str(folder), *flags])
    return real_study.RealStudy(args, Table(folder / "rows.json", args.target, real_study.NAMES))


def recipes(study, *names):
    return [recipe_in(settings_of(study.flags_of(name, 0))) for name in names]


def test_lead_of_a_row_compares_the_same_texts_by_hand():
    ours = {"0": {"scores": {"64": [[1, 1], [1, 0]]}}, "1": {"scores": {"64": [[1, 1], [0, 0]]}}}
    other = {"0": {"scores": {"64": [[1, 0], [1, 0]]}}, "2": {"scores": {"64": [[0, 0], [0, 0]]}}}
    found = lead(ours, other, 64)  # seed 0 alone is in both: differences 1/2 and 0
    assert found["mean"] == 0.25 and found["texts"] == 2 and lead(other, ours, 64)["mean"] == -0.25
    assert found["by_seed"] == [0.25] and lead(ours, other, 64, "nats") is None

    gains = [0.5, 0.25, 0.25, 0.0, 0.5, 0.125, 0.375, 0.0]  # t of 7 degrees: 2.3646, by table
    ours = {"0": {"scores": {"64": [[1, gain] for gain in gains]}}}
    other = {"0": {"scores": {"64": [[1, -gain] for gain in gains]}}}
    mean = sum(gains) / 8
    half = 2.3646 * (sum((g - mean) ** 2 for g in gains) / 7 / 8) ** 0.5
    found = lead(ours, other, 64)["interval_95"]
    assert found == pytest.approx((mean - half, mean + half), rel=1e-3)


def test_a_recipe_is_the_same_until_a_setting_differs_that_both_versions_know():
    flags = "--target_len 32768 --steps 40 --lr 1e-3"
    then = recipe_in(settings_of(flags)) | {"of_an_older_version": 1}
    del then["prefix"]
    assert common.same_recipe(then, flags)
    assert not common.same_recipe(then | {"lr": 2e-3}, flags)


def test_rows_are_kept_at_once_and_the_table_tells_them_apart(tmp_path, capsys):
    table = Table(tmp_path / "rows.json", 64, ["untrained", "none", "longrecipe"])
    found = {  # hits and nats at the target of 3 texts
        "longrecipe": ([[1, 1], [1, 0], [1, 1]], [[-0.5, -0.5], [-1.0, -1.0], [-0.5, -0.5]]),
        "none": ([[0, 1], [0, 0], [0, 0]], [[-2.0, -3.0], [-3.0, -3.0], [-4.0, -3.0]]),
    }
    for name, (hits, nats) in found.items():
        results = [
            {"task": "x", "length": length, "repeat": i, "score": hit, "answer_logprob": nat}
            for length in (8192, 64)
            for i in (2, 0, 1)  # by text, whatever their order
            for hit, nat in zip(hits[i], nats[i], strict=True)
        ]
        loss = {"task": "loss", "length": 64, "repeat": 0, "score": 3.0}
        table.keep(name, 0, common.measured([*results, loss]), steps=40)
        assert table.row(name, 0)["scores"]["64"] == hits
    assert table.row("none", 1) == {} and table.read()["steps"] == 40
    assert table.shown() == ["none", "longrecipe"]
    table.report()
    _, best, line = capsys.readouterr().out.splitlines()
    # by hand: hits +0.5, +0.5, +1; nats +2, +2, +3
    assert best.startswith("LongRecipe") and line.startswith("plain positions")
    assert "+67 (" in line and "+2.33 (" in line
    table.draw("made by hand")
    assert (tmp_path / "rows.png").is_file()


def test_the_rows_of_a_theta_are_trained_on_the_same_tokens(tiny, smollm2_dir, tmp_path):
    for name, analyst in {
        "pose": "longrecipe",
        "pose, paper's base": "longrecipe, paper's base",
    }.items():
        types = tiny.folder(analyst, 1) / "impactful.json"
        assert f"--impactful {types} --probe_steps 5" in tiny.flags_of(name, 1)
    real, paper = real_of(tmp_path), "rpes, paper's theta"
    for found, differ in (
        (recipes(tiny, "longrecipe", "pose"), {"method"}),
        (recipes(tiny, "longrecipe", "yarn"), {"rope", "rope_base"}),
        (recipes(real, "longrecipe", "none"), {"method"}),
        (recipes(real, "none", paper), {"method", "rope_base"}),
    ):
        ours, other = found
        assert {k for k in ours if ours[k] != other[k]} == differ


def test_the_untrained_row_of_yarn_has_its_scaling_and_the_theta_of_the_original(tiny):
    made = tiny.make_model("untrained with yarn", 0)
    assert made == {"rope_theta": 10_000.0, "seconds": 0}
    config = LlamaConfig.from_dir(tiny.folder("untrained with yarn", 0))
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
    assert (config.rope_theta, config.rope_scaling) == (10_000.0, scaling)
    assert config.max_position_embeddings == 32_768
    assert tiny.theta_of("untrained") == 40_000 == 4 * tiny.theta_of("untrained, old base")
    assert tiny.theta_of("yarn, paper's base") == tiny.theta_of("none, paper's base") > 140_000


def test_a_row_with_another_merge_weight_takes_longrecipes_training(tiny, monkeypatch):
    cost = dict.fromkeys(("seconds", "peak_GiB", "commit", "hardware", "threads"), 1)
    run_json = lambda _, flags: cost | {"settings": settings_of(flags)}  # noqa: E731
    monkeypatch.setattr(common, "train_into", run_json)
    merged = []
    monkeypatch.setattr(tiny_study, "merge", lambda *args: merged.append(args))
    row = tiny.make_model("merge weight 0.75", 1)
    trained, out = (tiny.folder(name, 1) for name in ("longrecipe", "merge weight 0.75"))
    assert merged == [("assets/tiny", trained / "replayed", out, 0.75)]
    assert row["recipe"]["merge_weight"] == 0.75 and row["seconds"] == 1
    assert "--keep_stages" in tiny.flags_of("longrecipe", 1)


def test_rows_outlive_their_models_until_what_is_asked_for_changes(smollm2_dir, tmp_path):
    study = real_of(tmp_path)
    row = {"recipe": recipes(study, "longrecipe")[0], "impactful": {"5": [" the", 1.0]}}
    row["scores"] = {"16384": [[0.0]] * 12}
    assert study.is_done(row, "longrecipe", 0)
    for change in ({"scores": {}}, {"scores": {"16384": [[0.0]] * 16}}):
        assert not study.is_done(row | change, "longrecipe", 0)
    assert not study.is_done(row | {"recipe": row["recipe"] | {"steps": 7}}, "longrecipe", 0)
    assert not real_of(tmp_path, "--again").is_done(row, "longrecipe", 0)
    study.table.keep("longrecipe", 0, row)
    assert common.read_json(study.types_of("none", 0)) == row["impactful"]


def test_the_rows_of_the_real_study_on_a_cpu_stay_what_they_were(tmp_path):
    """Studies that were begun with another version go on with this one."""
    study = real_of(tmp_path)
    assert study.train_flags() == (
        "--model models/smollm2 --target_len 16384 --data data/prose --join --batch_sequences 1"
        " --steps 32 --probe_steps 4 --analysis_samples 4 --log_softmax --rebased_analysis"
        " --replay_steps 4 --lr 2e-4 --replay_lr 2e-5 --dtype bfloat16 --save_minutes 10"
    )
    assert study.judge_flags() == (
        "--tasks needles_8 --haystack data/essays --lengths 8192 16384 --dtype bfloat16"
    )
    assert study.folder("none, paper's theta", 1).name == "none__paper_s_theta_1"
    assert real_study.TABLE.file.name == "smollm2_study.json"
    of_a_gpu = real_of(tmp_path, "--samples", "512", "--target", "32768").train_flags()
    assert "--batch_sequences 8 --steps 64 --probe_steps 8" in of_a_gpu


def test_a_row_of_the_real_study_holds_the_answers_of_its_own_model(tmp_path, monkeypatch):
    """needle.jsonl names a model by its folder."""
    results = [
        {"model": model, "task": "needles_8", "length": length, "repeat": 0, "score": score}
        | {"answer_logprob": -1.0}
        for model, score in (("longrecipe_0", 1.0), ("none_0", 0.0))
        for length in (8192, 16_384)
    ]
    monkeypatch.setattr(Study, "make_model", lambda *_: {})
    monkeypatch.setattr(real_study, "run", lambda _: None)
    monkeypatch.setattr(real_study, "read_lines", lambda _: results)
    study = real_of(tmp_path, "--texts", "1")
    row = study.measure("longrecipe", 0)
    assert row["scores"] == {"8192": [[1.0]], "16384": [[1.0]]}
    assert study.is_done(row, "longrecipe", 0)


def test_rows_are_made_in_their_order_until_the_minutes_are_over(tmp_path, monkeypatch, capsys):
    table, now = Table(tmp_path / "rows.json", 64, ["a", "b", "c", "d"]), [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Table, "draw", lambda *_: None)
    table.keep("b", 0, {"made": "before"})

    class OfNames(Study):
        flags_of = judge = None  # only measure() would call them

        def is_done(self, row, name, seed):
            return bool(row)

        def measure(self, name, seed):
            now[0] += 50
            return {"made": name}

    study, rows = OfNames(Namespace(minutes=2), table), [(name, 0) for name in "dbac"]
    study.make_rows(rows, "", steps=40)
    made = {name: row["0"]["made"] for name, row in table.read()["runs"].items()}
    assert made == {"b": "before", "d": "d", "a": "a"} and table.read()["steps"] == 40
    assert "--minutes 2: stopped before c, seed 0" in capsys.readouterr().err
    study.make_rows(rows, "")
    assert table.row("c", 0) == {"made": "c"}


@pytest.mark.parametrize(
    ("study", "flags", "said"),
    [
        (tiny_study, "--score nowhere", "'nowhere' is none of the rows"),
        (real_study, "--only nowhere", "'nowhere' is none of the rows"),
        (tiny_study, "--n 1 --report", "1 text(s) a length, but an interval needs two or more"),
    ],
)
def test_what_makes_no_row_is_refused(study, flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(flags.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err
