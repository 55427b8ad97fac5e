"""What the server of children.py imports once."""

import eval_needle  # noqa: F401
import train  # noqa: F401
