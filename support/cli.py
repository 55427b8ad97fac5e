"""What the commands share: the one place where an error becomes one line, progress with ETA,
provenance."""

import contextlib
import math
import platform
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm


@contextlib.contextmanager
def report_errors() -> Iterator[None]:
    """The boundary of main(): bad input becomes one `error:` line and exit code 2; a bug keeps
    its traceback."""
    try:
        yield
    except (ValueError, OSError, SafetensorError) as error:
        log("error: " + " ".join(str(error).split()))  # on a line of its own below any bar
        raise SystemExit(2) from None


def check_ranges(args, at_least_one=(), positive=(), not_negative=()) -> None:
    """ValueError for the first flag whose number cannot be meant; flags not given (None) pass."""
    tests = (
        (at_least_one, lambda x: x >= 1, "must be at least 1"),
        (positive, lambda x: 0 < x < math.inf, "must be positive"),
        (not_negative, lambda x: 0 <= x < math.inf, "must not be negative"),
    )
    for names, test, rule in tests:
        for name in names:
            value = getattr(args, name)
            if value is not None and not test(value):
                raise ValueError(f"--{name} {value} {rule}")


def progress(iterable, description: str, **options):
    """tqdm with our settings: elapsed time and ETA, one line, silent redraws where nobody looks."""
    quiet = not sys.stderr.isatty()
    return tqdm(
        iterable,
        desc=description,
        dynamic_ncols=True,
        mininterval=30 if quiet else 0.5,
        smoothing=0.1,
        **options,
    )


def log(message: str) -> None:
    """A line that does not tear the progress bar."""
    tqdm.write(message, file=sys.stderr)


def provenance(started: float) -> dict:
    """What a number needs beside it: commit, hardware, versions, seconds, peak memory."""
    root = Path(__file__).resolve().parent.parent
    commit = None
    if shutil.which("git"):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        git = subprocess.run(command, check=False, capture_output=True, text=True)
        commit = git.stdout.strip() or None
    cuda = torch.cuda.is_available()
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
    names = info.read_text().split("\n") if info.is_file() else []
    name = next(
        (line.split(":")[1].strip() for line in names if line.startswith("model name")), "CPU"
    )
    amx = any("amx_bf16" in line for line in names)
    return f"{name}{' with AMX' if amx else ''}"
