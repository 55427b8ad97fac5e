"""Write README's numbers from the JSON files that the code wrote: `python tests/update_readme.py`.

A region is what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
tests/test_readme.py fails when a region is stale. A result that has no JSON says "not run".
"""

import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tiny_study import SETTINGS  # noqa: E402

import train  # noqa: E402
from support.results import clustered  # noqa: E402

RESULTS = ROOT / "assets" / "results"
RUN, TINY = RESULTS / "smollm2_16k", RESULTS / "tiny_128k"


def read(path: Path) -> dict | None:
    return json.loads(path.read_text()) if path.is_file() else None


# How a label of eval_needle.py ends -> the name of its row, in the order of the table and figure
NAMES = {
    "models/smollm2": "base",
    "models/smollm2 (new base)": "base with the new RoPE base, untrained",
    "none": "`--method none`, same tokens (merged)",
    "longrecipe": "**longrecipe** (merged)",
    "longrecipe/extended": "longrecipe, after extend",
    "longrecipe/replayed": "longrecipe, after replay",
}


def row_name(label: str) -> str:
    return NAMES[next(k for k in NAMES if label.endswith(k))]


def plain_name(label: str) -> str:
    return row_name(label).replace("*", "").replace("`", "")


def table_order(labels) -> list[str]:
    return sorted(labels, key=lambda m: next(i for i, k in enumerate(NAMES) if m.endswith(k)))


def cell(table: list[dict], model: str, task: str, length: int) -> str:
    for e in table:
        if (e["model"], e["task"], e["length"]) == (model, task, length):
            if task == "loss":
                return f"{e['mean']:.3f}"
            low, high = e["interval_95"]
            return f"{e['mean']:.0%} ({low:.0%}-{high:.0%})"
    return "not run"


def tiny() -> str:
    found, run = (read(TINY / f) for f in ("needle_results.json", "run.json"))
    if not found:
        return "Not run yet: `python tests/tiny_study.py --default`."
    lengths = sorted({e["length"] for e in found["table"]})
    lines = [
        "| 8 keys, 8 questions | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    models = list(found["models"])
    names = ("base, window 8,192", "base with the new RoPE base, untrained", "**after train.py**")
    for label, name in zip(models, names, strict=True):
        cells = [cell(found["table"], label, "multiquery", n) for n in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    base, control, result = (
        ", ".join(str(e["haystacks"]) for e in found["table"] if e["model"] == label)
        for label in models
    )
    s = run["settings"]
    lines += [
        "",
        f"`train.py`: {run['seconds'] / 60:.1f} minutes with tests running beside,"
        f" peak {run['peak_GiB']:.1f} GiB"
        f" ({s['steps']} samples of {s['train_len']:,} tokens, {s['replay_steps']} of"
        f" {s['replay_len']:,} for the replay, {s['dtype']}); `eval_needle.py`:"
        f" {found['seconds_of_all_rows'] / 60:.1f} minutes, the sum of its rows, the control"
        " (`--controls`) included;"
        f" {run['threads']} cores of {run['hardware']}, commit {run['commit']};"
        " [JSON](assets/results/tiny_128k). Haystacks per length:"
        f" {base} (base), {control} (control), {result} (result);"
        " 8 questions each, answered from one prefill; intervals draw whole haystacks again"
        " and are never narrower than Wilson's. Chance among the 8 values is 12.5 %.",
    ]
    lines += ["", other_python(names[1:])]
    made, judged = (
        read(ROOT / "assets/tiny/training.json"),
        read(RESULTS / "tiny/needle_results.json"),
    )
    score = judged["table"][0]
    lines += [
        "",
        "The tiny model was trained by this project from random weights"
        f" (`python tests/make_tiny.py`, {made['training_seconds'] / 60:.0f} minutes on"
        f" {made['threads']} cores):"
        f" {score['mean']:.0%} of eight keys at {score['length']:,} tokens (n = {score['n']},"
        " [JSON](assets/results/tiny/needle_results.json)).",
    ]
    return "\n".join(lines)


def other_python(names: tuple[str, str]) -> str:
    """The same commands where the standard library, so text and haystack, is another one."""
    folder = RESULTS / "tiny_128k_other_python"
    found, run = (read(folder / f) for f in ("needle_results.json", "run.json"))
    length = run["settings"]["target_len"]
    models = list(found["models"])[1:]
    control, result = (cell(found["table"], m, "multiquery", length) for m in models)
    return (
        "The text is your Python's own library, so another Python gives other numbers. The same"
        f" commands with {run['python']} instead of {read(TINY / 'run.json')['python']}, at"
        f" {length:,} tokens: {result} {names[1]}; {control} {names[0]} (commit {run['commit']},"
        f" [JSON](assets/results/{folder.name}))."
    )


def study(target: int) -> str:
    found = read(RESULTS / f"tiny_study_{target}.json")
    if not found:
        return f"Not run yet: `python tests/tiny_study.py --target {target}`."
    lines = [
        f"| setting | seeds | at 8,192 | at {target:,} |",
        "|---|---|---|---|",
    ]
    for name in (name for name in SETTINGS if name in found["runs"]):
        seeds, cells = found["runs"][name], []
        for length in ("8192", str(target)):
            clusters = [c for one in seeds.values() for c in one["scores"][length]]
            scores = [score for c in clusters for score in c]
            low, high = clustered(clusters)
            cells.append(f"{sum(scores) / len(scores):.0%} ({low:.0%}-{high:.0%})")
        lines.append(f"| {name} | {len(seeds)} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        f"Share of questions answered: {found['haystacks']} haystacks x 8 questions per length and"
        f" seed; {found['steps']} steps of 30 % of the target, or as many tokens; interval: whole"
        f" haystacks drawn again, never narrower than Wilson's. {found['threads']} core(s) of"
        f" {found['hardware']},"
        f" [JSON](assets/results/tiny_study_{target}.json).",
    ]
    return "\n".join(lines)


def results() -> str:
    rows, stages = (
        read(RUN / "rows" / "needle_results.json"),
        read(RUN / "stages" / "needle_results.json"),
    )
    if not rows:
        return "Not run yet: `python tests/real_run.py`."
    lines = [
        "| | needle at 2k | at 8k | at 16k | loss at 2k | at 8k | at 16k |",
        "|---|---|---|---|---|---|---|",
    ]
    tables = [(m, rows["table"]) for m in table_order(rows["models"])]
    if stages:
        tables += [(m, stages["table"]) for m in stages["models"] if m.endswith("ed")]
    for model, table in tables:
        found = [cell(table, model, "niah_single", n) for n in (2048, 8192, 16384)]
        loss = [cell(table, model, "loss", n) for n in (2048, 8192, 16384)]
        lines.append("| " + " | ".join([row_name(model), *found, *loss]) + " |")
    n, texts = (
        next(e["n"] for e in rows["table"] if e["task"] == t) for t in ("niah_single", "loss")
    )
    run, paper = read(RUN / "longrecipe" / "run.json"), train.parse(["--model", "any"])
    s = run["settings"]
    lines += [
        "",
        f"Share of needles found: n = {n} per cell, {rows['settings']['n']} haystacks x"
        f" {len(rows['settings']['depths'])} depths from essays that no training has seen. The"
        " depths of a haystack share its text and answer, so the 95 % interval draws whole"
        f" haystacks again, and is never narrower than Wilson's. Loss: nats per token, n = {texts}"
        " texts of the same essays, no interval.",
        "",
        f"Training: {s['steps']} samples of {s['train_len']:,} tokens for the extension and"
        f" {s['replay_steps']} for the replay, {run['seconds'] / 60:.0f} minutes in {s['dtype']} on"
        f" {run['threads']} cores of {run['hardware']}, peak {run['peak_GiB']:.1f} GiB, commit"
        f" {run['commit']}; [JSON](assets/results/smollm2_16k). Far less than the paper, whose"
        " numbers are the defaults of `train.py`: "
        + ", ".join(
            f"`--{k}` {s[k]:g} here, {getattr(paper, k):g} there"
            for k in ("steps", "batch_sequences", "lr", "replay_lr")
        )
        + ".",
    ]
    return "\n".join(lines)


def cost() -> str:
    found = read(RESULTS / "cost.json")
    if not found:
        return "Not run yet: `python tests/bench_cost.py`."
    lines = [
        "| | seconds per step | peak GiB | above weights, gradients, optimizer state |",
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


def judge() -> str:
    found = read(RESULTS / "eval_cost.json")
    if not found:
        return "Against `transformers.generate`: not measured yet (`python tests/bench_eval.py`)."
    seconds, peak, s = found["seconds_of_all_rows"], found["peak_GiB_of"], found["settings"]
    return (
        f"Against `transformers.generate` on the same {found['answers']} prompts"
        f" ({len(s['lengths'])} lengths to {max(s['lengths']):,} x {len(s['depths'])} depths,"
        f" {s['model']}, {found['dtype']}), in turns: {seconds['ours']:.0f} seconds and"
        f" {peak['ours']:.1f} GiB against {seconds['transformers']:.0f} and"
        f" {peak['transformers']:.1f}, ratio {found['ratio']:.2f},"
        f" {found['answers_equal']} of {found['answers']} answers equal; {found['threads']} cores"
        f" of {found['hardware']}, commit {found['commit']},"
        " [JSON](assets/results/eval_cost.json), `python tests/bench_eval.py`."
    )


def smallest() -> str:
    found = read(RESULTS / "smallest_run.json")
    if not found:
        return "Not measured yet: `python tests/real_run.py --smallest`."
    disk, trained, judged = found["disk_GB"], found["train"], found["eval"]
    return (
        f"Measured in {found['dtype']} on {found['threads']} cores of {found['hardware']}"
        f" ([JSON](assets/results/smallest_run.json)): `train.py` {trained['seconds']:.0f}"
        f" seconds and {trained['peak_GiB']:.1f} GiB of memory, `eval_needle.py`"
        f" {judged['seconds']:.0f} seconds and {judged['peak_GiB']:.1f} GiB. Disk:"
        f" {disk['environment']:.1f} GB for .venv (torch {found['torch']}),"
        f" {disk['model_and_essays']:.1f} GB for models/ and data/, at most"
        f" {disk['out_at_most']:.1f} GB in out/ during the run, of which {disk['state_pt']:.1f} GB"
        f" are the training state that `--resume` needs, and {disk['out']:.1f} GB at the end."
    )


def plan_8b() -> str:
    found = read(RESULTS / "plan_8b.json")
    if not found:
        return "Not made yet: `python tests/make_plans.py`."
    rows = found["rows"]
    lines = [
        "| 39,424 tokens, GB (1e9 bytes) | " + " | ".join(f"`{name}`" for name in rows) + " |",
        "|---" * (len(rows) + 1) + "|",
    ]
    for part in next(iter(rows.values()))["bytes"]["device"]:
        cells = [f"{r['bytes']['device'][part] / 1e9:.1f}" for r in rows.values()]
        lines.append(f"| {part} | " + " | ".join(cells) + " |")
    for name, column in (("GPU", "device"), ("host", "host"), ("disk", "disk")):
        cells = [f"**{sum(r['bytes'][column].values()) / 1e9:.1f}**" for r in rows.values()]
        lines.append(f"| **{name}, sum** | " + " | ".join(cells) + " |")
    hours = {
        name: {k: s["seconds"] / 3600 for k, s in r["stages"].items()} for name, r in rows.items()
    }
    for name, stages in (("probe, analysis, extend", 3), ("replay (68M tokens)", 1)):
        cells = []
        for by_stage in hours.values():
            values = list(by_stage.values())
            cells.append(f"{sum(values[:3]) if stages == 3 else values[3]:.1f}")
        lines.append(f"| hours: {name} | " + " | ".join(cells) + " |")
    cells = [f"{r['seconds'] / 3600:.1f}" for r in rows.values()]
    lines.append("| hours: all, with merge and saves | " + " | ".join(cells) + " |")
    lines.append("| measured on a GPU | " + " | ".join("not run" for _ in rows) + " |")
    chosen = rows[found["chosen"]]
    saved = {k: 1 - a / b for k, (a, b) in chosen["one_sample"].items()}
    full = sum(chosen["device_of_full_length"].values()) / 1e9
    rate = chosen["rate"]
    lines += [
        "",
        f"Chosen for an H100 with 80 GB: `{found['chosen']}`. Bytes and FLOPs are counted, speed is"
        f" not measured: {rate['flops_per_s'] / 1e12:.0f} TFLOP/s, {rate['from']}. A sample of"
        f" {chosen['lengths'][1]:,} tokens would take {full:.0f} GB of the GPU. What"
        f" {chosen['lengths'][0]:,} tokens save against {chosen['lengths'][1]:,}: "
        + ", ".join(f"{v:.1%} ({k})" for k, v in saved.items())
        + ". [JSON](assets/results/plan_8b.json).",
    ]
    return "\n".join(lines)


def adamw_8bit() -> str:
    found = read(RESULTS / "adamw_8bit.json")
    if not found:
        return "`adamw-8bit` on a real model: not run."
    band, eight, masters = found["band"], found["gaps"]["adamw-8bit"], found["gaps"]["adamw"]
    run = found["runs"]["adamw-8bit"]
    return (
        "SmolLM2-135M in bfloat16 beside the same in fp32,"
        f" {len(found['loss']['adamw'])} steps of two samples of 1,024 tokens: with `adamw-8bit`"
        f" the losses of a step differ by at most {eight['any_step']:.3f} nat (band:"
        f" {band['any_step']}), those of the last ten by {eight['mean_of_last_10']:.3f} on average"
        f" (band: {band['mean_of_last_10']}), while the fp32 loss fell by"
        f" {found['fell']['adamw-fp32']:.2f}; with `adamw` (fp32 masters) by at most"
        f" {masters['any_step']:.3f} and {masters['mean_of_last_10']:.3f}: rounded from masters,"
        f" bf16 weights lag behind at first ([LOG.md](LOG.md)). {run['threads']} core(s) of"
        f" {run['hardware']}, [JSON](assets/results/adamw_8bit.json),"
        " `python tests/optimizer_run.py`."
    )


def cost_by_length() -> str:
    found = read(RESULTS / "cost_by_length.json")
    if not found:
        return "Cost against length: not run (`python tests/bench_cost.py --lengths`)."
    kinds = list(found["fit"])
    lengths = sorted({row["tokens"] for row in found["rows"]})
    lines = [
        "| seconds a step | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    for kind in kinds:
        best = {n: [r[kind] for r in found["rows"] if r["tokens"] == n] for n in lengths}
        cells = [
            f"{statistics.median(v):.1f}" if None not in v else "not run" for v in best.values()
        ]
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    ratios = found["ratio_by_length"]
    shown = ", ".join(f"{float(v):.2f} at {int(k):,}" for k, v in ratios.items())
    lines += [
        "",
        f"Ours over transformers, in turns within one run: {shown} ({found['dtype']},"
        f" {found['threads']} cores of {found['hardware']});"
        " [JSON](assets/results/cost_by_length.json), [figure](assets/results/cost_by_length.png).",
    ]
    return "\n".join(lines)


REGIONS = {
    "plan": plan_8b,
    "8bit": adamw_8bit,
    "cost by length": cost_by_length,
    "tiny": tiny,
    "study 32768": lambda: study(32_768),
    "study 131072": lambda: study(131_072),
    "results": results,
    "smallest": smallest,
    "cost": cost,
    "eval": judge,
}


def render(text: str) -> str:
    for name, make in REGIONS.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise ValueError(f"README needs the region {name!r} exactly once")
        before, rest = text.split(begin)
        text = f"{before}{begin}{make()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
