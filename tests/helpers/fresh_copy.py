"""A fresh copy of the repository, as git would give it: tracked and new files, nothing ignored."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def fresh_copy(folder: Path, models: bool = False) -> Path:
    """Copy this repository's files to `folder`, which need not exist. models: with links to the
    ignored models/ and data/, where they are here, so that nothing is fetched twice."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "-co", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():  # not one that is deleted, but not yet for git
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    for name in ("models", "data") if models else ():
        if (ROOT / name).exists():
            (folder / name).symlink_to((ROOT / name).resolve())
    return folder


def environment(**more: str) -> dict[str, str]:
    """For a child in a fresh copy: this Python first, nothing of this checkout, no .pyc files (two
    versions of a file within a second look the same to Python)."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTEST_CURRENT_TEST")}
    return kept | {"PATH": path, "PYTHONDONTWRITEBYTECODE": "1"} | more
