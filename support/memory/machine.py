"""What a machine has: memory and disk that are free, and how fast it computes and writes."""

import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from support.memory import count as budget

OF_A_RUN = ("state.pt*", "*extended*/*", "*replayed*/*", "*merged*/*")  # in --out, part of its need
HERE = "here"  # the machine that this runs on, as against a GPU of budget.GPUS
# Assumed, not measured; whoever has measured better may change them here.
GPU_SHARE = 0.42  # FLOPs executed over the peak; of an 8B at 39,424 tokens 35 % causal MFU
CPU_SHARE = 0.75  # FLOPs executed in training over those of a large matrix product
DISK_BYTES_PER_S = 1e9  # of a machine that is not this one


@dataclass(frozen=True)
class Machine:
    """None: not known (another machine), so not checked."""

    name: str
    kind: str  # "cuda" or "cpu"
    device: float  # bytes of memory that training may take
    host: float | None  # bytes beside it; a CPU's device is its host
    disk: float | None  # bytes

    @property
    def here(self) -> bool:
        return self.disk is not None


def machine(name: str, device: str, out: str) -> Machine:
    """The one at hand (HERE), or any with a GPU of budget.GPUS."""
    if name != HERE:
        return Machine(name, "cuda", budget.GPUS[name][1], None, None)
    stat = os.statvfs(nearest_folder(out))
    ours = (f for name in OF_A_RUN for f in Path(out).glob(name) if f.is_file())
    already = sum(file.stat().st_size for file in ours)
    disk = stat.f_bavail * stat.f_frsize + already
    if device == "cpu":
        return Machine("the CPU", "cpu", free_memory(), None, disk)
    gpu = torch.cuda.get_device_properties(0)
    return Machine(gpu.name, "cuda", gpu.total_memory, free_memory(), disk)


def nearest_folder(out: str) -> Path:
    """The folder itself, or the nearest above it that exists."""
    path = Path(out).resolve()
    return next(p for p in (path, *path.parents) if p.is_dir())


def free_memory() -> float:
    """Bytes that this process may still take: of the machine, or of its container (cgroup 2)."""
    info = Path("/proc/meminfo")
    if not info.is_file():  # macOS: all there is
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    lines = info.read_text().splitlines()
    free = 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        stat = dict(line.split() for line in used.with_name("memory.stat").read_text().splitlines())
        held = float(used.read_text()) - float(stat.get("inactive_file", 0))  # a cache of files
        free = min(free, float(limit.read_text()) - held)
    return free


def training_rate(name: str, device: str, dtype: torch.dtype) -> tuple[float, str]:
    """(executed FLOP/s in training, where the number comes from). A GPU of the table: assumed; else
    a matrix product is timed."""
    peak = budget.GPUS[name][0] if name != HERE else budget.peak_flops(device)
    if peak:
        return GPU_SHARE * peak, f"assumed: {GPU_SHARE:.0%} of {peak / 1e12:.0f} TFLOP/s"
    n = 1024 if device == "cpu" else 8192
    a = torch.randn(n, n, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the result
        best = min(best, time.perf_counter() - started)
    rate = CPU_SHARE * 2 * n**3 / best
    return rate, f"assumed: {CPU_SHARE:.0%} of a matrix product of {n}, timed just now"


def disk_rate(name: str, out: str) -> tuple[float, str]:
    """(bytes a second written, where the number comes from)."""
    if name != HERE:
        return DISK_BYTES_PER_S, "assumed"
    block, n = os.urandom(1 << 24), 8
    with tempfile.TemporaryFile(dir=nearest_folder(out)) as file:
        started = time.perf_counter()
        for _ in range(n):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return n * len(block) / (time.perf_counter() - started), "128 MiB written just now"
