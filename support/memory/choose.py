"""Which optimizer and which memory levers does a run take, and does it fit? Decided from
config.json alone, before weights are loaded."""

import importlib.util
import itertools
from dataclasses import replace

from support.memory import count as budget
from support.memory.machine import Machine
from support.memory.optimizer import NAMES, NEEDS_TORCHAO
from support.system.bad_input import BadInput

# Assumed, not measured
DEVICE_EXTRA = {"cuda": 3e9, "cpu": 1.1e9}  # context, fragmentation; libraries, text
HOST_EXTRA = {"cuda": 3e9, "cpu": 0.0}  # Python, libraries, one tensor on its way
ADVICE = "shorter samples (--train_len) or another --optimizer may need less"


def width(args) -> int:
    return 2 if args.dtype == "bfloat16" else 4


def needs(config, args, tokens: int, kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """(bytes by part on the device, on the host) for samples of `tokens`; kind: "cuda" or "cpu"."""
    levers = (args.optimizer, args.keep_attention, args.offload_inputs, args.split_mlp)
    device = budget.device_bytes(config, tokens, width(args), *levers, kind)
    host = budget.host_bytes(config, tokens, width(args), args.optimizer, args.offload_inputs)
    extra = "libraries, workspaces"
    return device | {extra: DEVICE_EXTRA[kind]}, host | {extra: HOST_EXTRA[kind]}


def needs_on_disk(config, args, options) -> dict[str, int]:
    saves = not options.no_saves
    return budget.disk_bytes(config, width(args), args.optimizer, options.keep_stages, saves)


def longest(args) -> int:
    return max(args.train_len, args.replay_len)


def has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


# ---- choosing and checking ---------------------------------------------------------------------


def choose(config, settings, there: Machine, given: dict):
    """The settings with the levers chosen where `given` (name -> value) does not have them: the
    first combination that fits, or the one that needs least of the device.

    Tried in order of speed: recomputing attention costs 10 % of the arithmetic, the optimizer on
    the host 2 %, offloading inputs nothing that the plan can count. Then 8-bit, which is a
    different optimizer, and last the MLP in pieces."""
    optimizers = NAMES if has_torchao() or not there.here else NAMES[:2]
    options = {"optimizer": optimizers, "keep_attention": (True, False)}
    options |= {"offload_inputs": (False, True), "split_mlp": (False, True)}
    options |= {name: (given[name],) for name in options if name in given}
    combinations = [
        dict(zip(options, values, strict=True)) for values in itertools.product(*options.values())
    ]
    combinations.sort(
        key=lambda x: (x["split_mlp"], x["optimizer"] == NAMES[2], not x["keep_attention"])
    )
    tried = []
    for levers in combinations:
        chosen = replace(settings, **levers)
        if not shortage(config, chosen, there):
            return chosen
        parts = needs(config, chosen, longest(chosen), there.kind)
        device, host = (sum(part.values()) for part in parts)
        tried.append((device + host * (there.kind == "cpu"), chosen))
    return min(tried, key=lambda one: one[0])[1]


def at_full_length(config, settings, there: Machine, given: dict):
    """The settings of the same run with --method full: the same steps, samples and replay, but with
    levers of its own, except for those that are given."""
    full = replace(settings, method="full", train_len=settings.target_len)
    return choose(config, full, there, given)


def shortage(config, args, there: Machine) -> str | None:
    """Which memory is too small, in words; None if all of it suffices."""
    device, host = (sum(part.values()) for part in needs(config, args, longest(args), there.kind))
    name = "GPU memory"
    if there.kind == "cpu":
        device, host, name = device + host, 0, "memory"
    if device > there.device:
        return f"{name}: {size(device)} needed, {size(there.device)} available"
    if there.host is not None and host > there.host:
        return f"host memory: {size(host)} needed, {size(there.host)} free"
    return None


def size(n: float) -> str:
    """
    >>> size(16.06e9), size(3.1e6)
    ('16.1 GB', '3.1 MB')
    """
    return f"{n / 1e9:.1f} GB" if n >= 1e8 else f"{n / 1e6:.1f} MB"


def check(config, args, options, there: Machine) -> None:
    """Raises BadInput if memory or disk does not suffice."""
    if args.optimizer == "adamw-8bit" and there.here and not has_torchao():
        raise BadInput(NEEDS_TORCHAO)
    short, advice = shortage(config, args, there), ADVICE
    disk = sum(needs_on_disk(config, args, options).values())
    if not short and there.here and disk > there.disk:
        short = f"disk for --out {options.out}: {size(disk)} needed, {size(there.disk)} free"
        advice = "another --out may have it" + (
            "" if options.no_saves else ", --no_saves needs less"
        )
    if short:
        raise BadInput(
            f"this run does not fit, with --optimizer {args.optimizer}: {short}; {advice};"
            " --plan shows the parts"
        )
