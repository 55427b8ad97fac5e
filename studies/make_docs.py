"""Write the numbers of README.md and docs/ from recorded results: `python studies/make_docs.py`.

Sentences are written by hand in the pages. Two kinds of places in them are written by this file:
    <!-- begin NAME --> ... <!-- end NAME -->         a region: what REGIONS[NAME] makes
    8.7<!--tiny_128k/run.json: seconds, minutes-->    a fact: the word before its comment, from a
                                                      file of assets/results; or a name of facts()
tests/test_docs.py fails when a page is stale.
"""

import collections
import functools
import re
import statistics
from collections.abc import Iterable

import real_study
import tiny_study
import word_classes
from common import (
    RESULTS,
    ROOT,
    WORDS,
    cell,
    cells_table,
    gain,
    read_json,
    read_lines,
    share,
    table,
    texts_of,
)

from support.needles.intervals import mean_of
from support.needles.settings import default_lengths

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
STUDY, REAL_STUDY = (of.study_of([]) for of in (tiny_study, real_study))
MERGES = ["no merge", "merge weight 0.75", "LongRecipe", "merge weight 0.25"]  # their weights fall
ROWS = ["original", "untrained", *WORDS.values()]  # of every table, in this order
TOY = "tiny_128k/needle_results.json"
MORE_TEXTS = "tiny_128k/more_texts.json"  # the same at two lengths, with nats
YARN = "tiny_128k_yarn/needle_results.json"  # and under yarn
TASKS = "smollm2_tasks/needle_results.json"
REAL = [f"smollm2_16k/{part}/needle_results.json" for part in ("rows", "stages")]
study = functools.cache(STUDY.cells)


def read(path: str) -> dict:
    return read_json(RESULTS / path)


def rows_of(models: Iterable[str]) -> dict[str, str]:
    """Label of a model in needle_results.json -> its row here. Recorded labels are folders or older
    words. A folder that is named after no method is a result of train.py, the first such what it
    started from.

    >>> rows_of(["assets/tiny", "assets/tiny (new base)", "runs/tiny_128k_none", "runs/tiny_128k"])
    {'assets/tiny': 'original', 'assets/tiny (new base)': 'untrained', 'runs/tiny_128k_none': \
'plain positions', 'runs/tiny_128k': 'LongRecipe'}
    """
    rows = {}
    for label in models:
        row = WORDS.get(re.split("[_/]", label)[-1], "original")
        if label.endswith(("(new base)", "untrained")):
            row = "untrained"
        rows[label] = "LongRecipe" if row == "original" and row in rows.values() else row
    return rows


def entries_of(*found: dict) -> dict[tuple[str, bool, int], dict]:
    """(row, whether it is the loss, length) -> entry of the tables of needle_results.json files on
    the same texts. Controls (prompts without needles) are left out."""
    entries = {}
    for one in found:
        rows = rows_of(one["models"])
        for e in (e for e in one["table"] if e["model"] in rows):
            entries.setdefault((rows[e["model"]], e["task"] == "loss", e["length"]), e)
    return entries


# ---- regions -----------------------------------------------------------------------------------


def needle_table(*files: str) -> str:
    """Share of answers by length, a row a model; and the loss per token, if that was measured."""
    entries = entries_of(*map(read, files))
    columns = sorted({key[1:] for key in entries})  # (whether it is the loss, length)
    n = statistics.mode(e["n"] for (_, loss, _), e in entries.items() if not loss)
    lines = []
    for row in (row for row in ROWS if row in {key[0] for key in entries}):
        found = [(loss, entries.get((row, loss, length))) for loss, length in columns]
        cells = [f"{e['mean']:.3f}" if loss and e else share(e, n) for loss, e in found]
        lines.append([row, *cells])
    header = [f"loss at {n:,}" if loss else f"{n:,} tokens" for loss, n in columns]
    return table([f"n = {n} answers", *header], lines)


def main_table() -> str:
    """README's one table: the toy under theta x 4, under the paper's theta, and under yarn."""
    shown = {  # row of the study, its row with yarn -> row of the tables, and what README calls it
        ("untrained, old base",) * 2: ("original", "original model"),
        ("untrained", "untrained with yarn"): (
            "untrained",
            "original weights with RoPE scaled, **untrained**",
        ),
        ("none", "none with yarn"): (
            "plain positions",
            "trained, plain positions (`--method none`)",
        ),
        ("pose", "pose with yarn"): ("PoSE", "trained, one jump (`--method pose`)"),
        ("longrecipe", "yarn"): ("LongRecipe", "trained, **LongRecipe**"),
    }
    runs = STUDY.runs()
    rows, counts = [], [cell(runs["longrecipe"], 32_768)["n"]] * 2
    judged = [entries_of(read(file)) for file in (MORE_TEXTS, YARN)]
    counts += [entries["LongRecipe", False, 131_072]["n"] for entries in judged]
    for names, (row, label) in shown.items():
        found = [cell(runs[name], 32_768) if name in runs else None for name in names]
        found += [entries.get((row, False, 131_072)) for entries in judged]
        rows.append([label, *(share(e, n) for e, n in zip(found, counts, strict=True))])
    header = ["answers found, 95 % interval", "32,768 tokens, theta x 4", "32,768, yarn"]
    header += ["131,072, the paper's theta", "131,072, yarn"]
    return table(header, [*rows, ["n = answers a row", *map(str, counts)]])


def leads(file: str) -> dict[str, dict]:
    """Row -> by how much LongRecipe is above it at 131,072 tokens, on the texts of `file`."""
    found = read(file)
    pairs = [e for e in found["pairs"] if e["length"] == 131_072 and e["found"]["interval_95"]]
    return {rows_of(found["models"])[e["against"]]: e for e in pairs}


def nats_table(file: str) -> str:
    """Answers and nats of the toy at 8,192 and 131,072 tokens, and the leads of LongRecipe."""
    entries, above, rows = entries_of(read(file)), leads(file), []
    n = entries["LongRecipe", False, 131_072]["n"]
    for row in (row for row in ROWS if (row, False, 131_072) in entries):
        cells = {f"n = {n} answers": row}
        for length in (8192, 131_072):
            e = entries[row, False, length]
            cells |= {f"at {length:,}": share(e, n), f"nats at {length:,}": f"{e['nats']:.2f}"}
        cells["LongRecipe above it by"] = gain(above.get(row, {}).get("found"), 100, "+.0f")
        cells["in nats"] = gain(above.get(row, {}).get("nats"), 1, "+.2f")
        rows.append(cells)
    return cells_table(rows)


def tasks_table() -> str:
    """Variable tracking and common words, a row a task; hits, and nats an answer."""
    if not (found := read(TASKS).get("table")):
        return "Not run yet."
    lengths, n = sorted({e["length"] for e in found}), statistics.mode(e["n"] for e in found)
    rows = []
    for task in dict.fromkeys(e["task"] for e in found):
        cells = [f"{share(e, n)}; {e['nats']:.2f}" for e in found if e["task"] == task]
        rows.append([task.replace("_", " "), *cells])
    header = [f"n = {n} answers; nats an answer", *(f"{length:,} tokens" for length in lengths)]
    return table(header, rows)


def windows_table() -> str:
    """train.py and eval_needle.py with other --target_len (readme_runs.py default --target N)."""
    rows, shown = [], ("original", "untrained", "LongRecipe")
    for folder in sorted(RESULTS.glob("tiny_*k"), key=lambda f: int(f.name[5:-1])):
        run, found = (read(f"{folder.name}/{name}.json") for name in ("run", "needle_results"))
        entries, target = entries_of(found), run["settings"]["target_len"]
        cost = f"{run['seconds'] / 60:.1f} on {run['threads']} core(s), commit {run['commit']}"
        link = f"[{target:,}](../assets/results/{folder.name})"
        rows.append([link, *(share(entries[row, False, target]) for row in shown), cost])
    return table(["window", *shown, "minutes of training"], rows)


def plan_table() -> str:
    rows = []
    for name, r in read("plan_8b.json")["rows"].items():
        hours = [stage["seconds"] / 3600 for stage in r["stages"].values()]
        cells = [sum(r["bytes"][where].values()) / 1e9 for where in ("device", "host", "disk")]
        cells += [sum(hours[:3]), hours[3], r["seconds"] / 3600]
        rows.append([f"`{name}`", *(f"{x:.1f}" for x in cells)])
    header = ["39,424 tokens", "GPU, GB", "host, GB", "disk, GB", "hours: probe, analysis, extend"]
    return table([*header, "hours: replay (68M tokens)", "hours: all, with merge and saves"], rows)


REGIONS = {
    "main": main_table,
    "toy": lambda: needle_table(TOY),
    "more texts": lambda: nats_table(MORE_TEXTS),
    "yarn texts": lambda: nats_table(YARN),
    "windows": windows_table,
    "study": lambda: cells_table(study()),
    "real study": lambda: cells_table(REAL_STUDY.cells()),
    "real": lambda: needle_table(*REAL),
    "words": lambda: cells_table(word_classes.cells()),
    "tasks": tasks_table,
    "merge": lambda: cells_table([row for row in study() if row["setting"] in MERGES]),
    "plan": plan_table,
}

# ---- facts -------------------------------------------------------------------------------------

FORMATS = {
    "minutes": lambda seconds: f"{seconds / 60:.1f}",
    "hours": lambda seconds: f"{seconds / 3600:.1f}",
    "%": lambda share: f"{100 * share:.0f}",
    "percent": lambda share: f"{100 * share:.1f}",
    "text": str,
    "GB": lambda size: f"{size / 1e9:.1f}",
    "T": lambda rate: f"{rate / 1e12:.0f}",
    "GB in all": lambda parts: f"{sum(parts.values()) / 1e9:.1f}",
    "count": lambda items: f"{len(items)}",
}


def fact(name: str) -> str:
    """`FILE: KEY/KEY/..., FORMAT`, or a name of facts(). FORMAT: one of FORMATS, or as format()
    takes it. Raises KeyError if there is no such thing."""
    if ".json: " not in name:
        return facts()[name]
    file, _, rest = name.partition(": ")
    keys, _, how = rest.rpartition(", ")
    value = read(file)
    for key in keys.split("/"):
        value = value[int(key) if isinstance(value, list) else key]
    return FORMATS[how](value) if how in FORMATS else format(value, how)


def verdict(lead: dict) -> str:
    """Where LongRecipe is, compared with another row: "above" or "below" only if that holds with
    every seed of the training, of two or more. One word for FACT: its spaces do not break.

    >>> verdict({"verdict": "above", "by_seed": [0.5, 0.25]})
    'above'
    >>> verdict({"verdict": "above", "by_seed": [0.5, -0.25]})
    'not&nbsp;told&nbsp;apart&nbsp;from'
    """
    seeds = lead["by_seed"]
    sure = len(seeds) > 1 and (min(seeds) > 0 or max(seeds) < 0)
    if sure and lead["verdict"] in ("above", "below"):
        return lead["verdict"]
    return one_word("not told apart from")


HOW = {"scores": (100, "+.0f"), "found": (100, "+.0f"), "nats": (1, "+.2f")}  # see gain


def one_word(told: str) -> str:
    """For FACT: without round brackets, and with spaces that do not break."""
    return told.translate({ord("("): "[", ord(")"): "]", ord(" "): "&nbsp;"})


def overlap(a: dict, b: dict) -> str:
    (a_low, a_high), (b_low, b_high) = a["interval_95"], b["interval_95"]
    return "overlap" if a_low <= b_high and b_low <= a_high else "differ"


@functools.cache
def facts() -> dict[str, str]:
    """The facts that are worked out from more than one place of a result."""
    known, runs = {"toy judging": FORMATS["minutes"](judging_seconds())}, STUDY.runs()
    for name in STUDY.shown():
        known[f"study found {name}"] = FORMATS["%"](mean_of(texts_of(runs[name], STUDY.target)))
        for measure, field in (("", "scores"), (", nats", "nats")):
            if lead := STUDY.lead_over(name, field):
                known[f"study verdict {name}{measure}"] = verdict(lead)
                known[f"study lead {name}{measure}"] = one_word(gain(lead, *HOW[field]))
    boards = {
        "first": (32_768, read("first_run.json")["results"]),
        "toy": (131_072, read(TOY)),
        "real": (16_384, *map(read, REAL)),
    }
    for name, (target, *found) in boards.items():
        entries = entries_of(*found)
        ours = entries["LongRecipe", False, target]
        known[f"{name} n"] = str(ours["n"])
        for (row, loss, length), e in entries.items():
            if not loss and length == target:
                known[f"{name} {row}"] = FORMATS["%"](e["mean"])
                known[f"{name} verdict {row}"] = overlap(e, ours)
    for name, file in (("lead", MORE_TEXTS), ("yarn lead", YARN)):
        for row, lead in leads(file).items():
            for field in ("found", "nats"):
                known[f"{name} {row}, {field}"] = one_word(gain(lead[field], *HOW[field]))
    return known


def judging_seconds() -> float:
    """What eval_needle.py's defaults take for the toy at 131,072 tokens: the lengths and texts of
    today at the recorded seconds a text (the record has more of both)."""
    rows, taken = rows_of(read(TOY)["models"]), collections.defaultdict(list)
    for r in read_lines(RESULTS / "tiny_128k/needle.jsonl"):
        if r["task"] == "multiquery" and r["model"] in rows:
            taken[rows[r["model"]], r["length"]].append(r["seconds"])
    needle, total = read_json(ROOT / "assets/tiny/needle.json"), 0.0
    for row in ("original", "untrained", "LongRecipe"):
        for length in default_lengths([8192, 131_072]):
            texts = needle["n_beyond" if row == "original" and length > 8192 else "n"]
            total += texts * needle["needles"] * statistics.mean(taken[row, length])
    return total


# ---- writing -----------------------------------------------------------------------------------

REGION = re.compile(r"(<!-- begin (.*?) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
FACT = re.compile(r"([^\s(|>*]+)<!--(?! )(.*?)-->")


def render(text: str) -> str:
    """The page with its regions and facts made anew. Raises KeyError for one that is not known."""
    text = REGION.sub(lambda m: f"{m[1]}{REGIONS[m[2]]()}\n{m[3]}", text)
    return FACT.sub(lambda m: f"{fact(m[2])}<!--{m[2]}-->", text)


def main() -> None:
    for page in PAGES:
        page.write_text(render(page.read_text()))


if __name__ == "__main__":
    main()
