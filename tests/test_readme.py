"""README cannot rot: its numbers come from JSON, its equation table from the code and the tests."""

import ast
import dataclasses
import functools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import mutate
import pytest
import readme_runs
import slimpajama
from fresh_copy import environment, fresh_copy
from update_readme import ROOT, RUN, render

from model import load_tokenizer
from support.data.text import load_tokens

README = (ROOT / "README.md").read_text()
CODE = ("model.py", "recipe.py", "train.py", "eval_needle.py")
SOURCES = [*(ROOT / name for name in CODE), *sorted((ROOT / "support").rglob("*.py"))]
FOLDERS = ("tests", "studies", "examples")


def tags(text: str) -> set[str]:
    return set(re.findall(r"\[(E\d+)\]", text))


@functools.cache
def functions(path: Path) -> dict[str, str]:
    """Name -> source of each function or class."""
    text = path.read_text()
    lines = text.splitlines()
    return {
        node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno])
        for node in ast.parse(text).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }


def test_numbers_come_from_the_json_files():
    assert render(README) == README, "run python studies/update_readme.py"


@pytest.mark.parametrize("name", ["tiny_128k", "tiny_64k", "tiny_16k"])
def test_the_toys_kept_runs_have_the_settings_that_the_commands_have_now(name):
    import train

    kept = json.loads((ROOT / "assets" / "results" / name / "run.json").read_text())["settings"]
    given, options = train.parse(["--target_len", str(kept["target_len"])])
    there = train.machine(train.HERE, "cpu", options.out)
    config = train.LlamaConfig.from_dir(given["model"])
    ours = train.as_kept(train.resolve(given, config, there), options)
    own = ("optimizer", "keep_attention", "offload_inputs")  # the plan's, by the machine
    ours = {k: v for k, v in ours.items() if k in kept and k not in ("model", *own)}
    assert ours == {k: kept[k] for k in ours} and len(ours) > 25


def test_the_smallest_run_was_measured_with_the_commands_shown():
    shown = README.replace("\\\n", " ")
    measured = json.loads((RUN.parent / "smallest_run.json").read_text())
    for part, command in readme_runs.SETS["smallest"].items():
        assert f"python {command}\n" in re.sub(" +", " ", shown)
        assert measured[part]["command"] == command


def test_the_table_rests_on_the_committed_rows():
    rows = [json.loads(line) for line in (RUN / "needle.jsonl").read_text().splitlines()]
    summary = json.loads((RUN / "rows" / "needle_results.json").read_text())
    for e in (e for e in summary["table"] if e["task"] == "niah_single"):
        same = [r for r in rows if all(r[k] == e[k] for k in ("model", "task", "length"))]
        assert len(same) == e["n"] and sum(r["score"] for r in same) / e["n"] == e["mean"]


def test_equations_stand_in_code_readme_and_tests():
    code = tags("\n".join(p.read_text() for p in SOURCES))
    tests = tags("\n".join(p.read_text() for p in (ROOT / "tests").glob("test_*.py")))
    assert code == tags(README) == tests == {f"E{i}" for i in range(1, len(code) + 1)}


def test_every_row_of_the_equation_table_names_code_and_a_test_that_exist():
    """The function holds the tag, and so does each test named."""
    rows = re.findall(
        r"^\| \[(E\d+)\].*\| `([\w/]+\.py):(\w+)` \| (`.*`) \|$", README, re.MULTILINE
    )
    assert [tag for tag, *_ in rows] == list(mutate.MUTANTS)
    for tag, file, function, named in rows:
        assert f"[{tag}]" in functions(ROOT / file)[function], (tag, function)
        for test_file, test in re.findall(r"`(\w+\.py)::(\w+)`", named):
            assert f"[{tag}]" in functions(ROOT / "tests" / test_file)[test], (tag, test)
        assert mutate.named_tests()[tag]


def test_each_formula_has_mutants_that_a_test_kills():
    """Cheaply, from the kept table: it is of the present list and of the present lines, which stand
    in functions that hold the tag. A line that changes asks for `python studies/mutate.py`."""
    kept = json.loads(mutate.TABLE.read_text())["mutants"]
    listed = [(t, m[0], *pair) for t, m in mutate.MUTANTS.items() for pair in m[1:]]
    listed = [(*mutant, mutate.line_of(*mutant[1:3])) for mutant in listed]
    fields = ("tag", "right", "wrong", "line")  # not the file: it may have moved since
    listed = [(tag, *rest) for tag, _, *rest in listed]
    assert [tuple(row[k] for k in fields) for row in kept] == listed, "run python studies/mutate.py"
    assert all(row["killed_by"] for row in kept)
    for tag, (file, *pairs) in mutate.MUTANTS.items():
        tagged = [body for body in functions(ROOT / file).values() if f"[{tag}]" in body]
        assert len(pairs) >= 2 and all(right != wrong for right, wrong in pairs)
        assert all(right in "".join(tagged) for right, _ in pairs), tag


# ---- what README shows, runs -------------------------------------------------------------------


def shell_blocks() -> list[tuple[str, str, list[str]]]:
    """(mark, commands to run, commands shown) of each shell block. The mark stands in a comment
    right before it: `run` (or `run slow`) and the commands in toy size. The lines that make an
    environment are left to CI, which runs them (.ci/run)."""
    found = re.findall(r"(?:<!-- ([a-z ]+): (.*) -->\n)?```bash\n((?s:.*?))```", README)
    blocks = []
    for mark, instead, text in found:
        shown = text.replace("\\\n", " ").splitlines()
        kept = [x for x in shown if "pip install" not in x and not x.startswith("export ")]
        blocks.append((mark, instead, kept))
    return blocks


def flags(command: str) -> set[str]:
    return {word for word in command.split() if word.startswith("--")}


RUNS = {"; ".join(shown)[:60]: (mark, run, shown) for mark, run, shown in shell_blocks()}


def test_every_shell_block_says_whether_it_is_run_and_runs_what_it_shows():
    """The same programs in the same order, with every flag shown (and more, that make it small)."""
    assert len(RUNS) == README.count("```bash") == README.count("```") / 2 >= 3
    for mark, instead, shown in RUNS.values():
        assert mark in ("run", "run slow"), shown
        for small, full in zip(instead.split("; "), shown, strict=True):
            same_program = small.split()[:2] == full.split()[:2]
            assert same_program and flags(small) >= flags(full), (small, full)


def test_ci_makes_the_environment_as_readme_says():
    ci = (ROOT / ".ci" / "run").read_text()
    assert "-m venv" in ci and "pip install" in ci and "-r requirements-dev.txt" in ci
    assert all((ROOT / name).is_file() for name in re.findall(r"-r (requirements\S*txt)", README))


@pytest.mark.parametrize(
    "shown",
    [
        pytest.param(name, marks=[pytest.mark.slow] if mark == "run slow" else [])
        for name, (mark, *_) in RUNS.items()
    ],
)
def test_the_commands_of_readme_run_in_a_fresh_copy(shown, tmp_path):
    mark, commands, _ = RUNS[shown]
    copy = fresh_copy(tmp_path / "copy", models=mark == "run slow")
    for command in commands.split("; "):
        done = subprocess.run(
            command, shell=True, cwd=copy, env=environment(), capture_output=True, text=True
        )
        assert done.returncode == 0, (command, done.stdout[-2000:], done.stderr[-2000:])
    result = "losses.json" if "--losses" in commands else "out/needle_results.json"
    assert (copy / result).is_file()


def test_the_papers_data_is_written_as_train_py_reads_it(tmp_path, monkeypatch, capsys):
    """Stand-ins for the two packages that need a network; the text must survive the way. Bad input
    is one line."""
    asked = []

    class Rows(list):
        def take(self, n):
            return self[:n]

    def load_dataset(name, **options):
        asked.append((name, options))
        return Rows({"input_ids": [i, i + 1]} for i in range(9))

    class AutoTokenizer:
        @classmethod
        def from_pretrained(cls, name):
            asked.append(name)
            return cls()

        def decode(self, ids):
            return f"Row {ids}. " * 20

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    fake = SimpleNamespace(AutoTokenizer=AutoTokenizer)
    monkeypatch.setitem(sys.modules, "transformers", fake)
    tiny = ROOT / "assets" / "tiny"
    slimpajama.main([str(tiny), "--out", str(tmp_path / "data"), "--samples", "3"])
    split = {"split": "train", "streaming": True}
    assert asked == [
        "meta-llama/Llama-2-7b-hf",
        ("yaofu/slimpajama-per-source-length-upsample", split),
    ]
    tokenizer = load_tokenizer(tiny)
    tokens = load_tokens([str(tmp_path / "data")], tokenizer)
    assert len(tokens.documents) == 3
    first = tokens.parts[0]
    assert tokenizer.decode(first.tolist()) == "Row [0, 1]. " * 20
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for argv, match in (
        ([str(tiny)], 'pip install datasets "transformers>=5"'),
        ([str(tiny), "--samples", "0"], "--samples 0 must be at least 1"),
        ([], "the following arguments are required: DIR"),
    ):
        with pytest.raises(SystemExit) as stop:
            slimpajama.main(argv)
        assert stop.value.code == 2 and match in capsys.readouterr().err.splitlines()[-1]


# ---- links, words, numbers, sizes --------------------------------------------------------------


def test_links_and_their_anchors_exist():
    """A heading's anchor as GitHub makes it, or an explicit one (LOG.md's findings)."""
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)", README):
        path = ROOT / (file or "README.md")
        assert path.exists(), file
        if anchor:
            text = path.read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in known | set(re.findall(r'<a id="([\w-]+)">', text)), anchor
    assert README.count("(LOG.md#") >= 8


def test_the_glossary_has_every_symbol_of_the_shapes_and_equations():
    """Symbols of (B, T)-like shapes and of the tagged lines of the four files."""
    glossary = ast.get_docstring(ast.parse((ROOT / "model.py").read_text())).split("Glossary")[1]
    known = set(re.findall(r"[A-Za-z]\w*['*]?", glossary))
    for name in CODE:
        text = (ROOT / name).read_text()
        for shape in re.findall(r"(?<!\w)\(([\w/* .]+(?:, [\w/* .]+)+|\w+,)\)", text):
            parts = [part.strip() for part in shape.split(",") if part.strip()]
            if all(re.fullmatch(r"[A-Z]{1,2}|[dn1]|d/2|n\*d|\.\.\.", part) for part in parts):
                missing = {p.removesuffix("/2") for p in parts} - known - {"1", "n", "n*d", "..."}
                assert not missing, (name, shape, missing)
        for line in re.findall(r"# \[E\d+\] (.*)", text):
            symbols = set(re.findall(r"(?<![\w'])[A-Z][0-9*']?(?![\w'])", line)) - {"U", "S", "N"}
            assert symbols <= known | {"T*", "L"}, (name, line, symbols - known)


@pytest.mark.parametrize("name", CODE)
def test_the_four_files_read_from_top_to_bottom(name):
    """No function, class or constant is used above the lines that define it."""
    body = ast.parse((ROOT / name).read_text()).body
    defined = {n.name: n.lineno for n in body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    for n in body:
        names = (
            [t.id for t in n.targets if isinstance(t, ast.Name)] if hasattr(n, "targets") else []
        )
        defined |= dict.fromkeys(names, n.lineno)
    assert len(defined) > 10
    used = [n for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.Name)]
    assert not [n.id for n in used if n.lineno < defined.get(n.id, 0)]


MEASURED = r"\d[\d.,]* ?(?:%|seconds|minutes|hours|s\b|GB\b|GiB|nats?\b|tokens/s|x\b)|\d+ of \d+"
NOT_MEASURED = {  # what such a number outside a region may be: a rule, a size, a goal
    "30 %": "the paper's share of the target",
    "10 %": "a bound that tests/test_plan.py checks",
    "80 GB": "a GPU",
    "80 %": "the goal",
    "20 %": "the paper's share of impactful tokens",
    "10,000 x": "a RoPE base",
}


def test_measurements_stand_in_regions_only():
    prose = re.sub(r"<!-- begin (.*?) -->.*?<!-- end \1 -->", "", README, flags=re.DOTALL)
    prose = re.sub(r"```.*?```|<!--.*?-->|`.*?`", "", prose, flags=re.DOTALL)
    assert set(re.findall(MEASURED, prose)) <= set(NOT_MEASURED)


def test_lines_are_not_too_long():
    for path in [*SOURCES, *(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))]:
        assert max(map(len, path.read_text().splitlines()), default=0) <= 100, path


def test_files_and_flags_that_readme_names_exist():
    import train

    for path in set(re.findall(r"`((?:tests|support|studies|examples)/[\w/]+\.py)`", README)):
        assert (ROOT / path).is_file(), path
    sources = [*ROOT.glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))]
    known = "".join(path.read_text() for path in sources)
    classes = (train.Settings, train.RunOptions)
    flags = {field.name for cls in classes for field in dataclasses.fields(cls)}
    others = {"check", "index", "model_args", "metadata", "confirm_run_unsafe_code"}
    others |= {"nproc_per_node"}  # torchrun's
    for flag in set(re.findall(r"(?<![\w-])--(\w+)", README)) - others:
        assert f'"--{flag}"' in known or flag in flags, flag
    assert train.Settings().target_len == 131_072
