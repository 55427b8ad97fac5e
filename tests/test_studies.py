"""studies/: rows are compared on the same texts, kept at once, and made from the same tokens."""

import json

import common
import pytest
import real_study
import tiny_study
from common import Study, lead, recipe_of

from model import LlamaConfig


def study_in(folder, study, *flags):
    """With its models and rows in an empty folder."""
    made = study.study_of([*flags])
    made.args.out, made.file = folder / "models", folder / "rows.json"
    return made


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.chdir(common.ROOT)
    return study_in(tmp_path, tiny_study)


@pytest.fixture
def real(tmp_path, monkeypatch, smollm2_dir):
    monkeypatch.chdir(common.ROOT)
    return study_in(tmp_path, real_study)


def result(length: int, text: int, score: float, nats: float = -1.0, **more) -> dict:
    """A line of needle.jsonl."""
    about = {"task": "x", "length": length, "repeat": text, "depth": 0, "identity": "ours"}
    return about | {"score": score, "answer_logprob": nats, "expected": ["1"]} | more


def test_lead_of_a_row_compares_the_same_texts_by_hand():
    ours = {"0": {"scores": {"64": [[1, 1], [1, 0]]}}, "1": {"scores": {"64": [[1, 1], [0, 0]]}}}
    other = {"0": {"scores": {"64": [[1, 0], [1, 0]]}}, "2": {"scores": {"64": [[0, 0], [0, 0]]}}}
    found = lead(ours, other, 64)  # seed 0 alone is in both: differences 1/2 and 0
    assert found["mean"] == 0.25 and found["texts"] == 2 and lead(other, ours, 64)["mean"] == -0.25
    assert found["by_seed"] == [0.25] and lead(ours, other, 64, "nats") is None


def test_a_recipe_is_the_same_until_a_setting_differs_that_both_versions_know():
    flags = "--target_len 32768 --steps 40 --lr 1e-3"
    then = recipe_of(flags) | {"of_an_older_version": 1}
    del then["prefix"]
    assert common.same_recipe(then, flags)
    assert not common.same_recipe(then | {"lr": 2e-3}, flags)


def test_a_finished_run_is_taken_unless_its_settings_or_its_model_differ(tmp_path, monkeypatch):
    monkeypatch.chdir(common.ROOT)
    flags = "--target_len 32768 --steps 40"
    settings = common.train.as_kept(common.resolved(flags))
    for other in ({}, {"steps": 41}, {"model": "/another"}):
        common.write_json(tmp_path / "run.json", {"settings": settings | other, "status": "done"})
        if not other:
            assert common.train_into(tmp_path, flags)["settings"] == settings
            continue
        with pytest.raises(SystemExit, match="holds a run of other settings"):
            common.train_into(tmp_path, flags)


def test_rows_are_kept_at_once_and_the_table_tells_them_apart(tiny, capsys):
    found = {  # hits and nats of 3 texts
        "longrecipe": ([[1, 1], [1, 0], [1, 1]], [[-0.5, -0.5], [-1.0, -1.0], [-0.5, -0.5]]),
        "none": ([[0, 1], [0, 0], [0, 0]], [[-2.0, -3.0], [-3.0, -3.0], [-4.0, -3.0]]),
    }
    for name, (hits, nats) in found.items():
        results = [result(8192, 0, 3.0, task="loss")]
        results += [
            result(length, i, *answer)
            for length in (8192, tiny.target)
            for i in (2, 0, 1)  # by text, whatever their order
            for answer in zip(hits[i], nats[i], strict=True)
        ]
        tiny.keep(name, 0, common.measured(results))
        row = tiny.row(name, 0)
        assert row["scores"] == {"8192": hits, "32768": hits} and row["losses"] == [3.0]
    assert tiny.row("none", 1) == {} and json.loads(tiny.file.read_text())["steps"] == 40
    best, line = (list(row.values()) for row in tiny.cells())
    # by hand: hits +0.5, +0.5, +1; nats +2, +2, +3
    assert best[0] == "LongRecipe" and line[0] == "plain positions"
    assert line[-2].startswith("+67 (") and line[-1].startswith("+2.33 (")
    tiny.args.report = True
    tiny.main()
    assert "| LongRecipe |" in capsys.readouterr().out
    assert tiny.file.with_suffix(".png").is_file()


def test_the_rows_of_a_theta_are_trained_on_the_same_tokens(tiny, real):
    for theta in ("", ", paper's base"):
        types = tiny.folder(f"longrecipe{theta}", 1) / "impactful.json"
        assert f"--impactful {types} --probe_steps 5" in tiny.flags_of(f"pose{theta}", 1)
    for study, name, other, differ in (
        (tiny, "longrecipe", "pose", {"method"}),
        (tiny, "longrecipe", "yarn", {"rope", "rope_base"}),
        (tiny, "longrecipe", "share 60 %", {"train_len", "steps"}),
        (real, "longrecipe", "none", {"method"}),
        (real, "none", "rpes, paper's theta", {"method", "rope_base"}),
        (real, "none", "yarn", {"method", "rope", "rope_base"}),
        (real, "yarn", "none with yarn", {"method"}),
        (real, "longrecipe", "min_count 5", {"min_count"}),
        (real, "longrecipe", "segments of 32 tokens", {"min_segment_tokens"}),
    ):
        ours, theirs = (recipe_of(study.flags_of(row, 0)) for row in (name, other))
        assert {k for k in ours if ours[k] != theirs[k]} == differ, other


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
    run_json = lambda _, flags: cost | {"settings": recipe_of(flags)}  # noqa: E731
    monkeypatch.setattr(common, "train_into", run_json)
    monkeypatch.setattr(tiny_study, "selected", lambda out: {"questions_kept": out.name})
    merged = []
    monkeypatch.setattr(tiny_study, "merge", lambda *args: merged.append(args))
    row = tiny.make_model("merge weight 0.75", 1)
    trained, out = (tiny.folder(name, 1) for name in ("longrecipe", "merge weight 0.75"))
    assert merged == [("assets/tiny", trained / "replayed", out, 0.75)]
    assert row["recipe"]["merge_weight"] == 0.75 and row["seconds"] == 1
    assert row["questions_kept"] == trained.name and "impactful" not in row
    assert "--keep_stages" in tiny.flags_of("longrecipe", 1)


def test_rows_outlive_their_models_until_what_is_asked_for_changes(real):
    row = {"recipe": recipe_of(real.flags_of("longrecipe", 0)), "impactful": {"5": [" the", 1.0]}}
    row["scores"] = {"16384": [[0.0]] * 12}
    assert real.is_done(row, "longrecipe", 0)
    for change in (
        {"scores": {}},
        {"scores": {"16384": [[0.0]] * 16}},
        {"recipe": row["recipe"] | {"steps": 7}},
    ):
        assert not real.is_done(row | change, "longrecipe", 0)
    real.args.again = True
    assert not real.is_done(row, "longrecipe", 0)
    real.keep("longrecipe", 0, row)
    assert common.read_json(real.types_of("none", 0)) == row["impactful"]


def test_the_rows_of_the_real_study_on_a_cpu_stay_what_they_were():
    """Studies that were begun with another version go on with this one."""
    study = real_study.study_of([])
    assert not any("--impactful" in study.flags_of(name, 0) for name in real_study.VARIANTS)
    assert study.about().items() <= common.read_json(study.file).items()
    assert study.folder("none, paper's theta", 1).name == "none__paper_s_theta_1"
    of_a_gpu = real_study.study_of("--samples 512 --target 32768".split())
    assert "--batch_sequences 8 --steps 64 --probe_steps 8" in of_a_gpu.train_flags()
    assert of_a_gpu.file.name == "smollm2_study_32768.json"


def test_a_row_holds_the_newest_answers_of_its_own_weights(real, monkeypatch):
    """Of several results in the folder where all models are judged."""
    results = [
        result(16_384, 0, 0.0),  # of an older wording
        result(16_384, 0, 0.0, identity="another"),
        result(16_384, 1, 0.5),
        result(16_384, 2, 0.0),  # of a larger run
        result(16_384, 0, 1.0),
    ]
    monkeypatch.setattr(Study, "make_model", lambda *_: {})
    monkeypatch.setattr(real_study, "run", lambda _: None)
    monkeypatch.setattr(common, "read_lines", lambda _: results)
    monkeypatch.setattr(common.Hashes, "of_model", lambda *_: "ours")
    real.args.texts = 2
    row = real.measure("longrecipe", 0)
    assert row["scores"] == {"16384": [[1.0], [0.5]]} and real.is_done(row, "longrecipe", 0)


def test_rows_are_made_in_their_order_until_the_minutes_are_over(tiny, monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(common.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(Study, "draw", lambda _: None)
    monkeypatch.setattr(Study, "is_done", lambda _, row, *more: bool(row))

    def measure(_, name, seed):
        now[0] += 50
        return {"made": name}

    monkeypatch.setattr(Study, "measure", measure)
    tiny.args.minutes, rows = 2, [(name, 0) for name in ("pose", "none", "full", "rpes")]
    tiny.keep("none", 0, {"made": "before"})
    tiny.make_rows(rows)
    made = {name: row["0"]["made"] for name, row in tiny.runs().items()}
    assert made == {"none": "before", "pose": "pose", "full": "full"}
    assert "--minutes 2: stopped before rpes, seed 0" in capsys.readouterr().err
    tiny.make_rows(rows)
    assert tiny.row("rpes", 0) == {"made": "rpes"}


@pytest.mark.parametrize(
    ("study", "flags", "said"),
    [
        (tiny_study, "--score nowhere", "'nowhere' is none of the rows"),
        (real_study, "--only nowhere", "'nowhere' is none of the rows"),
        (tiny_study, "--n 1 --report", "--texts 1: an interval needs two texts or more"),
    ],
)
def test_what_makes_no_row_is_refused(study, flags, said, capsys):
    with pytest.raises(SystemExit) as stop:
        study.main(flags.split())
    assert stop.value.code == 2 and said in capsys.readouterr().err
