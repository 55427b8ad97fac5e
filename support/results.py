"""Rows of an evaluation on disk: append-only JSONL that survives a kill."""

import json
from pathlib import Path

from support.run_state import write_atomically


class Results:
    """needle.jsonl: append-only; what an earlier, perhaps interrupted run measured is not
    measured again."""

    def __init__(self, path: Path):
        self.path, self.rows = path, []
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for i, line in enumerate(lines):
            try:
                self.rows.append(json.loads(line))
            except json.JSONDecodeError:
                if i + 1 < len(lines):
                    raise ValueError(
                        f"{path}, line {i + 1}: not JSON; move the file away to start anew"
                    ) from None
                write_atomically(
                    path, "".join(x + "\n" for x in lines[:-1])
                )  # killed while writing it

    @staticmethod
    def key(row: dict) -> tuple:
        return tuple(
            row[k] for k in ("identity", "task", "length", "depth", "repeat", "prompt", "dtype")
        )

    def find(self, row: dict) -> dict | None:
        return next((r for r in self.rows if self.key(r) == self.key(row)), None)

    def add(self, row: dict) -> None:
        self.rows.append(row)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
