"""What the studies share: one command after the other, and rows that are kept as soon as they
are there. Importing this file also lets a study import the repository's own files."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from support.system.console import log  # noqa: E402
from support.system.whole_files import write_atomically  # noqa: E402

RESULTS = Path("assets/results")  # of the folder that a study works in: ROOT


def run(command: str) -> None:
    """A command of the repository, written as after `python`; SystemExit if it fails."""
    log(f"$ python {command}")
    done = subprocess.run([sys.executable, *command.split()], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{done.stderr[-2000:]}\nerror: that command failed")


def read_json(file: Path) -> dict:
    """{} where there is no such file."""
    return json.loads(file.read_text()) if file.is_file() else {}


def read_lines(file: Path) -> list[dict]:
    """The objects of a .jsonl file; none where there is no such file."""
    return [json.loads(x) for x in file.read_text().splitlines()] if file.is_file() else []


def write_json(file: Path, found: dict, indent: int | None = None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, json.dumps(found, indent=indent) + "\n")


def train_into(out: Path, flags: str) -> dict:
    """Run train.py, or go on with a run that was stopped; run.json of the finished run."""
    record = read_json(out / "run.json")
    if record.get("status") != "done":
        run(f"train.py {flags} --out {out} {'--resume' if record else ''}")
    return read_json(out / "run.json")


def rebase(original: str, out: Path, theta: float, window: int) -> None:
    """The untrained row: the original's weights in `out`, under another rope_theta and window."""
    from model import load_pretrained, save_pretrained

    if not out.is_dir():
        model = load_pretrained(original)
        model.config = model.config.with_rope(theta, window)
        save_pretrained(model, out, tokenizer_from=original)


def by_text(results: list[dict], length: int, field: str = "score") -> list[list[float]]:
    """One list a text: what was measured of each of its answers at this length."""
    texts: dict[int, list[float]] = {}
    for r in results:
        if r["length"] == length and r["task"] != "loss" and field in r:
            texts.setdefault(r["repeat"], []).append(r[field])
    return [texts[repeat] for repeat in sorted(texts)]
