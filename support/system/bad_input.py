"""The error for what a user can mend."""


class BadInput(ValueError):
    """A flag, file or text that our code refuses on purpose. A command prints it as one `error:`
    line; any other ValueError is a bug and keeps its traceback."""
