"""What the commands share: the one place where an error or Ctrl-C becomes one line, progress with
ETA, provenance."""

import contextlib
import math
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

# Without this, an 8B's step reserves 12 % more GPU memory than it allocates (LOG.md). torch reads
# the variable at its first allocation there; a value that the user has set is kept.
if "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from tqdm import tqdm

from support.system.bad_input import BadInput
from support.system.signals import Terminated, handled_by, stop

BARS = weakref.WeakSet()  # every progress bar of this process that may still be drawn


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """The boundary of main(): BadInput, a full disk or too little memory becomes one `error:` line
    and exit code 2, Ctrl-C one line and exit code 130, SIGTERM and SIGHUP one and 143; a bug
    keeps its traceback."""
    try:
        with handled_by(stop):
            yield
    except BrokenPipeError:  # the reader of our output has gone, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except (BadInput, OSError) as error:
        last_line(f"error: {error}", error)
        raise SystemExit(2) from None
    except (MemoryError, RuntimeError) as error:  # torch has its own class for CUDA's memory only
        said = ("can't allocate memory", "Cannot allocate memory", "bad_alloc")
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not any(words in str(error) for words in said):
            raise
        reason = str(error).split("DefaultCPUAllocator: ")[-1].splitlines()
        last_line(f"error: out of memory: {' '.join(reason)}", error)
        raise SystemExit(2) from None
    except KeyboardInterrupt as told:
        word, code = ("terminated", 143) if isinstance(told, Terminated) else ("interrupted", 130)
        last_line(word, told)
        raise SystemExit(code) from None


def last_line(message: str, error: BaseException) -> None:
    """Print the message and the notes of the error. Progress bars are closed first, because an open
    one would be drawn again below the message."""
    notes = getattr(error, "__notes__", [])
    with contextlib.suppress(OSError):  # the terminal is gone
        for bar in list(BARS):
            bar.close()
        log("; ".join(" ".join(part.split()) for part in (message, *notes)))


@contextlib.contextmanager
def note_on_error(what_is_saved: Callable[[], str]) -> Iterator[None]:
    """Whatever ends the body early: the last line also says what is saved and how to go on."""
    try:
        yield
    except BaseException as error:
        error.add_note(what_is_saved())
        raise


def check_ranges(
    args, at_least_1=(), above_1=(), positive=(), not_negative=(), within_0_1=(), seed=()
) -> None:
    """BadInput for the first flag whose number cannot be meant; flags not given (None) pass."""
    tests = (
        (at_least_1, lambda x: x >= 1, "must be at least 1"),
        (above_1, lambda x: 1 < x < math.inf, "must be above 1"),
        (positive, lambda x: 0 < x < math.inf, "must be positive"),
        (not_negative, lambda x: 0 <= x < math.inf, "must not be negative"),
        (within_0_1, lambda x: 0 <= x <= 1, "must be within 0..1"),
        (seed, lambda x: 0 <= x < 2**31, f"must be within 0..{2**31 - 1}"),
    )
    for names, test, rule in tests:
        for name in names:
            value = getattr(args, name)
            if value is not None and not test(value):
                raise BadInput(f"--{name} {value} {rule}")


def progress(iterable, description: str, **options):
    """tqdm with our settings: elapsed time and ETA, few redraws where there is no terminal."""
    seconds = 0.5 if sys.stderr.isatty() else 30
    look = {"dynamic_ncols": True, "mininterval": seconds, "smoothing": 0.1}
    bar = tqdm(iterable, desc=description, **look, **options)
    BARS.add(bar)
    return bar


def duration(seconds: float) -> str:
    """
    >>> duration(59), duration(90), duration(5400), duration(1.7e8)
    ('less than a minute', 'a minute or two', 'about 90 minutes', 'about 1,968 days')
    """
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:,.0f} {unit}"
    return "a minute or two" if seconds >= 60 else "less than a minute"


def log(message: str) -> None:
    """A line that does not tear the progress bar."""
    tqdm.write(message, file=sys.stderr)


def provenance(started: float) -> dict:
    """What a number needs beside it: commit, hardware, versions, seconds, peak memory."""
    commit, cuda = None, torch.cuda.is_available()
    if shutil.which("git"):
        # without optional locks nothing is written: `git describe` would refresh the index
        command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
        root = Path(__file__).parent
        git = subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)
        commit = git.stdout.strip() or None
    return {
        "commit": commit,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": torch.cuda.get_device_name() if cuda else cpu_name(),
        "threads": torch.get_num_threads(),
        "seconds": round(time.time() - started, 1),
        "peak_GiB": round(peak_gib(), 2),
    }


def peak_gib() -> float:
    """Peak memory so far in GiB: reserved on the GPU, else resident in this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 2**30
    scale = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.MULTILINE)
    return (name[1] if name else "CPU") + (" with AMX" if "amx_bf16" in text else "")
