"""Write README's numbers from the JSON files that the code wrote: `python tests/update_readme.py`.

A region is what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
tests/test_readme.py fails when a region is stale. A result that has no JSON says "not run".
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "assets" / "results"
RUN = RESULTS / "smollm2_16k"


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


def row_name(label: str) -> str:
    names = {
        "models/smollm2": "base",
        "models/smollm2 (new base)": "base with the new RoPE base, untrained",
        "longrecipe/extended": "longrecipe, after extend",
        "longrecipe/replayed": "longrecipe, after replay",
        "longrecipe": "**longrecipe** (merged)",
        "none": "`--method none`, same tokens (merged)",
    }
    return names[next(k for k in names if label.endswith(k))]


def cell(table: list[dict], model: str, task: str, length: int) -> str:
    for e in table:
        if (e["model"], e["task"], e["length"]) == (model, task, length):
            if task == "loss":
                return f"{e['mean']:.3f}"
            low, high = e["interval_95"]
            return f"{e['mean']:.0%} ({low:.0%}-{high:.0%})"
    return "not run"


def results() -> str:
    rows, stages = (
        read(RUN / "rows" / "needle_results.json"),
        read(RUN / "stages" / "needle_results.json"),
    )
    if not rows:
        return "Not run yet: `python tests/real_run.py`."
    order = ["models/smollm2", "models/smollm2 (new base)", "none", "longrecipe"]
    models = sorted(
        rows["models"], key=lambda m: next(i for i, k in enumerate(order) if m.endswith(k))
    )
    lines = [
        "| | needle at 2k | at 8k | at 16k | loss at 2k | at 16k |",
        "|---|---|---|---|---|---|",
    ]
    tables = [(m, rows["table"]) for m in models]
    if stages:
        tables += [(m, stages["table"]) for m in stages["models"] if m.endswith("ed")]
    for model, table in tables:
        found = [cell(table, model, "niah_single", n) for n in (2048, 8192, 16384)]
        loss = [cell(table, model, "loss", n) for n in (2048, 16384)]
        lines.append("| " + " | ".join([row_name(model), *found, *loss]) + " |")
    n, texts = (
        next(e["n"] for e in rows["table"] if e["task"] == t) for t in ("niah_single", "loss")
    )
    run = read(RUN / "longrecipe" / "run.json")
    s = run["settings"]
    lines += [
        "",
        f"Share of needles found: n = {n} a table cell, {rows['settings']['n']} haystacks x"
        f" {len(rows['settings']['depths'])} depths from essays that no training has seen. The"
        " depths of a haystack share its text and answer, so the Wilson 95 % interval, which takes"
        f" them for independent, is too narrow. Loss: nats a token, n = {texts} texts of the same"
        " essays, no interval."
        f" Training: {s['steps']} + {s['replay_steps']} samples of {s['train_len']:,} tokens,"
        f" {run['seconds'] / 60:.0f} minutes in {s['dtype']} on {run['threads']} cores of"
        f" {run['hardware']}, peak {run['peak_GiB']:.1f} GiB, commit {run['commit']};"
        " [JSON](assets/results/smollm2_16k).",
    ]
    return "\n".join(lines)


def cost() -> str:
    found = read(RESULTS / "cost.json")
    if not found:
        return "Not run yet: `python tests/bench_cost.py`."
    lines = [
        "| | seconds a step | peak GiB | above weights, gradients, optimizer state |",
        "|---|---|---|---|",
    ]
    for kind, m in found["median"].items():
        lines.append(
            f"| {kind} | {m['seconds']:.1f} | {m['peak_GiB']:.2f} | {m['above_state_GiB']:.2f} |"
        )
    s, seconds, median = found["settings"], found["all_seconds"], found["median"]
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    low, high = min(ratios), max(ratios)
    peak = median["ours"]["peak_GiB"] / median["transformers"]["peak_GiB"]
    lines += [
        "",
        f"One training step of SmolLM2-135M on {int(s['tokens']):,} tokens in {s['dtype']}, both"
        f" taking turns in one run: time ratio {found['time_ratio']:.2f}"
        f" ({low:.2f}-{high:.2f}, {s['steps']} pairs), memory ratio {found['memory_ratio']:.2f}"
        f" above the state, {peak:.2f} of the peak"
        " (extra steps, with an allocator that gives freed tensors back at once; more in LOG.md);"
        f" {found['threads']} cores of {found['hardware']},"
        " [JSON](assets/results/cost.json), `python tests/bench_cost.py`.",
    ]
    return "\n".join(lines)


REGIONS = {"results": results, "cost": cost}


def render(text: str) -> str:
    for name, make in REGIONS.items():
        pattern = rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)"
        text, n = re.subn(pattern, lambda m: f"{m[1]}{make()}\n{m[2]}", text, flags=re.DOTALL)  # noqa: B023
        if n != 1:
            raise ValueError(f"README has {n} regions {name!r}, expected 1")
    return text


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
