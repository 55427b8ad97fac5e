"""How the code is laid out: imports run one way, files read from top to bottom."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BELOW = {  # file -> what it may import of the four, as modules: support <- model <- recipe <- both
    "model.py": set(),
    "recipe.py": {"model"},
    "train.py": {"model", "recipe"},
    "eval_needle.py": {"model", "recipe"},
}
FOUR = {name.removesuffix(".py") for name in BELOW}
INDEX = ast.get_docstring(ast.parse((ROOT / "support/__init__.py").read_text()))
ROOMS = dict(re.findall(r"^(\w+)/((?:.*\n?(?!\w+/))*)", INDEX, re.MULTILINE))  # name -> its modules


def imported(path: Path, depth: int = 1) -> set[str]:
    """The modules that a file imports, anywhere in it, as the first `depth` parts of their names:
    `from a.b import c` is a.b.c."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {".".join(name.split(".")[:depth]) for name in found}


@pytest.mark.parametrize("name", BELOW)
def test_imports_run_one_way_between_the_four_files(name):
    assert imported(ROOT / name) & FOUR <= BELOW[name]


def test_the_rooms_of_support_are_those_of_its_index():
    """A room imports only rooms above it, and none of the four files; the index has each module."""
    folders = [p.name for p in (ROOT / "support").iterdir() if p.is_dir()]
    assert sorted(ROOMS) == sorted(name for name in folders if name != "__pycache__")
    for path in (ROOT / "support").rglob("*.py"):
        assert not imported(path) & FOUR, path
    above = set()
    for room, modules in ROOMS.items():
        above.add(f"support.{room}")
        for path in (ROOT / "support" / room).glob("*.py"):
            rooms = {name for name in imported(path, 2) if name.startswith("support.")}
            assert rooms <= above, (path, rooms - above)
            assert path.stem in ("__init__", *re.findall(r"\w+", modules)), path


@pytest.mark.parametrize("name", BELOW)
def test_the_glossary_has_every_symbol_of_the_shapes_and_equations(name):
    """Symbols of (B, T)-like shapes and of the tagged lines."""
    glossary = ast.get_docstring(ast.parse((ROOT / "model.py").read_text())).split("Glossary")[1]
    known, text = set(re.findall(r"[A-Za-z]\w*['*]?", glossary)), (ROOT / name).read_text()
    for shape in re.findall(r"(?<!\w)\(([\w/* .]+(?:, [\w/* .]+)+|\w+,)\)", text):
        parts = [part.strip() for part in shape.split(",") if part.strip()]
        if all(re.fullmatch(r"[A-Z]{1,2}|[dn1]|d/2|n\*d|\.\.\.", part) for part in parts):
            missing = {p.removesuffix("/2") for p in parts} - known - {"1", "n", "n*d", "..."}
            assert not missing, (shape, missing)
    for line in re.findall(r"# \[E\d+\] (.*)", text):
        symbols = set(re.findall(r"(?<![\w'])[A-Z][0-9*']?(?![\w'])", line)) - {"U", "S", "N"}
        assert symbols <= known | {"T*", "L"}, (line, symbols - known)


@pytest.mark.parametrize("name", BELOW)
def test_the_four_files_read_from_top_to_bottom(name):
    """No function, class or constant is used above the lines that define it."""
    body, defined = ast.parse((ROOT / name).read_text()).body, {}
    for n in body:
        if isinstance(n, ast.FunctionDef | ast.ClassDef):
            defined[n.name] = n.lineno
        for target in getattr(n, "targets", ()):
            if isinstance(target, ast.Name):
                defined[target.id] = n.lineno
    assert len(defined) > 10
    used = [n for n in ast.walk(ast.Module(body, [])) if isinstance(n, ast.Name)]
    assert not [n.id for n in used if n.lineno < defined.get(n.id, 0)]
