"""README cannot rot: its numbers come from JSON, its equation table from the code and the tests."""

import re
from pathlib import Path

from update_readme import ROOT, render

README = (ROOT / "README.md").read_text()
CODE = ("model.py", "recipe.py", "train.py", "eval_needle.py")


def tags(text: str) -> set[str]:
    return set(re.findall(r"\[E(\d+)\]", text))


def test_numbers_come_from_the_json_files():
    assert render(README) == README, "run python tests/update_readme.py"


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
    known = (ROOT / "train.py").read_text() + (ROOT / "eval_needle.py").read_text()
    known += (ROOT / "recipe.py").read_text() + (ROOT / "tests" / "bench_cost.py").read_text()
    for flag in set(re.findall(r"(?<![\w-])--(\w+)", README)) - {"check", "r"}:
        assert f'"--{flag}"' in known, flag
    assert train.parse([]).target_len == 131_072
