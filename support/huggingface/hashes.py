"""Which model is it? A hash over whole files, so that a change anywhere makes another model."""

import hashlib
import json
import os
from pathlib import Path

from support.huggingface.config import read_json
from support.system.whole_files import write_atomically


class Hashes:
    """SHA-256 of files. `file` (a JSON file in a folder of ours, never in the model's; None: there
    is none) remembers what was hashed before, by path, size and time of change; when they differ,
    it is hashed again."""

    def __init__(self, file: Path | None = None):
        self.file = file
        self.known = read_json(file) if file and file.is_file() else {}

    def of_model(self, folder: str | Path) -> str:
        """Over config.json and all safetensors files of a folder; 12 hexadecimal digits."""
        weights = sorted(Path(folder).glob("**/*.safetensors"))
        return self.of_files(Path(folder), [*weights, Path(folder) / "config.json"])

    def of_tokenizer(self, folder: Path) -> str:
        """Over the files that decide which ids a text has."""
        names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
        return self.of_files(folder, [folder / n for n in names if (folder / n).is_file()])

    def of_files(self, folder: Path, files: list[Path]) -> str:
        parts = [f"{file.relative_to(folder)} {self.of_file(file)}\n" for file in files]
        return hashlib.sha256("".join(parts).encode()).hexdigest()[:12]

    def of_file(self, file: Path) -> str:
        """64 hexadecimal digits; read only if the file is new, or its size or time has changed."""
        state = file.stat()
        key, seen = os.path.realpath(file), [state.st_size, state.st_mtime_ns]
        if self.known.get(key, [])[:2] != seen:
            with open(file, "rb") as stream:
                self.known[key] = [*seen, hashlib.file_digest(stream, "sha256").hexdigest()]
        return self.known[key][2]

    def save(self) -> None:
        """Write the file. Apart from of_model, which is also called when nothing may be written."""
        write_atomically(self.file, json.dumps(self.known, indent=1) + "\n")
