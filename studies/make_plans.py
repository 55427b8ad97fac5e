"""The plans of docs/memory.md: Llama-3-8B on one 80 GB GPU in several memory modes, from the shape
alone (seconds, no weights): `python studies/make_plans.py` -> assets/results/plan_8b.json."""

import json
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from model import LlamaConfig  # noqa: E402
from support.memory import count, machine  # noqa: E402
from support.memory import table as plan  # noqa: E402
from support.system.console import provenance  # noqa: E402

OUT = ROOT / "assets" / "results" / "plan_8b.json"
LLAMA3_8B = {  # config.json of Meta-Llama-3-8B
    "model_type": "llama",
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    **{k: v for k, v in count.LLAMA3_8B.items() if k not in ("qkv_bias", "qk_norm")},
}
MODES = (
    "--optimizer adamw --keep_attention --no-offload_inputs",
    "--optimizer adamw-host --no-keep_attention --no-offload_inputs",
    "--optimizer adamw-host --keep_attention --offload_inputs",
    "--optimizer adamw-8bit --no-keep_attention --offload_inputs",
)


def one(folder: str, flags: str) -> tuple[str, dict]:
    """(the levers that are on, the plan) on an H100; its host is not checked."""
    given, options = train.parse(["--model", folder, "--plan", "H100", *flags.split()])
    config = LlamaConfig.from_dir(folder)
    there = machine.machine("H100", "cuda", options.out)
    settings = train.resolve(given, config, there)
    stages = train.plan_stages(settings)
    made = plan.make_plan(config, settings, options, stages, there, given)
    return plan.as_flags(made["levers"]), made


def summary(rows: dict, chosen: str) -> dict:
    """What docs/memory.md says of the rows: AdamW on the GPU, and the chosen row against its run
    at full length; samples of probe and extension, and their seconds at the speed of gpu.json."""
    plain, ours = rows["adamw --keep_attention"], rows[chosen]
    state = sum(plain["bytes"]["device"][part] for part in ("weights", "gradients", "optimizer"))
    seconds, full_s = (plan.extension_s(p["stages"]) for p in (ours, ours["full_length"]))
    saved = [1 - short / long for short, long in ours["one_sample"].values()]
    samples = sum(ours["stages"][name]["sequences"] for name in ("probe", "extend"))
    parts = json.loads((OUT.parent / "gpu.json").read_text())["parts"]
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
        "samples_s": samples * parts[machine.MEASURED_STEP]["seconds_per_sequence"],
    }


def main() -> None:
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(LLAMA3_8B))
        rows = dict(one(folder, f"{flags} --no-split_mlp") for flags in MODES)
        chosen, made = one(folder, "")
        rows[chosen] = made  # nothing given: full length chooses its levers as well
        without = one(folder, "--no_saves")[1]["bytes"]["disk"]
    made = {"chosen": chosen, "rows": rows, "disk_without_saves": without}
    made["summary"] = summary(rows, chosen)
    made["commit"] = provenance(started)["commit"]
    OUT.write_text(json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
