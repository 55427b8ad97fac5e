"""README cannot rot: its numbers come from JSON, its equation table from the code and the tests."""

import json
import re
from pathlib import Path

import real_run
from update_readme import ROOT, RUN, render

README = (ROOT / "README.md").read_text()
CODE = ("model.py", "recipe.py", "train.py", "eval_needle.py")


def tags(text: str) -> set[str]:
    return set(re.findall(r"\[E(\d+)\]", text))


def test_numbers_come_from_the_json_files():
    assert render(README) == README, "run python tests/update_readme.py"


def test_the_smallest_run_was_measured_with_the_commands_shown():
    shown = README.replace("\\\n", " ")
    measured = json.loads((RUN.parent / "smallest_run.json").read_text())
    for part, command in (("train", real_run.SMALLEST_TRAIN), ("eval", real_run.SMALLEST_EVAL)):
        assert f"python {command}\n" in re.sub(" +", " ", shown)
        assert measured[part]["command"] == command


def test_table_and_figure_stand_on_the_committed_rows_in_one_order():
    rows = [json.loads(line) for line in (RUN / "needle.jsonl").read_text().splitlines()]
    summary = json.loads((RUN / "rows" / "needle_results.json").read_text())
    for e in (e for e in summary["table"] if e["task"] == "niah_single"):
        same = [r for r in rows if all(r[k] == e[k] for k in ("model", "task", "length"))]
        assert len(same) == e["n"] and sum(r["score"] for r in same) / e["n"] == e["mean"]
    titles, windows = real_run.panels(summary["models"])
    assert [windows[m] for m in windows] == [8192, 8192, 16384, 16384]  # base and control: the old
    region = README.split("<!-- begin results -->")[1].replace("`", "").replace("*", "")
    places = [region.index(f"| {titles[m]} |") for m in windows]
    assert places == sorted(places)


def test_equations_stand_in_code_readme_and_tests():
    code = tags("\n".join((ROOT / f).read_text() for f in CODE))
    tests = tags("\n".join(p.read_text() for p in Path(__file__).parent.glob("test_*.py")))
    assert code == tags(README) == tests == {str(i) for i in range(1, 12)}


def test_every_row_of_the_equation_table_names_code_and_a_test_that_exist():
    rows = re.findall(r"\| \[E(\d+)\].*?\| `(\w+\.py):(\w+)` \| `(\w+\.py)::(\w+)` \|", README)
    assert len(rows) == 11
    for number, file, function, test_file, test in rows:
        source = (ROOT / file).read_text()
        body = re.search(rf"^(def|class) _?{function}\b", source, re.MULTILINE)
        assert body and f"[E{number}]" in source, (number, function)
        assert f"def {test}(" in (ROOT / "tests" / test_file).read_text(), test


def test_files_and_flags_that_readme_names_exist():
    import train

    for path in set(re.findall(r"`((?:tests|support)/[\w/]+\.py)`", README)):
        assert (ROOT / path).is_file(), path
    sources = [*ROOT.glob("*.py"), *(ROOT / "tests").glob("*.py")]
    known = "".join(path.read_text() for path in sources)
    for flag in set(re.findall(r"(?<![\w-])--(\w+)", README)) - {"check", "index"}:
        assert f'"--{flag}"' in known, flag
    assert train.parse([]).target_len == 131_072
