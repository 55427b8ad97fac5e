"""--plan: what a run needs, from config.json alone: bytes by part, FLOPs and hours by stage.

Bytes and FLOPs are counted (count.py). Seconds partly rest on assumed speeds (machine.py and
below), and the table says so."""

from dataclasses import replace

import torch

from support.memory import choose as fit
from support.memory import count as budget
from support.memory.machine import HERE, Machine, disk_rate, host_step_s, training_rate

LEVERS = ("optimizer", "keep_attention", "offload_inputs", "split_mlp")


def make_plan(config, args, options, stages, there: Machine, given: dict) -> dict:
    """All numbers of the plan, for the table and as JSON: bytes, FLOPs, seconds. given: the levers
    that flags name, see fit.choose."""
    full = fit.at_full_length(config, args, there, given)
    where = options.plan or HERE
    rate, rate_from = training_rate(where, there.kind, getattr(torch, args.dtype))
    disk, disk_from = disk_rate(where, options.out)
    conventions = {
        "model FLOPs, causal attention, nothing twice": budget.training_flops,
        "FLOPs executed, attention computed twice": lambda c, t: budget.executed_flops(c, t, False),
        "FLOPs executed, attention kept": lambda c, t: budget.executed_flops(c, t, True),
        "model FLOPs, attention without its causal half": budget.noncausal_flops,
    }
    lengths = (args.train_len, args.target_len)
    each = [
        budget.executed_flops(config, a.train_len, a.keep_attention, a.split_mlp)
        for a in (args, full)
    ]
    long = [s if s.name == "replay" else replace(s, tokens=full.train_len) for s in stages]
    return {
        "parameters": sum(budget.parameters(config)),
        "dtype": args.dtype,
        "machine": there.name,
        "there": {"device": there.device, "host": there.host, "disk": there.disk},
        **of_run(config, args, options, stages, there, rate, disk),
        "full_length": of_run(config, full, options, long, there, rate, disk),
        "one_sample": {k: [float(f(config, n)) for n in lengths] for k, f in conventions.items()},
        "one_sample_s": [flops / rate for flops in each],
        "lengths": lengths,
        "rate": {"flops_per_s": rate, "from": rate_from},
        "disk_rate": {"bytes_per_s": disk, "from": disk_from},
    }


def of_run(config, args, options, stages, there: Machine, rate: float, disk: float) -> dict:
    """Bytes, seconds and levers of a run; shortage: None if it fits."""
    device, host = fit.needs(config, args, fit.longest(args), there.kind)
    on_disk = fit.needs_on_disk(config, args, options)
    rows = by_stage(config, args, options, stages, rate, disk)
    return {
        "levers": {k: getattr(args, k) for k in LEVERS},
        "bytes": {"device": device, "host": host, "disk": on_disk},
        "shortage": fit.shortage(config, args, there),
        "stages": rows,
        "seconds": sum(r["seconds"] for r in rows.values()),
        "save_s": on_disk["training state"] / disk,
    }


def by_stage(config, args, options, stages, rate: float, disk: float) -> dict[str, dict]:
    """What each stage computes and how long it takes; rate: FLOP/s, disk: bytes a second."""
    N, w, B = sum(budget.parameters(config)), fit.width(args), args.batch_sequences
    on_host = args.optimizer == "adamw-host"
    step_s = host_step_s(options.plan or HERE, N, w) if on_host else 0.0
    rows = {}
    for s in stages:
        flops = budget.executed_flops(config, s.tokens, args.keep_attention, args.split_mlp)
        row = {"steps": s.steps, "sequences": s.steps * B, "tokens": s.tokens, "flops": flops}
        rows[s.name] = row | {"seconds": s.steps * (B * flops / rate + step_s)}
        if s.name == "probe" and args.analyses:
            # H' and H, forward only
            n, forward = args.analysis_samples, 2 * budget.training_flops(config, s.tokens) / 3
            row = {"steps": 0, "sequences": n, "tokens": s.tokens, "flops": forward}
            rows["analysis"] = row | {"seconds": n * row["flops"] / rate}
    state = fit.needs_on_disk(config, args, options)["training state"]
    saves = sum(r["seconds"] for r in rows.values()) // (60 * max(options.save_minutes, 1e-3))
    saves = min(saves, sum(s.steps for s in stages)) if state else 0
    nothing = {"steps": 0, "sequences": 0, "tokens": 0, "flops": 0}
    rows["merge"] = nothing | {"seconds": 4 * w * N / disk}
    rows["saves"] = nothing | {"steps": int(saves), "seconds": saves * state / disk}
    return rows


# ---- in words ----------------------------------------------------------------------------------


def table(plan: dict) -> str:
    """The plan in the terminal."""
    sizes, there = plan["bytes"], plan["there"]
    lines = [
        f"plan: {plan['parameters']:,} parameters, {plan['dtype']}, on {plan['machine']};"
        f" {in_words(plan['levers'])}",
        "",
        f"{'GB (1e9 bytes)':32}{'device':>10}{'host':>10}{'disk':>10}",
    ]
    parts = dict.fromkeys(part for column in sizes.values() for part in column)
    cells = {p: [sizes[c].get(p, 0) for c in sizes] for p in parts}
    cells = {part: row for part, row in cells.items() if any(row)}
    cells["sum"] = [sum(column.values()) for column in sizes.values()]
    cells["available"] = [there[c] for c in sizes]
    for name, row in cells.items():
        shown = [short(x / 1e9) if x else "" for x in row]
        lines.append(f"{name:32}" + "".join(f"{x:>10}" for x in shown))
    if there["disk"] is None:
        lines.append(f"host and disk of that {plan['machine']} are not known and not checked")
    lines += [
        "",
        f"{'stage':10}{'steps':>8}{'samples':>9}{'tokens':>9}{'FLOPs each':>12}{'hours':>9}",
    ]
    for name, r in plan["stages"].items():
        numbers = f"{r['steps']:>8,}{r['sequences']:>9,}{r['tokens']:>9,}{r['flops']:>12.2e}"
        lines.append(f"{name:10}{numbers}{short(r['seconds'] / 3600):>9}")
    rate = plan["rate"]
    lines += [
        f"{'sum':48}{short(plan['seconds'] / 3600):>9}",
        f"at {rate['flops_per_s'] / 1e12:.3g} TFLOP/s executed, {rate['from']};"
        f" a save: {plan['save_s'] / 60:.2g} minutes at"
        f" {plan['disk_rate']['bytes_per_s'] / 1e9:.2g} GB/s, {plan['disk_rate']['from']}",
        "",
    ]
    return "\n".join(lines + against_full_length(plan))


def against_full_length(plan: dict) -> list[str]:
    """Lines that compare with full length: the FLOPs of a sample by each convention; then hours and
    memory, each run with the levers that it would be given."""
    full, lengths = plan["full_length"], plan["lengths"]

    def row(name: str, a: float, b: float, form=short) -> str:
        return f"{name:48}{form(a):>10}{form(b):>10}{1 - a / b:>8.1%}"

    def both(number) -> list[float]:
        return [number(plan), number(full)]

    conventions = plan["one_sample"].items()
    fits = f"does not fit: {full['shortage']}" if full["shortage"] else "fits"
    return [
        f"{'one sample, forward and backward':48}{lengths[0]:>10,}{lengths[1]:>10,}{'less':>8}",
        *(row(name, *pair, "{:.2e}".format) for name, pair in conventions),
        row("seconds *", *plan["one_sample_s"]),
        row("hours: probe, analysis, extend *", *both(lambda p: extension_s(p["stages"]) / 3600)),
        row("hours: all, with merge and saves *", *both(lambda p: p["seconds"] / 3600)),
        row("GB of device *", *both(lambda p: sum(p["bytes"]["device"].values()) / 1e9)),
        f"* {lengths[1]:,}: --method full with the same steps and samples, and levers of its own:",
        f"  {in_words(full['levers'])}; {fits}",
    ]


def extension_s(stages: dict) -> float:
    """Seconds of probe, analysis and extension."""
    parts = ("probe", "analysis", "extend")
    return sum(row["seconds"] for name, row in stages.items() if name in parts)


def as_flags(levers: dict) -> str:
    """
    >>> as_flags({"optimizer": "adamw", "keep_attention": False, "offload_inputs": True,
    ...     "split_mlp": False})
    'adamw --offload_inputs'
    """
    on = [f"--{name}" for name in LEVERS[1:] if levers[name]]
    return " ".join([levers["optimizer"], *on])


def in_words(levers: dict) -> str:
    return ", ".join(f"{k} {v}" for k, v in levers.items())


def short(x: float) -> str:
    """Three significant digits, but no fewer than are before the point.

    >>> short(12345.6), short(12.345), short(0.0123456)
    ('12,346', '12.3', '0.0123')
    """
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
