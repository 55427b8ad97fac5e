"""How the code is laid out: imports run one way, files read from top to bottom."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CODE = ("model.py", "recipe.py", "train.py", "eval_needle.py")
SUPPORT = sorted((ROOT / "support").rglob("*.py"))
FOLDERS = ("support", "tests", "studies", "examples")
INDEX = ast.get_docstring(ast.parse((ROOT / "support/__init__.py").read_text()))
ROOMS = re.findall(r"^(\w+)/((?:.*\n?(?!\w+/))*)", INDEX, re.MULTILINE)  # name, its modules


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it: `from a.b import c` counts as a.b.c."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_run_one_way_between_the_four_files():
    """support <- model <- recipe <- train, eval_needle."""
    below = {"model.py": set(), "recipe.py": {"model"}}
    below |= dict.fromkeys(("train.py", "eval_needle.py"), {"model", "recipe"})
    four = {name.removesuffix(".py") for name in CODE}
    for name, allowed in below.items():
        assert {m.split(".")[0] for m in imported(ROOT / name)} & four <= allowed, name


def test_support_imports_none_of_the_four_files_and_a_room_only_rooms_above_it():
    order = [name for name, _ in ROOMS]
    assert sorted(order) == sorted(
        p.name for p in (ROOT / "support").iterdir() if p.is_dir() and p.name != "__pycache__"
    )
    for path in SUPPORT:
        modules = {m.split(".")[0] for m in imported(path)}
        assert not modules & {name.removesuffix(".py") for name in CODE}, path
        if path.parent != ROOT / "support":
            above = order[: order.index(path.parent.name) + 1]
            rooms = {m.split(".")[1] for m in imported(path) if m.startswith("support.")}
            assert rooms <= set(above), (path, rooms - set(above))


def test_the_index_of_support_names_every_module():
    for room, text in ROOMS:
        modules = {p.stem for p in (ROOT / "support" / room).glob("*.py")} - {"__init__"}
        assert modules <= set(re.findall(r"\w+", text)), (room, modules)


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


def test_lines_are_not_too_long():
    for path in [*ROOT.glob("*.py"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.py"))]:
        assert max(map(len, path.read_text().splitlines()), default=0) <= 100, path
