"""Which optimizer and which memory levers does a run take, and does it fit? Decided from
config.json alone, before weights are loaded."""

import importlib.util
import itertools
from dataclasses import replace

from support.memory import count
from support.memory.machine import Machine
from support.memory.optimizer import NAMES, NEEDS_TORCHAO
from support.system.bad_input import BadInput

# Assumed, not measured
DEVICE_EXTRA = {"cuda": 3e9, "cpu": 1.1e9}  # context, fragmentation; libraries, text
HOST_EXTRA = {"cuda": 3e9, "cpu": 0.0}  # Python, libraries, one tensor on its way


def needs(config, settings, kind: str) -> tuple[dict[str, float], dict[str, float]]:
    """(bytes by part on the device, on the host); kind: "cuda" or "cpu"."""
    tokens, extra = max(settings.train_len, settings.replay_len), "libraries, workspaces"
    device = count.device_bytes(config, settings, tokens, kind) | {extra: DEVICE_EXTRA[kind]}
    return device, count.host_bytes(config, settings, tokens) | {extra: HOST_EXTRA[kind]}


def totals(config, settings, there: Machine) -> tuple[float, float]:
    """(bytes on the device, on the host beside it); a CPU's device is its host."""
    device, host = (sum(parts.values()) for parts in needs(config, settings, there.kind))
    return (device + host, 0.0) if there.kind == "cpu" else (device, host)


def has_torchao() -> bool:
    return importlib.util.find_spec("torchao") is not None


def choose_levers(config, settings, there: Machine, given: dict):
    """The settings with the levers chosen where `given` (name -> value) does not have them: the
    first combination that fits, or the one that needs least of the device.

    Tried in order of speed: recomputing attention costs 10 % of the arithmetic, the optimizer on
    the host 2 %, offloading inputs nothing that the plan can count. Then 8-bit, which is a
    different optimizer, and last the MLP in pieces."""
    optimizers = NAMES if has_torchao() or not there.here else NAMES[:2]
    levers = {"optimizer": optimizers, "keep_attention": (True, False)}
    levers |= {"offload_inputs": (False, True), "split_mlp": (False, True)}
    levers |= {name: (given[name],) for name in levers if name in given}
    tried = [
        replace(settings, **dict(zip(levers, values, strict=True)))
        for values in itertools.product(*levers.values())
    ]
    tried.sort(key=lambda x: (x.split_mlp, x.optimizer == "adamw-8bit", not x.keep_attention))
    fitting = (x for x in tried if not shortage(config, x, there))
    return next(fitting, None) or min(tried, key=lambda x: totals(config, x, there)[0])


def shortage(config, settings, there: Machine) -> str | None:
    """Which memory is too small, in words; None if all of it suffices."""
    device, host = totals(config, settings, there)
    if device > there.device:
        name = "memory" if there.kind == "cpu" else "GPU memory"
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


def check_resources(config, settings, options, there: Machine) -> None:
    """Raises BadInput if memory or disk does not suffice."""
    if settings.optimizer == "adamw-8bit" and there.here and not has_torchao():
        raise BadInput(NEEDS_TORCHAO)
    short = shortage(config, settings, there)
    advice = "shorter samples (--train_len) or another --optimizer may need less"
    disk = sum(count.disk_bytes(config, settings, options).values())
    if not short and there.here and disk > there.disk:
        short = f"disk for --out {options.out}: {size(disk)} needed, {size(there.disk)} free"
        advice = "another --out may have it"
        advice += "" if options.no_saves else ", --no_saves needs less"
    if short:
        raise BadInput(
            f"this run does not fit, with --optimizer {settings.optimizer}: {short}; {advice};"
            " --plan shows the parts"
        )
