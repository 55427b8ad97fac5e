"""Write the numbers of README.md and docs/ from recorded results: `python studies/make_docs.py`.

Sentences are written by hand in the pages. Two kinds of places in them are written by this file:
    <!-- begin NAME --> ... <!-- end NAME -->         a region: what REGIONS[NAME] makes
    8.7<!--tiny_128k/run.json: seconds, minutes-->    a fact: the word before its comment, from a
                                                      file of assets/results; or a name of facts()
tests/test_docs.py fails when a page is stale. --figures: draws those of recorded rows again.
"""

import functools
import json
import re
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import WORDS, Table, in_words, lead, texts_of  # noqa: E402
from real_study import TABLE as REAL_STUDY  # noqa: E402
from tiny_study import table_of  # noqa: E402

from support.memory import table as plan  # noqa: E402
from support.needles.figures import draw_curves, draw_heatmap  # noqa: E402
from support.needles.intervals import clustered, mean_of  # noqa: E402

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
RESULTS = ROOT / "assets" / "results"
TOY, REAL = RESULTS / "tiny_128k", RESULTS / "smollm2_16k"
STUDY = table_of(32_768)


def word(label: str) -> str:
    """What a model of needle_results.json is called in tables and figures."""
    if label.endswith(("(new base)", "(untrained)", "untrained")):
        return "untrained"
    return WORDS.get(re.split("[_/]", label)[-1], "original")


def read(path: Path | str) -> dict:
    return json.loads((RESULTS / path).read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def share(e: dict | None) -> str:
    """A cell: mean and 95 % interval of the share of answers found."""
    if e is None:
        return "not run"
    low, high = e["interval_95"]
    return f"{100 * e['mean']:.0f} % ({100 * low:.0f}-{100 * high:.0f})"


def find(entries: list[dict], model: str, task: str, length: int) -> dict | None:
    wanted = (model, task, length)
    return next((e for e in entries if (e["model"], e["task"], e["length"]) == wanted), None)


def overlap(a: dict, b: dict) -> str:
    (a_low, a_high), (b_low, b_high) = a["interval_95"], b["interval_95"]
    return "overlap" if a_low <= b_high and b_low <= a_high else "differ"


# ---- regions -----------------------------------------------------------------------------------


def rows_of(models: dict) -> dict[str, str]:
    """Row of a table -> label, of the models of a needle_results.json. A folder that is named after
    no method is train.py's result; the first such is what it started from."""
    rows = {}
    for label in models:
        row = word(label)
        rows["LongRecipe" if row == "original" and row in rows else row] = label
    return rows


def toy_entry(row: str, length: int, folder: str = "tiny_128k") -> dict | None:
    found = read(f"{folder}/needle_results.json")
    return find(found["table"], rows_of(found["models"])[row], "multiquery", length)


def needle_table(found: dict, losses: dict | None = None) -> str:
    """Share of answers by length, a row a model; and the loss per token, where that was measured.
    n is named where it is not that of most cells."""
    needles = [e for e in found["table"] if e["task"] != "loss"]
    losses = [e for e in (losses or found)["table"] if e["task"] == "loss"]
    lengths, at = (sorted({e["length"] for e in entries}) for entries in (needles, losses))
    n, rows = statistics.mode(e["n"] for e in needles), []
    for row, label in rows_of(found["models"]).items():
        cells = [row]
        for length in lengths:
            e = find(needles, label, needles[0]["task"], length)
            cells.append(share(e) + (f", n = {e['n']}" if e and e["n"] != n else ""))
        entries = [find(losses, label, "loss", length) for length in at]
        rows.append(cells + [f"{e['mean']:.2f}" if e else "not run" for e in entries])
    header = [f"n = {n} answers", *(f"{length:,} tokens" for length in lengths)]
    return table(header + [f"loss at {length:,}" for length in at], rows)


def cell(seeds: dict, length: int) -> dict:
    """A cell of a study: all texts of all seeds."""
    texts = texts_of(seeds, length)
    n = sum(map(len, texts))
    return {"mean": mean_of(texts), "interval_95": clustered(texts), "n": n}


def main_table() -> str:
    """README's one table: the toy under a theta that is too small, and under the paper's."""
    shown = {
        "original": ("original model", "untrained, old base"),
        "untrained": ("original weights under the new theta, **untrained**", "untrained"),
        "plain positions": ("trained, plain positions (`--method none`)", "none"),
        "PoSE": ("trained, one jump (`--method pose`)", "pose"),
        "LongRecipe": ("trained, **LongRecipe**", "longrecipe"),
    }
    runs = read(STUDY.file.name)["runs"]
    pairs = {
        row: (cell(runs[setting], 32_768), toy_entry(row, 131_072))
        for row, (_, setting) in shown.items()
    }
    rows = [[shown[row][0], *map(share, pair)] for row, pair in pairs.items()]
    counts = [str(e["n"]) for e in pairs["LongRecipe"]]
    counts[1] += f" (original: {pairs['original'][1]['n']})"
    header = ["answers found, 95 % interval", "32,768 tokens, theta x 4"]
    header.append("131,072 tokens, the paper's theta")
    return table(header, [*rows, ["n = answers a row", *counts]])


def windows_table() -> str:
    """train.py and eval_needle.py with other --target_len (readme_runs.py default --target N)."""
    rows = []
    for folder in sorted(RESULTS.glob("tiny_*k"), key=lambda f: int(f.name[5:-1])):
        run = read(folder / "run.json")
        target = run["settings"]["target_len"]
        cells = [toy_entry(row, target, folder.name) for row in ("original", "untrained")]
        cells.append(toy_entry("LongRecipe", target, folder.name))
        cost = f"{run['seconds'] / 60:.1f} on {run['threads']} core(s), commit {run['commit']}"
        link = f"[{target:,}](../assets/results/{folder.name})"
        rows.append([link, *map(share, cells), cost])
    return table(["window", "original", "untrained", "LongRecipe", "minutes of training"], rows)


def leads(study: Table, field: str = "scores") -> dict[str, dict]:
    """Row of a study -> by how much longrecipe under the same theta is above it at the target."""
    runs, found = read(study.file.name)["runs"], {}
    for name in (name for name in study.names if name in runs):
        pair = runs.get(study.reference(name), {}), runs[name]
        ours, other = ({s: row for s, row in seeds.items() if field in row} for seeds in pair)
        if ours != other and ours.keys() & other.keys():
            found[name] = lead(ours, other, study.lengths[1], field)
    return found


def verdict(e: dict) -> str:
    """Where the interval of a lead is."""
    low, high = e["interval_95"]
    if low > 0 and (len(e["by_seed"]) < 2 or min(e["by_seed"]) <= 0):
        return "above on average, but not with each seed (or there is one seed only),"
    return "above" if low > 0 else "below" if high < 0 else "not told apart from"


def gain(e: dict | None, scale: float, how: str) -> str:
    if e is None:
        return ""
    mean, low, high = (format(scale * x, how) for x in (e["mean"], *e["interval_95"]))
    return f"{mean} ({low} to {high})"


def study_row(name: str, runs: dict, lengths: tuple[int, int], ahead: dict, nats: dict) -> dict:
    """Column -> cell, empty where that was not measured."""
    seeds, original = runs[name], runs.get("untrained, old base", {})

    def mean(key: str, how: str) -> str:
        values = [row[key] for row in seeds.values() if key in row]
        return FORMATS[how](statistics.mean(values)) if values else ""

    losses = [
        statistics.mean(row["losses"]) - statistics.mean(original[seed]["losses"])
        for seed, row in seeds.items()
        if row.get("losses") and original.get(seed, {}).get("losses")
    ]
    row = {"setting": in_words(name)}
    row["steps"] = str(next(iter(seeds.values())).get("recipe", {}).get("steps", ""))
    row["questions kept, %"] = mean("questions_kept", "%")
    asked = row["questions kept, %"] not in ("", "0")  # of no question none has its pair
    row["with their pair, %"] = mean("their_pair_kept", "%") if asked else ""
    row["loss above the original's"] = f"{statistics.mean(losses):+.3f}" if losses else ""
    for length in lengths:
        row[f"at {length:,}"] = share(cell(seeds, length))
        found = texts_of(seeds, length, "nats")
        row[f"nats at {length:,}"] = f"{mean_of(found):.2f}" if found else ""
    means = [cell({s: seeds[s]}, lengths[1])["mean"] for s in sorted(seeds)]
    row["by seed"] = ", ".join(map(FORMATS["%"], means))
    row["LongRecipe above it by"] = gain(ahead.get(name), 100, "+.0f")
    row["in nats"] = gain(nats.get(name), 1, "+.2f")
    return row


def study_table(study: Table) -> str:
    if not (RESULTS / study.file.name).is_file():
        return "Not run yet."
    runs, both = read(study.file.name)["runs"], (leads(study), leads(study, "nats"))
    rows = [study_row(name, runs, study.lengths, *both) for name in study.best_first(runs)]
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    return table(columns, [[row[column] for column in columns] for row in rows])


def study_verdicts() -> str:
    """One sentence for each theta: what longrecipe is above, below, or not told apart from."""
    found, lines = leads(STUDY), []
    for theta in dict.fromkeys(name.partition(", ")[2] for name in found):
        groups: dict[str, list[str]] = {}
        for name in (name for name in found if name.partition(", ")[2] == theta):
            groups.setdefault(verdict(found[name]), []).append(in_words(name))
        told = "; ".join(f"{how} {', '.join(names)}" for how, names in sorted(groups.items()))
        where = f"Under the {theta.replace('base', 'theta')}" if theta else "Under theta x 4"
        lines.append(f"- {where}, text by text, LongRecipe at 32,768 tokens is {told}.")
    return "\n".join(lines)


def first_run() -> str:
    """What README's first pair of commands took, and what it found at its longest length."""
    if not (RESULTS / "first_run.json").is_file():
        return "What this pair took and found: not run yet (`python studies/readme_runs.py first`)."
    found = read("first_run.json")
    trained, judged, results = (found[k] for k in ("train", "eval", "results"))
    length = max(e["length"] for e in results["table"])
    labels = rows_of(results["models"])
    shares, leads = [], []
    for row, label in labels.items():
        e = find(results["table"], label, results["table"][0]["task"], length)
        shares.append(f"{row} {share(e)[:-1]}, n = {e['n']})")
    for pair in results["pairs"]:
        if pair["length"] == length and pair["found"]["interval_95"]:
            name = next((row for row, label in labels.items() if label == pair["against"]), "")
            f, n = pair["found"], pair["nats"]
            (a, b), (c, d) = f["interval_95"], n["interval_95"]
            leads.append(
                f"{f['verdict']} {name or pair['against']} by {100 * f['mean']:.0f} points"
                f" ({100 * a:.0f} to {100 * b:.0f}) and {n['mean']:.1f} nats an answer"
                f" ({c:.1f} to {d:.1f})"
            )
    other = found["train_none"]["seconds"] + found["eval_none"]["seconds"]
    return (
        f"The first pair took {trained['seconds'] / 60:.1f} + {judged['seconds'] / 60:.1f} minutes"
        f" ({found['threads']} cores of an {found['hardware']}, {trained['peak_GiB']:.1f} GiB,"
        f" [JSON](assets/results/first_run.json)), `--method none` on the same tokens beside it"
        f" {other / 60:.1f} more. Found at {length:,} tokens: {'; '.join(shares)}. Text by text,"
        f" LongRecipe is {' and '.join(leads)}."
    )


def real_table() -> str:
    rows, stages = (read(f"smollm2_16k/{name}/needle_results.json") for name in ("rows", "stages"))
    lengths, lines = (2048, 8192, 16_384), []
    order = ["original", "untrained", *WORDS.values()]
    entries = sorted(rows["models"], key=lambda label: order.index(word(label)))
    entries = [(m, rows["table"]) for m in entries]
    entries += [(m, stages["table"]) for m in stages["models"] if m.endswith("ed")]
    for model, found in entries:
        losses = [find(found, model, "loss", n) for n in lengths]
        cells = [share(find(found, model, "niah_single", n)) for n in lengths]
        lines.append(
            [word(model), *cells, *(f"{e['mean']:.3f}" if e else "not run" for e in losses)]
        )
    header = ["", "needles at 2k", "at 8k", "at 16k", "loss at 2k", "at 8k", "at 16k"]
    return table(header, lines)


def plan_table() -> str:
    rows = []
    for name, r in read("plan_8b.json")["rows"].items():
        hours = [stage["seconds"] / 3600 for stage in r["stages"].values()]
        cells = [sum(r["bytes"][where].values()) / 1e9 for where in ("device", "host", "disk")]
        cells += [sum(hours[:3]), hours[3], r["seconds"] / 3600]
        rows.append([f"`{name}`", *(f"{x:.1f}" for x in cells)])
    header = ["39,424 tokens", "GPU, GB", "host, GB", "disk, GB", "hours: probe, analysis, extend"]
    return table([*header, "hours: replay (68M tokens)", "hours: all, with merge and saves"], rows)


# ---- facts -------------------------------------------------------------------------------------

FORMATS = {
    "minutes": lambda seconds: f"{seconds / 60:.1f}",
    "hours": lambda seconds: f"{seconds / 3600:.1f}",
    "%": lambda share: f"{100 * share:.0f}",
    "percent": lambda share: f"{100 * share:.1f}",
    "text": str,
    "GB": lambda size: f"{size / 1e9:.1f}",
    "count": lambda items: f"{len(items)}",
}


def fact(name: str) -> str:
    """`FILE: KEY/KEY/..., FORMAT`, or a name of facts(). FORMAT: one of FORMATS, or as format()
    takes it. KeyError if there is no such thing."""
    if ".json: " not in name:
        return facts()[name]
    file, _, rest = name.partition(": ")
    keys, _, how = rest.rpartition(", ")
    value = read(file)
    for key in keys.split("/"):
        value = value[int(key) if isinstance(value, list) else key]
    return FORMATS[how](value) if how in FORMATS else format(value, how)


@functools.cache
def facts() -> dict[str, str]:
    """The numbers that are worked out from more than one place of a result."""
    known = {f"study verdict {name}": verdict(e) for name, e in leads(STUDY).items()}
    for name, seeds in read(STUDY.file.name)["runs"].items():
        for n in STUDY.lengths:
            known[f"study {name} {n}"] = FORMATS["%"](mean_of(texts_of(seeds, n)))

    lines = (RESULTS / "tiny_128k" / "needle.jsonl").read_text().splitlines()
    needles, judged = [r for r in map(json.loads, lines) if r["task"] == "multiquery"], 0.0
    for row, label in rows_of(read(TOY / "needle_results.json")["models"]).items():
        seconds = sum(r["seconds"] for r in needles if r["model"] == label)
        judged += seconds if row in ("original", "untrained", "LongRecipe") else 0.0
        both = toy_entry(row, 131_072), toy_entry("LongRecipe", 131_072)
        known |= {f"toy minutes {row}": FORMATS["minutes"](seconds)}
        known |= {f"toy verdict {row}": overlap(*both)}
    known["toy minutes of judging"] = FORMATS["minutes"](judged)

    real = read("smollm2_16k/rows/needle_results.json")
    at_16k = {word(m): find(real["table"], m, "niah_single", 16_384) for m in real["models"]}
    for row, e in at_16k.items():
        known[f"real {row}"] = str(round(e["mean"] * e["n"]))
        known[f"real verdict {row}"] = overlap(e, at_16k["LongRecipe"])

    plans = read("plan_8b.json")
    chosen, state = plans["rows"][plans["chosen"]], plans["rows"]["adamw --keep_attention"]
    full, samples = chosen["full_length"], chosen["stages"]["probe"]["sequences"]
    samples += chosen["stages"]["extend"]["sequences"]
    device = sum(state["bytes"]["device"][k] for k in ("weights", "gradients", "optimizer"))
    ours, whole = (plan.extension_s(p["stages"]) for p in (chosen, full))
    saved = [100 * (1 - a / b) for a, b in chosen["one_sample"].values()]
    step = read("gpu.json")["parts"]["step adamw-host keep offload"]
    known |= {
        "8b state": f"{device / 1e9:.0f}",
        "8b state ratio": f"{device / state['there']['device']:.1f}",
        "8b disk without saves": FORMATS["GB"](sum(plans["disk_without_saves"].values())),
        "8b replay hours": FORMATS["hours"](chosen["stages"]["replay"]["seconds"]),
        "8b TFLOP/s": f"{chosen['rate']['flops_per_s'] / 1e12:.0f}",
        "8b full GB": FORMATS["GB"](sum(full["bytes"]["device"].values())),
        "8b full extend hours": f"{whole / 3600:.0f}",
        "8b less extend": f"{100 * (1 - ours / whole):.1f}",
        "8b less FLOPs": f"{min(saved):.1f}",
        "8b most FLOPs": f"{max(saved):.1f}",
        "gpu samples": f"{samples:,}",
        "gpu hours": FORMATS["hours"](samples * step["seconds_per_sequence"]),
    }

    curves = read("adamw_8bit.json")["loss"]
    gaps = [abs(a - b) for a, b in zip(curves["adamw-8bit"], curves["adamw"], strict=True)]
    known["8-bit against adamw"] = f"{max(gaps):.3f}"
    killed = [row["killed_by"] for row in read("mutants.json")["mutants"]]
    known["mutants named"] = str(sum("::" in (k or "") for k in killed))
    known["mutants other"] = str(sum(k is not None and "::" not in k for k in killed))
    return known | {"mutants alive": str(killed.count(None))}


# ---- writing -----------------------------------------------------------------------------------

REGIONS = {
    "first run": first_run,
    "main": main_table,
    "toy": lambda: needle_table(
        read("tiny_128k/needle_results.json"), read("tiny_128k/loss_results.json")
    ),
    "windows": windows_table,
    "study": lambda: study_table(STUDY),
    "real study": lambda: study_table(REAL_STUDY),
    "verdicts": study_verdicts,
    "real": real_table,
    "plan": plan_table,
}
REGION = re.compile(r"(<!-- begin (.*?) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
FACT = re.compile(r"([^\s(|>*]+)<!--(?! )(.*?)-->")


def render(text: str) -> str:
    """The page with its regions and facts made anew. KeyError if it names one that is not there."""
    text = REGION.sub(lambda m: f"{m[1]}{REGIONS[m[2]]()}\n{m[3]}", text)
    return FACT.sub(lambda m: f"{fact(m[2])}<!--{m[2]}-->", text)


def draw_figures() -> None:
    """The figures of recorded rows again, with the words of the tables instead of labels."""
    shown = ("original", "untrained", "plain positions", "LongRecipe")
    for where, task, parts in ((TOY, "multiquery", 8), (REAL / "rows", "niah_single", 0)):
        models = read(where / "needle_results.json")["models"]
        names = {label: row for row, label in rows_of(models).items() if row in shown}
        windows = {row: models[label]["window"] for label, row in names.items()}
        windows = {row: windows[row] for row in shown if row in windows}
        windows["untrained"] = windows["original"]  # what its weights were trained for
        file = next(f for f in (where, where.parent) if (f / "needle.jsonl").is_file())
        lines = (file / "needle.jsonl").read_text().splitlines()
        rows = [r | {"model": names.get(r["model"])} for r in map(json.loads, lines)]
        rows = [r for r in rows if r["model"]]
        draw_heatmap(where / "needle.png", rows, task, windows, {}, parts)
        if where == TOY:
            draw_curves(where / "curves.png", rows, task)


def main() -> None:
    if "--figures" in sys.argv:
        draw_figures()
    for page in PAGES:
        page.write_text(render(page.read_text()))


if __name__ == "__main__":
    main()
