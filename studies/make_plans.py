"""The plans of docs/memory.md: Llama-3-8B on one 80 GB GPU in several memory modes, from the shape
alone (seconds, no weights): `python studies/make_plans.py` -> assets/results/plan_8b.json."""

import json
import tempfile
import time
from pathlib import Path

from common import RESULTS, read_json, write_json

import train
from model import LlamaConfig
from support.memory import count, machine
from support.memory.table import LEVERS, extension_s, make_plan
from support.system.console import provenance

OUT = RESULTS / "plan_8b.json"
LLAMA3_8B = {  # config.json of Meta-Llama-3-8B
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    **{k: v for k, v in vars(count.LLAMA3_8B).items() if k not in ("qkv_bias", "qk_norm")},
}
MODES = (
    "--optimizer adamw --keep_attention --no-offload_inputs",
    "--optimizer adamw-host --no-keep_attention --no-offload_inputs",
    "--optimizer adamw-host --keep_attention --offload_inputs",
    "--optimizer adamw-8bit --no-keep_attention --offload_inputs",
)


def planned(folder: Path, flags: str) -> tuple:
    """All that train.py makes of the flags before it plans: config, settings, options, stages,
    machine, and what is given."""
    given, options = train.parse(["--model", str(folder), *flags.split()])
    config = LlamaConfig.from_dir(folder)
    there = machine.machine(options.plan or machine.HERE, "cpu", options.out)
    settings = train.resolve(given, config, there)
    return config, settings, options, train.plan_stages(settings), there, given


def as_flags(levers: dict) -> str:
    """
    >>> as_flags({"optimizer": "adamw", "keep_attention": False, "offload_inputs": True,
    ...     "split_mlp": False})
    'adamw --offload_inputs'
    """
    on = [f"--{name}" for name in LEVERS[1:] if levers[name]]
    return " ".join([levers["optimizer"], *on])


def summary(rows: dict, chosen: str) -> dict:
    """What docs/memory.md says of the rows: AdamW on the GPU, and the chosen row against its run
    at full length; samples of probe and extension, and their seconds at the speed of gpu.json."""
    plain, ours = rows["adamw --keep_attention"], rows[chosen]
    state = sum(plain["bytes"]["device"][part] for part in ("weights", "gradients", "optimizer"))
    seconds, full_s = (extension_s(p["stages"]) for p in (ours, ours["full_length"]))
    saved = [1 - short / long for short, long in ours["one_sample"].values()]
    samples = sum(ours["stages"][name]["sequences"] for name in ("probe", "extend"))
    step = read_json(RESULTS / "gpu.json")["parts"][machine.MEASURED_STEP]
    return {
        "state": state,
        "state_over_device": state / plain["there"]["device"],
        "flops_saved": [min(saved), max(saved)],
        "seconds_saved": 1 - seconds / full_s,
        "full_length_s": full_s,
        "full_length_bytes": sum(ours["full_length"]["bytes"]["device"].values()),
        "flops_per_s": ours["rate"]["flops_per_s"],
        "replay_s": ours["stages"]["replay"]["seconds"],
        "samples": samples,
        "samples_s": samples * step["seconds_per_sequence"],
    }


def make() -> dict:
    """The plans on an H100; its host is not checked."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA3_8B))
        # Nothing given comes last: there full length chooses its levers as well
        each = [f"--plan H100 {mode} --no-split_mlp" for mode in MODES] + ["--plan H100"]
        plans = [make_plan(*planned(Path(folder), flags)) for flags in each]
        without = make_plan(*planned(Path(folder), "--plan H100 --no_saves"))["bytes"]["disk"]
    chosen, rows = as_flags(plans[-1]["levers"]), {as_flags(p["levers"]): p for p in plans}
    found = {"chosen": chosen, "rows": rows, "disk_without_saves": without}
    return found | {"summary": summary(rows, chosen)}


def main() -> None:
    write_json(OUT, make() | {"commit": provenance(time.time())["commit"]}, indent=1)


if __name__ == "__main__":
    main()
