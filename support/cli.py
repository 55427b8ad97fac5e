"""What the commands share: the one place where an error becomes one line, progress with ETA,
provenance."""

import contextlib
import json
import platform
import resource
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
    except (ValueError, OSError, json.JSONDecodeError, SafetensorError) as error:
        print("error:", " ".join(str(error).split()), file=sys.stderr)
        raise SystemExit(2) from None


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
    git = subprocess.run(
        ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True
    )
    cuda = torch.cuda.is_available()
    return {
        "commit": git.stdout.strip() or None,
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
