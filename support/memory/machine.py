"""What a machine has: memory and disk that are free, and how fast it computes and writes."""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from support.memory import count

OF_A_RUN = ("state.pt*", "*extended*/*", "*replayed*/*", "*merged*/*")  # in --out: counted as free
HERE = "here"  # this machine, not a GPU of count.GPUS
# A training step of an 8B on an H200 (studies/bench_gpu.py). An H100 has the same peak.
MEASURED = Path(__file__).resolve().parents[2] / "assets" / "results" / "gpu.json"
MEASURED_STEP, MEASURED_ON = "step adamw-host keep offload", ("H100", "H200")
# Assumed, not measured; whoever has measured better may change them here.
GPU_SHARE = 0.42  # FLOPs executed over the peak
HOST_BYTES_PER_S, LINK_BYTES_PER_S = 30e9, 20e9  # of host memory; to or from the GPU
CPU_SHARE = 0.75  # FLOPs executed in training over those of a large matrix product
DISK_BYTES_PER_S = 1e9  # of another machine than this


@dataclass(frozen=True)
class Machine:
    """What there is. None: unknown (another machine), and so not checked."""

    name: str  # of the GPU, or "the CPU"
    kind: str  # "cuda" or "cpu"
    device: float  # bytes of memory that training may take
    host: float | None  # bytes beside it; a CPU's device is its host
    disk: float | None  # bytes

    @property
    def here(self) -> bool:
        return self.disk is not None


def machine(name: str, device: str, out: str) -> Machine:
    """This machine (HERE), or one with a GPU of count.GPUS."""
    if name != HERE:
        return Machine(name, "cuda", count.GPUS[name][1], None, None)
    stat = os.statvfs(nearest_folder(out))
    ours = (f for name in OF_A_RUN for f in Path(out).glob(name) if f.is_file())
    disk = stat.f_bavail * stat.f_frsize + sum(file.stat().st_size for file in ours)
    if device == "cpu":
        return Machine("the CPU", "cpu", free_memory(), None, disk)
    gpu = torch.cuda.get_device_properties(0)
    return Machine(gpu.name, "cuda", gpu.total_memory, free_memory(), disk)


def nearest_folder(out: str) -> Path:
    """The folder itself, or the nearest above it that exists."""
    path = Path(out).resolve()
    return next(p for p in (path, *path.parents) if p.is_dir())


def free_memory() -> float:
    """Bytes that this process may still allocate, by the machine and its container (cgroup 2)."""
    info = Path("/proc/meminfo")
    if not info.is_file():  # macOS: the whole memory
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    lines = info.read_text().splitlines()
    free = 1024.0 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    limit, used = (Path("/sys/fs/cgroup") / f"memory.{name}" for name in ("max", "current"))
    if limit.is_file() and limit.read_text().strip() != "max":
        stat = dict(line.split() for line in used.with_name("memory.stat").read_text().splitlines())
        held = float(used.read_text()) - float(stat.get("inactive_file", 0))  # a cache of files
        free = min(free, float(limit.read_text()) - held)
    return free


# ---- speeds ------------------------------------------------------------------------------------


def measured_step(there: Machine) -> dict | None:
    """Seconds of a sequence and of an optimizer step of MEASURED_STEP, if that holds for this GPU;
    None if not, or if the file is missing (support/ copied into another project)."""
    if not MEASURED.is_file() or not any(name in there.name for name in MEASURED_ON):
        return None
    return json.loads(MEASURED.read_text())["parts"][MEASURED_STEP]


def host_step_s(there: Machine, parameters: int, w: int) -> float:
    """Seconds of an optimizer step of adamw-host: measured for an 8B and in proportion to the
    parameters, or else from the bytes that move. w: bytes of a weight."""
    if step := measured_step(there):
        of_8b = sum(count.parameters(count.LLAMA3_8B))
        return step["optimizer_step_s"] * parameters / of_8b
    # weights, m, v, gradient read, three written; gradient and weight over the link
    return parameters * (28 / HOST_BYTES_PER_S + (4 + w) / LINK_BYTES_PER_S)


def training_rate(there: Machine, dtype: torch.dtype) -> tuple[float, str]:
    """(executed FLOP/s in training, where the number comes from). An H100 or H200: measured, for an
    8B; another GPU of the table: assumed; else a matrix product is timed."""
    if step := measured_step(there):
        tokens = step["tokens"]
        flops = count.executed_flops(count.LLAMA3_8B, tokens, keep_attention=True)
        source = f"measured: Llama-3-8B, {tokens:,} tokens, {step['about']['hardware']}"
        return flops / step["seconds_per_sequence"], source
    if peak := count.peak_flops(there.name):
        return GPU_SHARE * peak, f"assumed: {GPU_SHARE:.0%} of {peak / 1e12:.0f} TFLOP/s"
    n, best = 1024 if there.kind == "cpu" else 8192, float("inf")
    a = torch.randn(n, n, dtype=dtype, device=there.kind)
    for _ in range(4):
        started = time.perf_counter()
        float((a @ a)[0, 0])  # waits for the result
        best = min(best, time.perf_counter() - started)
    rate = CPU_SHARE * 2 * n**3 / best
    return rate, f"assumed: {CPU_SHARE:.0%} of a matrix product of {n}, timed just now"


def disk_rate(there: Machine, out: str) -> tuple[float, str]:
    """(bytes a second written, where the number comes from)."""
    if not there.here:
        return DISK_BYTES_PER_S, "assumed"
    block, n = os.urandom(1 << 24), 8
    with tempfile.TemporaryFile(dir=nearest_folder(out)) as file:
        started = time.perf_counter()
        for _ in range(n):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return n * len(block) / (time.perf_counter() - started), "128 MiB written just now"
