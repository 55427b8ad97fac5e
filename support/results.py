"""Rows of an evaluation on disk: append-only JSONL that survives a kill."""

import json
from pathlib import Path

from support.run_state import write_atomically

KEY = ("identity", "task", "length", "depth", "repeat", "prompt", "dtype")


class Results:
    """needle.jsonl: what an earlier, perhaps interrupted run measured is not measured again."""

    def __init__(self, path: Path):
        self.path, self.rows = path, {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for i, line in enumerate(lines):
            try:
                row = json.loads(line)
                self.rows[self.key(row)] = row
            except (json.JSONDecodeError, KeyError, TypeError):
                if i + 1 < len(lines):
                    raise ValueError(
                        f"{path}, line {i + 1} is no result of ours; move the file away"
                    ) from None
                write_atomically(path, "".join(x + "\n" for x in lines[:-1]))  # killed in mid-line

    @staticmethod
    def key(row: dict) -> tuple:
        return tuple(row[k] for k in KEY)

    def find(self, row: dict) -> dict | None:
        return self.rows.get(self.key(row))

    def what_is_saved(self) -> str:
        return f"the rows written are kept in {self.path}; the same command goes on from there"

    def add(self, row: dict) -> dict:
        self.rows[self.key(row)] = row
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        return row
