"""README and docs/ cannot rot: their numbers are those recorded, their commands run."""

import ast
import dataclasses
import functools
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import mutate
import pytest
import readme_runs
from common import read_json, recipe_in, same_recipe
from fresh_copy import environment, fresh_copy
from make_docs import FACT, PAGES, REGION, REGIONS, RESULTS, ROOT, fact, render

import train

TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
ALL = "\n".join(TEXT.values())
SOURCES = [*ROOT.glob("*.py"), *sorted((ROOT / "support").rglob("*.py"))]


@functools.cache
def functions(path: Path) -> dict[str, str]:
    """Name -> source of each function or class."""
    text = path.read_text()
    nodes = [n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    lines = text.splitlines()  # whole lines, with the comments at their ends
    return {node.name: "\n".join(lines[node.lineno - 1 : node.end_lineno]) for node in nodes}


# ---- numbers -----------------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXT)
def test_numbers_come_from_recorded_results(page):
    assert render(TEXT[page]) == TEXT[page], "run python studies/make_docs.py"


def test_facts_by_hand():
    """Something that is not recorded is an error, not an empty place."""
    assert fact("tiny_128k/run.json: settings/train_len, ,") == "39,424"
    assert fact("fsdp.json: largest_difference_nats/train.py, batch reversed, .1e") == "1.8e-07"
    page = "It took ?<!--tiny_128k/run.json: seconds, minutes--> minutes."
    assert render(page) == page.replace("?", "8.7")
    for unknown in ("x<!--cost.json: nothing, d-->", "x<!--no such name-->"):
        with pytest.raises(KeyError):
            render(unknown)
    assert sorted(name for _, name, _ in REGION.findall(ALL)) == sorted(REGIONS)  # each once


MEASURED = r"\d[\d.,]* ?(?:%|seconds|minutes|hours|s\b|GB\b|GiB|nats?\b|tokens/s|x\b)|\d+ of \d+"
NOT_MEASURED = {  # numbers that a sentence may hold: rules, sizes, goals
    "30 %": "the paper's share of the new window",
    "10 %": "a bound that tests/test_plan.py checks",
    "80 GB": "a GPU",
    "20 %": "the paper's share of impactful tokens",
    "85 %": "the paper's claim",
    "95 %": "of an interval",
    "12.5 %": "one of eight values",
}


@pytest.mark.parametrize("page", TEXT)
def test_measurements_are_facts_or_in_regions(page):
    prose = FACT.sub("", REGION.sub("", TEXT[page]))
    prose = re.sub(r"```.*?```|<!--.*?-->|`.*?`", "", prose, flags=re.DOTALL)
    assert set(re.findall(MEASURED, prose)) <= set(NOT_MEASURED)


@pytest.mark.parametrize("name", ["tiny_128k", "tiny_64k", "tiny_16k"])
def test_the_toys_kept_runs_have_the_settings_that_the_commands_have_now(name):
    kept = read_json(RESULTS / name / "run.json")["settings"]
    assert same_recipe(kept, f"--target_len {kept['target_len']}") and len(recipe_in(kept)) > 20


@pytest.mark.parametrize(
    ("name", "page"), [("first", "README.md"), ("smallest", "docs/running.md")]
)
def test_a_kept_run_was_measured_with_the_commands_shown(name, page):
    shown = [line for block, lines in shell_blocks().items() if page in block for line in lines]
    measured = read_json(RESULTS / f"{name}_run.json")
    for part, (_, command) in readme_runs.SETS[name].items():
        assert measured[part]["command"] == command
        if part in ("train", "eval"):
            assert f"python {command}" in [" ".join(line.split()) for line in shown]


# ---- formulas ----------------------------------------------------------------------------------


def test_equations_are_in_code_page_and_tests():
    """The function that the page names holds the tag, and so does each test."""
    page = mutate.equations()
    for paths in (SOURCES, (ROOT / "tests").glob("test_*.py"), [ROOT / "docs/equations.md"]):
        text = "".join(path.read_text() for path in paths)
        assert set(re.findall(r"\[(E\d+)\]", text)) == set(page) and len(page) > 20
    for tag, (file, function, tests) in page.items():
        for path, name in [(file, function), *(test.split("::") for test in tests)]:
            assert tests and f"[{tag}]" in functions(ROOT / path)[name], (tag, name)


def test_each_formula_has_mutants_that_a_test_kills():
    """Cheaply, from the kept table: it is of the present list and of the present lines, which are
    in functions that hold the tag. A line that changes asks for `python studies/mutate.py`."""
    kept, page = read_json(mutate.TABLE)["mutants"], mutate.equations()
    listed = [(*mutant, mutate.line_of(page[mutant[0]][0], mutant[1])) for mutant in mutate.MUTANTS]
    fields = ("tag", "right", "wrong", "line")  # not the file: it may have moved since
    assert [tuple(row[k] for k in fields) for row in kept] == listed, "run python studies/mutate.py"
    assert all(row["killed_by"] for row in kept)
    of_tag = [tag for tag, _, _ in mutate.MUTANTS]
    assert list(dict.fromkeys(of_tag)) == list(page) and min(map(of_tag.count, page)) >= 2
    for tag, right, wrong in mutate.MUTANTS:
        bodies = functions(ROOT / page[tag][0]).values()
        assert any(f"[{tag}]" in body and right in body for body in bodies) and right != wrong, tag


# ---- commands ----------------------------------------------------------------------------------

SMALL = {  # flags put behind those shown; the last one counts
    "train.py": "--target_len 9216 --train_len 1024 --steps 2 --probe_steps 1 --analysis_samples 1"
    " --replay_steps 1 --replay_len 512 --batch_sequences 2",
    "eval_needle.py": "--lengths 1024 --n 1",
    "recipe.py": "--target_len 9216 --train_len 1024",
}
NAMES = {"DIR": "assets/tiny", "TEXTS": "LOG.md README.md", "FILE": "LOG.md"}


@functools.cache
def shell_blocks() -> dict[str, list[str]]:
    """page and number -> the commands of a shell block, as shown. The lines that make an
    environment are left to CI, which runs them (.ci/run)."""
    blocks = {}
    for page, text in TEXT.items():
        for i, block in enumerate(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)):
            lines = block.replace("\\\n", " ").splitlines()
            lines = [line.partition(" #")[0].strip() for line in lines]
            made = r"pip install|export |python3 -m venv"
            blocks[f"{page} {i}"] = [line for line in lines if line and not re.match(made, line)]
    return blocks


def test_every_shell_block_is_run():
    assert ALL.count("```") == 2 * len(shell_blocks()) and len(shell_blocks()) >= 5
    for commands in shell_blocks().values():
        assert commands and all(c.split()[0] in ("python", "torchrun") for c in commands)
    ci = (ROOT / ".ci" / "run").read_text()
    assert "-m venv" in ci and "pip install" in ci and "-r requirements-dev.txt" in ci
    assert all((ROOT / name).is_file() for name in re.findall(r"-r (requirements\S*txt)", ALL))


# One process for all commands of a block, so that torch is imported once; its standard library has
# two packages, so that it is soon read.
RUN = """
import runpy, sys, sysconfig
sysconfig.get_path = lambda name: "../library"
for command in sys.argv[1:]:
    sys.argv = command.split()[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
    print("done", command)
"""


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(name, marks=[pytest.mark.slow] if "examples/" in " ".join(lines) else [])
        for name, lines in shell_blocks().items()
    ],
)
def test_the_commands_shown_run_in_a_fresh_copy(block, tmp_path):
    """With every flag shown, made small by more of them."""
    slow, commands = "examples/" in " ".join(shell_blocks()[block]), []
    copy = fresh_copy(tmp_path / "copy", models=slow)
    for package in ("asyncio", "pydoc_data"):
        library = Path(sysconfig.get_path("stdlib"), package)
        shutil.copytree(library, tmp_path / "library" / package)
    for command in shell_blocks()[block]:
        program, name, *flags = command.split()
        words = [program, name, *(NAMES.get(word, word) for word in flags), SMALL.get(name, "")]
        commands.append(" ".join(words))
    together = [[sys.executable, "-c", RUN, *commands]]
    for words in [command.split() for command in commands] if slow else together:
        options = {"cwd": copy, "env": environment(), "capture_output": True, "text": True}
        done = subprocess.run(words, check=False, **options)
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])
    assert slow or all(f"done {command}" in done.stdout for command in commands)
    if "eval_needle.py" in " ".join(commands):
        assert list(copy.rglob("needle_results.json"))


# ---- links and names ---------------------------------------------------------------------------


@pytest.mark.parametrize("page", TEXT)
def test_links_and_their_anchors_exist(page):
    """A heading's anchor as GitHub makes it, or an explicit one (LOG.md's findings)."""
    for file, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([\w-]+))?\)", TEXT[page]):
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), file
        if anchor:
            text = path.read_text()
            headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
            known = {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings}
            assert anchor in known | set(re.findall(r'<a id="([\w-]+)">', text)), anchor


def test_readme_is_short_and_leads_to_every_page():
    lines = TEXT["README.md"].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("## "))
    assert len(lines) <= 200 and first <= 45
    assert len(TEXT["docs/contributing.md"].splitlines()) <= 40
    for page in TEXT.keys() - {"README.md"}:
        assert f"]({page}" in TEXT["README.md"], page
        assert TEXT[page].splitlines()[0].endswith("?"), f"{page}: which question?"


OTHERS_FLAGS = (  # of lm_eval, pip and torchrun
    "check model_args metadata confirm_run_unsafe_code limit tasks index nproc_per_node".split()
)


def test_files_and_flags_that_the_pages_name_exist():
    folders = ("tests", "support", "studies", "examples")
    for path in set(re.findall(rf"`((?:{'|'.join(folders)})/[\w/]+\.py)`", ALL)):
        assert (ROOT / path).is_file(), path
    sources = [*SOURCES, *(p for name in folders for p in (ROOT / name).rglob("*.py"))]
    known = "".join(path.read_text() for path in sources)
    classes = (train.Settings, train.RunOptions)
    fields = {field.name for cls in classes for field in dataclasses.fields(cls)}
    flags = set(re.findall(r"(?<![\w-])--(\w+)", re.sub(r"<!--.*?-->", "", ALL)))
    for flag in flags - fields - set(OTHERS_FLAGS):
        assert f'"--{flag}"' in known, flag
