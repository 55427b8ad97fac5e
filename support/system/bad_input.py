"""The error for mistakes that a user can correct."""


class BadInput(ValueError):
    """A flag, file or text that our code refuses on purpose. A command prints it as one `error:`
    line; any other ValueError is a bug and keeps its traceback."""


def not_utf8(where, error: UnicodeDecodeError) -> BadInput:
    """The error for a file (or a place in one) that is in another encoding."""
    how = "`iconv -f ENCODING -t UTF-8` converts it"
    return BadInput(f"{where} is not UTF-8 text ({error}): {how}")
