"""--plan: what a run needs, from config.json alone: bytes by part, FLOPs and hours by stage.

Bytes and FLOPs are counted (count.py). Seconds partly rest on assumed speeds (machine.py), and the
table says so."""

from dataclasses import replace

import torch

from support.memory import count
from support.memory.choose import choose_levers, needs, shortage
from support.memory.machine import Machine, disk_rate, host_step_s, training_rate
from support.system.console import duration

LEVERS = ("optimizer", "keep_attention", "offload_inputs", "split_mlp")
CONVENTIONS = {  # FLOPs of a sample of t tokens, forward and backward
    "model FLOPs, causal attention, nothing twice": count.training_flops,
    "FLOPs executed, attention computed twice": lambda c, t: count.executed_flops(c, t, False),
    "FLOPs executed, attention kept": lambda c, t: count.executed_flops(c, t, True),
    "model FLOPs, attention without its causal half": count.noncausal_flops,
}


def make_plan(config, settings, options, stages, there: Machine, given: dict) -> dict:
    """All numbers of the plan, for the table and as JSON: bytes, FLOPs, seconds. "full_length" has
    those of --method full with the same steps, samples and replay, but with levers of its own where
    `given` (name -> value) does not have them."""
    full = replace(settings, method="full", train_len=settings.target_len)
    full = choose_levers(config, full, there, given)
    long = [s if s.name == "replay" else replace(s, tokens=full.train_len) for s in stages]
    rate, rate_from = training_rate(there, getattr(torch, settings.dtype))
    disk, disk_from = disk_rate(there, options.out)
    lengths = (settings.train_len, settings.target_len)
    return {
        "parameters": sum(count.parameters(config)),
        "dtype": settings.dtype,
        "machine": there.name,
        "there": {"device": there.device, "host": there.host, "disk": there.disk},
        **of_run(config, settings, options, stages, there, rate, disk),
        "full_length": of_run(config, full, options, long, there, rate, disk),
        "one_sample": {k: [float(f(config, n)) for n in lengths] for k, f in CONVENTIONS.items()},
        "one_sample_s": [flops_of(config, x, x.train_len) / rate for x in (settings, full)],
        "lengths": lengths,
        "rate": {"flops_per_s": rate, "from": rate_from},
        "disk_rate": {"bytes_per_s": disk, "from": disk_from},
    }


def flops_of(config, settings, tokens: int) -> float:
    """FLOPs executed for a sample."""
    return count.executed_flops(config, tokens, settings.keep_attention, settings.split_mlp)


def of_run(config, settings, options, stages, there: Machine, rate: float, disk: float) -> dict:
    """Bytes, seconds and levers of a run; shortage: None if it fits. rate: FLOP/s, disk: bytes a
    second."""
    device, host = needs(config, settings, there.kind)
    on_disk = count.disk_bytes(config, settings, options)
    state, B = on_disk["training state"], settings.batch_sequences
    N, w = sum(count.parameters(config)), count.weight_bytes(settings)
    step_s = host_step_s(there, N, w) if settings.optimizer == "adamw-host" else 0.0
    rows = {}

    def row(name: str, seconds: float, steps=0, sequences=0, tokens=0, flops=0) -> None:
        """A line of the table of stages: FLOPs of one sample, seconds of all."""
        counts = {"steps": steps, "sequences": sequences, "tokens": tokens}
        rows[name] = counts | {"flops": flops, "seconds": seconds}

    for s in stages:
        flops = flops_of(config, settings, s.tokens)
        row(s.name, s.steps * (B * flops / rate + step_s), s.steps, s.steps * B, s.tokens, flops)
        if s.name == "probe" and settings.analyses:
            # H' and H, forward only
            n, flops = settings.analysis_samples, 2 * count.training_flops(config, s.tokens) / 3
            row("analysis", n * flops / rate, 0, n, s.tokens, flops)
    steps, trained_s = (sum(r[k] for r in rows.values()) for k in ("steps", "seconds"))
    saves = int(min(steps, trained_s // (60 * max(options.save_minutes, 1e-3)))) if state else 0
    row("merge", 4 * w * N / disk)
    row("saves", saves * state / disk, saves)
    return {
        "levers": {k: getattr(settings, k) for k in LEVERS},
        "bytes": {"device": device, "host": host, "disk": on_disk},
        "shortage": shortage(config, settings, there),
        "stages": rows,
        "seconds": sum(r["seconds"] for r in rows.values()),
        "save_s": state / disk,
    }


def expected_s(config, settings, options, stages, there: Machine) -> float:
    """Seconds of a run but for merge and saves: the disk is not timed."""
    rate, _ = training_rate(there, getattr(torch, settings.dtype))
    return of_run(config, settings, options, stages, there, rate, float("inf"))["seconds"]


def extension_s(stages: dict) -> float:
    """Seconds of probe, analysis and extension."""
    return sum(stages[k]["seconds"] for k in ("probe", "analysis", "extend") if k in stages)


# ---- in words ----------------------------------------------------------------------------------


def table(plan: dict) -> str:
    """The plan in the terminal."""
    sizes, there, rate, disk = (plan[k] for k in ("bytes", "there", "rate", "disk_rate"))
    parts = dict.fromkeys(part for column in sizes.values() for part in column)
    cells = {part: [column.get(part, 0) for column in sizes.values()] for part in parts}
    cells["sum"] = [sum(column.values()) for column in sizes.values()]
    cells["available"] = [there[column] for column in sizes]
    lines = [
        f"plan: {plan['parameters']:,} parameters, {plan['dtype']}, on {plan['machine']};"
        f" {in_words(plan)}",
        "",
        f"{'GB (1e9 bytes)':32}{'device':>10}{'host':>10}{'disk':>10}",
    ]
    for name, numbers in cells.items():
        in_gb = "".join(f"{short(x / 1e9) if x else '':>10}" for x in numbers)
        if any(numbers):
            lines.append(f"{name:32}{in_gb}")
    if there["disk"] is None:
        lines.append(f"host and disk of that {plan['machine']} are not known and not checked")
    header = f"{'stage':10}{'steps':>8}{'samples':>9}{'tokens':>9}{'FLOPs each':>12}{'hours':>9}"
    lines += ["", header]
    for name, r in plan["stages"].items():
        numbers = f"{r['steps']:>8,}{r['sequences']:>9,}{r['tokens']:>9,}"
        numbers += f"{r['flops']:>12.2e}" if r["flops"] else f"{'':12}"
        lines.append(f"{name:10}{numbers}{short(r['seconds'] / 3600):>9}")
    lines += [
        f"{'sum':48}{short(plan['seconds'] / 3600):>9}",
        f"{duration(plan['seconds'])}, at {rate['flops_per_s'] / 1e12:.3g} TFLOP/s executed,"
        f" {rate['from']};"
        f" a save: {plan['save_s'] / 60:.2g} minutes at {disk['bytes_per_s'] / 1e9:.2g} GB/s,"
        f" {disk['from']}",
        "",
        *against_full_length(plan),
    ]
    return "\n".join(lines)


def against_full_length(plan: dict) -> list[str]:
    """Lines that compare with full length: the FLOPs of a sample by each convention; then hours and
    memory, each run with the levers that it would be given."""
    full, (short_len, full_len) = plan["full_length"], plan["lengths"]
    numbers = {
        "hours: probe, analysis, extend *": lambda p: extension_s(p["stages"]) / 3600,
        "hours: all, with merge and saves *": lambda p: p["seconds"] / 3600,
        "GB of device *": lambda p: sum(p["bytes"]["device"].values()) / 1e9,
    }
    pairs = {"seconds *": plan["one_sample_s"]}
    pairs |= {name: (number(plan), number(full)) for name, number in numbers.items()}

    def line(name: str, a: float, b: float, form=short) -> str:
        return f"{name:48}{form(a):>10}{form(b):>10}{1 - a / b:>8.1%}"

    return [
        f"{'one sample, forward and backward':48}{short_len:>10,}{full_len:>10,}{'less':>8}",
        *(line(name, *pair, "{:.2e}".format) for name, pair in plan["one_sample"].items()),
        *(line(name, *pair) for name, pair in pairs.items()),
        f"* {full_len:,}: another run, --method full with as many samples and levers of its own:",
        f"  {in_words(full)}",
    ]


def in_words(run: dict) -> str:
    """The levers of a run, and whether it fits into memory."""
    levers = ", ".join(f"{k} {v}" for k, v in run["levers"].items())
    return levers + (f"; does not fit: {run['shortage']}" if run["shortage"] else "; fits")


def short(x: float) -> str:
    """Three significant digits, but no fewer than are before the point.

    >>> short(12345.6), short(12.345), short(0.0123456), short(0.0000685), short(0)
    ('12,346', '12.3', '0.0123', '<0.001', '0')
    """
    if 0 < x < 0.001:
        return "<0.001"
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
