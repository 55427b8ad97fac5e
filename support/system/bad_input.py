"""The error for mistakes that a user can correct."""

from pathlib import Path


class BadInput(ValueError):
    """A flag, file or text that our code refuses on purpose. A command prints it as one `error:`
    line; any other ValueError is a bug and keeps its traceback."""


def read_text(path: Path) -> str:
    """The text of a UTF-8 file. Raises BadInput, naming the file, if it is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path} is not UTF-8 text: {error}") from error
