"""Long text that is on every machine: what ships with Python."""

import itertools
import sysconfig
from pathlib import Path

SEPARATOR = "\n\n\n"


def standard_library_topics() -> str:
    """The chapters of the language reference that ship with Python: 110k to 165k tokens of prose,
    depending on the tokenizer."""
    from pydoc_data.topics import topics

    return SEPARATOR.join(text for _, text in sorted(topics.items()))


def standard_library_files() -> tuple[Path, list[Path]]:
    """Their folder, and the Python sources of the standard library, tests and tables left out."""
    root = Path(sysconfig.get_path("stdlib"))
    skip = set("test tests idle_test site-packages dist-packages pydoc_data encodings".split())
    files = [p for p in sorted(root.rglob("*.py")) if not skip & set(p.relative_to(root).parts)]
    return root, files


def standard_library_sources() -> list[str]:
    _, files = standard_library_files()
    return [p.read_text(encoding="utf-8", errors="replace") for p in files]


def standard_library_text() -> str:
    """Every source of the standard library, each followed by a chapter of the language reference
    (they come round again): long text that is on every machine."""
    chapters = itertools.cycle(standard_library_topics().split(SEPARATOR))
    return SEPARATOR.join(
        part for source in standard_library_sources() for part in (source, next(chapters))
    )
