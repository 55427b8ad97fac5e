"""--plan: what a run takes, from config.json alone: bytes by part, FLOPs and hours by stage.

Bytes and FLOPs are counted (support/budget.py); what a machine makes of them is partly assumed
(support/machine.py and below), and the table says so."""

import torch

from support import budget
from support.fit import check, choose, longest, needs, needs_on_disk, width
from support.machine import HERE, Machine, disk_rate, machine, training_rate

LEVERS = ("optimizer", "keep_attention", "offload_inputs")
# Assumed for adamw-host: bytes a second of host memory, and to or from the GPU
HOST_BYTES_PER_S, LINK_BYTES_PER_S = 30e9, 20e9


def settle(config, args, stages, finished: bool = False) -> bool:
    """Choose what --optimizer and the levers leave open; ValueError if the run does not fit and is
    not finished. With --plan: print the table first, and return True, for nothing else is to be
    done."""
    there = machine(args.plan or HERE, args.device, args.out)
    choose(config, args, there)
    if args.plan:
        print(table(make_plan(config, args, stages, there)), flush=True)
    if not finished:
        check(config, args, there)
    return bool(args.plan)


def make_plan(config, args, stages, there: Machine) -> dict:
    """All numbers of the plan, for the table and as JSON: bytes, FLOPs, seconds."""
    where = args.plan or HERE
    rate, rate_from = training_rate(where, args.device, getattr(torch, args.dtype))
    disk, disk_from = disk_rate(where, args.out)
    N, w, B = sum(budget.parameters(config)), width(args), args.batch_sequences
    device, host = needs(config, args, longest(args))
    on_disk = needs_on_disk(config, args)
    step_s = 0.0
    if args.optimizer == "adamw-host":  # weights, m, v, gradient read, three written; over the link
        step_s = N * 28 / HOST_BYTES_PER_S + (N * (4 + w) / LINK_BYTES_PER_S)
    rows = {}
    for s in stages:
        flops = budget.executed_flops(config, s.tokens, args.keep_attention)
        row = {"steps": s.steps, "sequences": s.steps * B, "tokens": s.tokens, "flops": flops}
        rows[s.name] = row | {"seconds": s.steps * (B * flops / rate + step_s)}
        if s.name == "probe" and s.steps:  # H' and H, forward only
            n, forward = args.analysis_samples, 2 * budget.training_flops(config, s.tokens) / 3
            row = {"steps": 0, "sequences": n, "tokens": s.tokens, "flops": forward}
            rows["analysis"] = row | {"seconds": n * row["flops"] / rate}
    save_s = on_disk["training state"] / disk
    saves = sum(r["seconds"] for r in rows.values()) // (60 * max(args.save_minutes, 1e-3))
    saves = min(saves, sum(s.steps for s in stages)) if on_disk["training state"] else 0
    rows["merge"] = {
        "steps": 0,
        "sequences": 0,
        "tokens": 0,
        "flops": 0,
        "seconds": 4 * w * N / disk,
    }
    rows["saves"] = {**rows["merge"], "steps": int(saves), "seconds": saves * save_s}
    conventions = {
        "model FLOPs, causal attention, nothing twice": budget.training_flops,
        "FLOPs executed, attention computed twice": lambda c, t: budget.executed_flops(c, t, False),
        "FLOPs executed, attention kept": lambda c, t: budget.executed_flops(c, t, True),
        "model FLOPs, attention without its causal half": budget.noncausal_flops,
    }
    lengths = (args.train_len, args.target_len)
    seconds = [budget.executed_flops(config, n, args.keep_attention) / rate for n in lengths]
    return {
        "parameters": N,
        "dtype": args.dtype,
        "machine": there.name,
        "levers": {k: getattr(args, k) for k in LEVERS},
        "bytes": {"device": device, "host": host, "disk": on_disk},
        "device_of_full_length": needs(config, args, args.target_len)[0],
        "there": {"device": there.device, "host": there.host, "disk": there.disk},
        "stages": rows,
        "seconds": sum(r["seconds"] for r in rows.values()),
        "save_s": save_s,
        "one_sample": {k: [float(f(config, n)) for n in lengths] for k, f in conventions.items()},
        "one_sample_s": seconds,
        "lengths": lengths,
        "rate": {"flops_per_s": rate, "from": rate_from},
        "disk_rate": {"bytes_per_s": disk, "from": disk_from},
    }


def table(plan: dict) -> str:
    """The plan in the terminal."""
    sizes, there, lengths = plan["bytes"], plan["there"], plan["lengths"]
    levers = ", ".join(f"{k} {v}" for k, v in plan["levers"].items())
    lines = [
        f"plan: {plan['parameters']:,} parameters, {plan['dtype']}, on {plan['machine']}; {levers}",
        "",
        f"{'GB (1e9 bytes)':32}{'device':>10}{'host':>10}{'disk':>10}",
    ]
    parts = dict.fromkeys(part for column in sizes.values() for part in column)
    cells = {p: [sizes[c].get(p, 0) for c in sizes] for p in parts}
    cells["sum"] = [sum(column.values()) for column in sizes.values()]
    cells["there"] = [there[c] for c in sizes]
    for name, row in cells.items():
        shown = [short(x / 1e9) if x else "" for x in row]
        lines.append(f"{name:32}" + "".join(f"{x:>10}" for x in shown))
    full = sum(plan["device_of_full_length"].values())
    lines += [
        f"device with samples of {lengths[1]:,} tokens (--method full): {short(full / 1e9)}",
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
        f"{'one sample, forward and backward':48}{lengths[0]:>10,}{lengths[1]:>10,}{'less':>8}",
    ]
    for name, (a, b) in plan["one_sample"].items():
        lines.append(f"{name:48}{a:>10.2e}{b:>10.2e}{1 - a / b:>8.1%}")
    a, b = plan["one_sample_s"]
    lines.append(f"{'seconds':48}{short(a):>10}{short(b):>10}{1 - a / b:>8.1%}")
    return "\n".join(lines)


def short(x: float) -> str:
    """Three digits, or all before the point.

    >>> short(12345.6), short(12.345), short(0.0123456)
    ('12,346', '12.3', '0.0123')
    """
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"
