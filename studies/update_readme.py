"""Write README's numbers from the JSON files of the code: `python studies/update_readme.py`.

A region is what stands between `<!-- begin NAME -->` and `<!-- end NAME -->`.
tests/test_readme.py fails when a region is stale. A result that has no JSON says "not run".
"""

import ast
import json
import statistics
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tiny_study import SETTINGS, lead  # noqa: E402

import train  # noqa: E402
from model import LlamaConfig  # noqa: E402
from support.memory import count as budget  # noqa: E402
from support.memory import table as plan  # noqa: E402
from support.needles.intervals import clustered  # noqa: E402
from support.system.bad_input import BadInput  # noqa: E402

RESULTS = ROOT / "assets" / "results"
RUN, TINY = RESULTS / "smollm2_16k", RESULTS / "tiny_128k"
REAL = ("niah_single", 16_384)  # the task and length by which the real run is judged


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


def entry(table: list[dict], model: str, task: str, length: int) -> dict | None:
    wanted = (model, task, length)
    return next((e for e in table if (e["model"], e["task"], e["length"]) == wanted), None)


def cell(table: list[dict], model: str, task: str, length: int) -> str:
    e = entry(table, model, task, length)
    if e is None:
        return "not run"
    if task == "loss":
        return f"{e['mean']:.3f}"
    low, high = e["interval_95"]
    return f"{e['mean']:.0%} ({low:.0%}-{high:.0%})"


def beyond(better: dict, worse: dict) -> bool:
    """The one is above the other by more than both intervals allow."""
    return better["interval_95"][0] > worse["interval_95"][1]


def claims() -> str:
    """What the paper claims, and how much of it has been shown here."""
    toy, run = (read(TINY / f) for f in ("needle_results.json", "run.json"))
    rows, plans = read(RUN / "rows" / "needle_results.json"), read(RESULTS / "plan_8b.json")
    target = run["settings"]["target_len"]
    labels_of = {plain_name(m): m for m in rows["models"]}
    names = ("longrecipe (merged)", "base with the new RoPE base, untrained")
    real = [entry(rows["table"], labels_of[name], *REAL) for name in names]
    labels = list(toy["models"])
    tiny = [entry(toy["table"], m, "multiquery", target) for m in (labels[-1], labels[1])]
    others = [
        (f"`--method {m.rpartition('_')[2]}`", entry(toy["table"], m, "multiquery", target))
        for m in labels[2:-1]
    ]
    control = entry(rows["table"], labels_of["--method none, same tokens (merged)"], *REAL)
    size = sum(budget.parameters(LlamaConfig.from_dir(ROOT / train.TOY["model"]))) / 1e6

    def share(e: dict) -> str:
        low, high = e["interval_95"]
        return f"{e['mean']:.0%} ({low:.0%}-{high:.0%}, n = {e['n']})"

    def shown(what: str, ours: dict, other: dict, run: dict, more: str = "", seeds: int = 1) -> str:
        apart = beyond(ours, other)
        verdict = "A gain: the intervals do not" if apart else "No gain shown: the intervals"
        return (
            f"| | {what}: {share(ours)}; untrained under the same RoPE base: {share(other)}."
            f" **{verdict} overlap.**{more}"
            f" ({seeds} training seed(s); {run['threads']} core(s) of {run['hardware']}) |"
        )

    study_of = read(RESULTS / "tiny_study_32768.json")
    linear = [studied(study_of["runs"][name], "32768") for name in ("longrecipe", "untrained")]
    leads = leads_of(study_of["runs"], 32_768)
    leads = {k: e for k, e in leads.items() if ", " not in k and k != "untrained"}
    papers = studied(study_of["runs"]["untrained, paper's base"], "32768")
    groups = verdicts(leads)
    above = groups.pop("above", [])
    told = "".join(f"; {word} {', '.join(names)}" for word, names in sorted(groups.items()))
    chosen = plans["rows"][plans["chosen"]]
    saved = [1 - a / b for a, b in chosen["one_sample"].values()]
    training = read(RUN / "longrecipe" / "run.json")

    def not_below(result: dict, others: list[tuple[str, dict]]) -> str:
        level = [f"{name}, {share(e)}" for name, e in others if not beyond(result, e)]
        return f" None is shown against {'; '.join(level)}." if level else ""

    return "\n".join(
        [
            "| the paper claims | shown here |",
            "|---|---|",
            "| samples of 30 % of the target are enough: Llama-3-8B at 128k, NIAH(M) 82.6 | on"
            " small models: |",
            shown(
                f"a toy of {size:.1f} M parameters at {target:,}, the paper's RoPE base",
                *tiny,
                run,
                not_below(tiny[0], others),
            ),
            shown(
                "the same at 32,768, RoPE base x 4",
                *linear,
                study_of,
                " But untrained under the paper's RoPE base the old weights find"
                f" {share(papers)}."
                f" Haystack by haystack it is above {len(above)} of {len(leads)} [other settings]"
                f"(#the-toy){told}.",
                len(study_of["runs"]["longrecipe"]),
            ),
            shown(
                "SmolLM2-135M at 16,384, the paper's RoPE base",
                *real,
                training,
                not_below(real[0], [("`--method none`", control)]),
            ),
            "| over 85 % less compute | counted, not measured:"
            f" {min(saved):.1%} to {max(saved):.1%}, depending on how FLOPs are counted |",
            "| 8k to 128k in one day on one 80 GB GPU (though its table 4 lists 104 GB on two for"
            " Llama-3-8B) | **not run**: no GPU so far;"
            f" {chosen['seconds'] / 3600:.0f} hours at an assumed speed |",
            "| RULER 76.0 at 128k | a needle test with its structure; RULER itself **not run**:"
            " `lm_eval --model hf --model_args pretrained=out,max_length=131072 --tasks ruler"
            """ --metadata '{"max_seq_lengths": [131072]}'` |""",
            "| general skill kept (at 80k: MMLU 65.7 to 63.0, GSM8K 71.4 to 57.9, HumanEval 37.5 to"
            " 29.3) | **not run**: `lm_eval --model hf --model_args pretrained=out --tasks"
            " mmlu,gsm8k,humaneval --confirm_run_unsafe_code` |",
            "| close to GPT-4 | **not tested** |",
        ]
    )


def files() -> str:
    lines = ["| read in this order | lines | its first line |", "|---|---|---|"]
    for name in ("model.py", "recipe.py", "train.py", "eval_needle.py"):
        text = (ROOT / name).read_text()
        first = ast.get_docstring(ast.parse(text)).splitlines()[0]
        lines.append(f"| `{name}` | {text.count(chr(10))} | {first} |")
    notes = {
        "support": "`toy.py`, `results.py`, `budget.py` hold parts of the story; file formats,"
        " optimizer, run state, figures: skip them",
        "tests": "one file per source file",
        "studies": "what makes a number, a figure or a model of this repository",
        "examples": "fetching a model and texts, FSDP, the answers of the exercises",
    }
    for folder, note in notes.items():
        paths = sorted((ROOT / folder).rglob("*.py"))
        total = round(sum(p.read_text().count("\n") for p in paths), -2)  # to a hundred: less churn
        lines.append(f"| `{folder}/` | about {total:,} in {len(paths)} files | {note} |")
    return "\n".join(lines)


def mutants() -> str:
    found = read(RESULTS / "mutants.json")
    if not found:
        return "Not run yet: `python studies/mutate.py`."
    rows = found["mutants"]
    named = sum("::" in (row["killed_by"] or "") for row in rows)
    alive = [row for row in rows if row["killed_by"] is None]
    return (
        "Does the test see a wrong formula? `python studies/mutate.py` breaks the lines under these"
        f" tags in {len(rows)} ways (a flipped sign, an off-by-one, a dropped factor): {named} fail"
        f" the test named here, {len(rows) - named - len(alive)} another one of its file,"
        f" {len(alive)} none ([JSON](assets/results/mutants.json))."
    )


def tiny() -> str:
    found, run = (read(TINY / f) for f in ("needle_results.json", "run.json"))
    if not found:
        return "Not run yet: `python studies/tiny_study.py --default`."
    lengths = sorted({e["length"] for e in found["table"]})
    lines = [
        "| 8 keys, 8 questions | " + " | ".join(f"{n:,}" for n in lengths) + " |",
        "|---" * (len(lengths) + 1) + "|",
    ]
    models = list(found["models"])
    names = ["base, window 8,192", "base with the new RoPE base, untrained", "**after train.py**"]
    names[2:2] = [f"`--method {label.rpartition('_')[2]}`" for label in models[2:-1]]
    for label, name in zip(models, names, strict=True):
        cells = [cell(found["table"], label, "multiquery", n) for n in lengths]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    s, target = run["settings"], lengths[-1]
    models = (models[0], models[1], models[-1])
    base, control, result = (entry(found["table"], m, "multiquery", target) for m in models)
    read_loss = read(TINY / "loss_results.json")["table"]
    old = s["base_len"]
    losses = {m: [entry(read_loss, m, "loss", n)["mean"] for n in (old, target)] for m in models}
    losses = [" / ".join(f"{x:.2f}" for x in losses[m]) for m in models]
    adds = "do not overlap" if beyond(result, control) else "overlap: no gain is shown"
    lines += [
        "",
        f"At {target:,} tokens the base finds {base['mean']:.0%} of the pairs, its weights under"
        f" the new RoPE base (10,000 x {s['rope_base'] / 10_000:.0f}) {control['mean']:.0%}, the"
        f" result of training {result['mean']:.0%}; the intervals of the last two {adds}."
        f" Loss, nats per token in one text of {old:,} / {target:,} tokens: base {losses[0]},"
        f" untrained {losses[1]}, result {losses[2]}"
        " ([by position](assets/results/tiny_128k/curves.png)).",
    ]
    if len(found["models"]) > 3:
        lines[-1] += " The other methods had the same tokens; only their position ids differ."
    chosen = read(TINY / "selection.json")
    lines += [
        "",
        f"Selection kept {chosen['questions_kept']:.0%} of the questions that the training texts"
        f" hold, and of those {chosen['their_pair_kept']:.0%} with the pair they ask for (8"
        " samples).",
    ]
    rows = [json.loads(line) for line in (TINY / "needle.jsonl").read_text().splitlines()]
    shown = [r for r in rows if r["task"] == "multiquery" and r["model"] in (models[0], models[2])]
    eval_seconds = sum(r["seconds"] for r in shown)
    base, control, result = (
        ", ".join(str(e["haystacks"]) for e in found["table"] if e["model"] == label)
        for label in models
    )
    lines += [
        "",
        f"`train.py`: {run['seconds'] / 60:.1f} minutes, peak {run['peak_GiB']:.1f} GiB"
        f" ({s['steps']} samples of {s['train_len']:,} tokens, {s['replay_steps']} of"
        f" {s['replay_len']:,} for the replay, {s['dtype']}); `eval_needle.py`:"
        f" {eval_seconds / 60:.1f} minutes, the sum of its rows (the control's, `--controls`, left"
        " out);"
        f" {run['threads']} cores of {run['hardware']}, commit {run['commit']};"
        " [JSON](assets/results/tiny_128k). Haystacks per length:"
        f" {base} (base), {control} (control), {result} (result);"
        " 8 questions each, answered from one prefill; intervals draw whole haystacks again"
        " and are never narrower than Wilson's. Chance among the 8 values is 12.5 %.",
    ]
    lines += other_windows()
    made, judged = (
        read(ROOT / "assets/tiny/training.json"),
        read(RESULTS / "tiny/needle_results.json"),
    )
    score = judged["table"][0]
    lines += [
        "",
        "The tiny model was trained by this project from random weights"
        " (`python studies/make_tiny.py`, with requirements-dev.txt,"
        f" {made['training_seconds'] / 60:.0f} minutes on"
        f" {made['threads']} cores of"
        f" {made['hardware']}):"
        f" {score['mean']:.0%} of eight keys at {score['length']:,} tokens (n = {score['n']},"
        " [JSON](assets/results/tiny/needle_results.json)).",
    ]
    return "\n".join(lines)


def other_windows() -> list[str]:
    """A line for each other --target_len that was run (tiny_study.py --default --target N)."""
    lines = []
    for folder in sorted(RESULTS.glob("tiny_*k")):
        if folder != TINY:
            found, run = (read(folder / f) for f in ("needle_results.json", "run.json"))
            target = run["settings"]["target_len"]
            labels = list(found["models"])
            models = (labels[0], labels[1], labels[-1])
            cells = [cell(found["table"], m, "multiquery", target) for m in models]
            lines += [
                "",
                f"`--target_len {target}`, at {target:,} tokens: base {cells[0]}, untrained under"
                f" the new base {cells[1]}, after `train.py` {cells[2]};"
                f" {run['seconds'] / 60:.1f} minutes on {run['threads']} core(s), commit"
                f" {run['commit']}, [JSON](assets/results/{folder.name}).",
            ]
    return lines


def studied(seeds: dict, length: str) -> dict:
    """One cell of the study: all haystacks of all seeds."""
    clusters = [c for one in seeds.values() for c in one["scores"][length]]
    scores = [score for c in clusters for score in c]
    mean = sum(scores) / len(scores)
    return {"mean": mean, "interval_95": clustered(clusters), "n": len(scores)}


def study(target: int) -> str:
    found = read(RESULTS / f"tiny_study_{target}.json")
    if not found:
        return f"Not run yet: `python studies/tiny_study.py --target {target}`."
    runs = found["runs"]
    lines = [
        "| setting | steps | questions kept | with their pair | loss above the base's | at 8,192 |"
        f" at {target:,} | by seed | longrecipe above it by |",
        "|---" * 9 + "|",
    ]
    leads = leads_of(runs, target)
    for name in (name for name in SETTINGS if name in runs):
        cells = row_of_study(runs[name], runs.get("untrained, old base", {}), target)
        if name in leads:
            e = leads[name]
            mean, low, high = (100 * x for x in (e["mean"], *e["interval_95"]))
            cells.append(f"{mean:+.0f} ({low:+.0f} to {high:+.0f})")
        else:
            cells.append("")
        lines.append(f"| {' | '.join([name, *cells])} |")
    for base in dict.fromkeys(name.partition(", ")[2] for name in leads):
        groups = verdicts({n: e for n, e in leads.items() if n.partition(", ")[2] == base})
        told = [f"{word} {', '.join(names)}" for word, names in sorted(groups.items())]
        where = f"Under the {base.replace('base', 'RoPE base')}" if base else "Haystack by haystack"
        lines += ["", f"{where}, longrecipe at {target:,} tokens is {'; '.join(told)}."]
    lines += [
        "",
        "Questions kept: by selection, of those that the texts of 8 samples hold; with their pair:"
        " of the kept ones. Loss: nats per token in texts of 8,192 tokens less the base's in the"
        " same. At a length: share of questions"
        f" answered: {found['haystacks']} haystacks x 8 questions per length and seed;"
        f" {found['steps']} steps of 30 % of the target, or as many tokens; interval: whole"
        " haystacks drawn again, never narrower than Wilson's. Last column: against longrecipe"
        " under the same RoPE base, percentage points on the same haystacks (95 % interval of their"
        " differences, Student's t); the haystacks are cut from one text and overlap; what"
        " training owes to chance shows by seed alone."
        f" {found['threads']} core(s) of {found['hardware']},"
        f" [JSON](assets/results/tiny_study_{target}.json).",
    ]
    return "\n".join(lines)


def leads_of(runs: dict, target: int) -> dict[str, dict]:
    """setting -> by how much longrecipe under the same RoPE base is above it."""
    found = {}
    for name in (name for name in SETTINGS if name in runs):
        ours = runs.get("longrecipe" + "".join(name.partition(",")[1:]), {})
        if not name.startswith("longrecipe") and ours.keys() & runs[name].keys():
            found[name] = lead(ours, runs[name], target)
    return found


def verdicts(leads: dict[str, dict]) -> dict[str, list[str]]:
    """Where the intervals of the leads are -> the settings."""
    groups: dict[str, list[str]] = {}
    for name, e in leads.items():
        low, high = e["interval_95"]
        word = "above" if low > 0 else "below" if high < 0 else "not told apart from"
        if low > 0 and (len(e["by_seed"]) < 2 or min(e["by_seed"]) <= 0):
            word = "above on average, but with one seed only or not with each,"
        groups.setdefault(word, []).append(f"`{name}`")
    return groups


def row_of_study(seeds: dict, base: dict, target: int) -> list[str]:
    """The cells of one setting, from its rows and those of the base as it is (seed -> row)."""
    kept = loss = steps = ""
    if "recipe" in next(iter(seeds.values())):
        steps = str(next(iter(seeds.values()))["recipe"]["steps"])
    if "questions_kept" in next(iter(seeds.values())):
        means = [
            statistics.mean(s[k] for s in seeds.values())
            for k in ("questions_kept", "their_pair_kept")
        ]
        kept = " | ".join(f"{x:.0%}" for x in means[: 1 if means[0] == 0 else 2])
        kept += " | " * (means[0] == 0)  # of no questions none has its pair
    above = [
        statistics.mean(one["losses"]) - statistics.mean(base[seed]["losses"])
        for seed, one in seeds.items()
        if "losses" in one and "losses" in base.get(seed, {})
    ]
    if above:
        loss = f"{statistics.mean(above):+.3f}"
    found = [studied(seeds, length) for length in ("8192", str(target))]
    cells = ["{:.0%} ({:.0%}-{:.0%})".format(e["mean"], *e["interval_95"]) for e in found]
    single = [studied({k: seeds[k]}, str(target))["mean"] for k in sorted(seeds)]
    return [steps, kept or " | ", loss, *cells, ", ".join(f"{100 * x:.0f}" for x in single)]


def results() -> str:
    rows, stages = (
        read(RUN / "rows" / "needle_results.json"),
        read(RUN / "stages" / "needle_results.json"),
    )
    if not rows:
        return "Not run yet: `python studies/real_run.py`."
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
    lines += ["", what_the_results_say(rows["table"], {plain_name(m): m for m in rows["models"]})]
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


def what_the_results_say(table: list[dict], labels: dict[str, str]) -> str:
    """README's sentences about the table of SmolLM2, with its numbers."""
    base, bare, none, ours = (
        labels[name]
        for name in (
            "base",
            "base with the new RoPE base, untrained",
            "--method none, same tokens (merged)",
            "longrecipe (merged)",
        )
    )

    def found(model: str, length: int) -> str:
        e = entry(table, model, "niah_single", length)
        return f"{round(e['mean'] * e['n'])} of {e['n']}"

    def loss(model: str, length: int) -> float:
        return entry(table, model, "loss", length)["mean"]

    at_16k = {m: entry(table, m, "niah_single", 16_384) for m in labels.values()}
    apart = [beyond(at_16k[ours], at_16k[m]) for m in (bare, none)]
    verdict = {
        (False, False): "all three intervals overlap, n is too small to tell them apart",
        (True, True): "its interval overlaps with neither of the two",
    }.get(tuple(apart), "its interval overlaps with one of the two")
    gaps = [loss(ours, n) - loss(none, n) for n in (2048, 8192, 16_384)]
    return (
        f"What the table says: the base finds {found(base, 16_384)} needles at 16k, and"
        f" {found(base, 8192)} at the end of its own window. The new RoPE base alone takes the loss"
        f" at 16k from {loss(base, 16_384):.2f} to {loss(bare, 16_384):.2f}, but finds only"
        f" {found(bare, 16_384)} there and {found(bare, 8192)} at 8k; after training it is"
        f" {found(ours, 8192)} at 8k, and the loss at 2k has moved by"
        f" {loss(ours, 2048) - loss(base, 2048):+.3f} nat. What it does not say: at"
        f" 16k longrecipe finds {found(ours, 16_384)}, the untrained weights"
        f" {found(bare, 16_384)} and `--method none` (the same tokens at plain positions)"
        f" {found(none, 16_384)}: {verdict}; and the loss of longrecipe less that of `none` is"
        f" {min(gaps):+.2f} to {max(gaps):+.2f} nat."
    )


def cost() -> str:
    found = read(RESULTS / "cost.json")
    if not found:
        return "Not run yet: `python studies/bench_cost.py`."
    s, seconds, median = found["settings"], found["all_seconds"], found["median"]
    ours, theirs = median["ours"], median["transformers"]
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["transformers"], strict=True)]
    low, high = min(ratios), max(ratios)
    return (
        f"One training step of SmolLM2-135M on {int(s['tokens']):,} tokens in {s['dtype']}, ours"
        f" and that of transformers in turns within one run: {ours['seconds']:.1f} s against"
        f" {theirs['seconds']:.1f} (ratio {found['time_ratio']:.2f}, {low:.2f}-{high:.2f} in"
        f" {s['steps']} pairs); peak {ours['peak_GiB']:.2f} GiB against {theirs['peak_GiB']:.2f},"
        f" of which {ours['above_state_GiB']:.2f} against {theirs['above_state_GiB']:.2f} above"
        f" weights, gradients and optimizer state (ratio {found['memory_ratio']:.2f};"
        f" [how measured](LOG.md#memory-is-harder)); {found['threads']} cores of"
        f" {found['hardware']}, [JSON](assets/results/cost.json), `python studies/bench_cost.py`."
    )


def judge() -> str:
    found = read(RESULTS / "eval_cost.json")
    if not found:
        return "Against `transformers.generate`: not measured yet (`python studies/bench_eval.py`)."
    seconds, peak, s = found["seconds_of_all_rows"], found["peak_GiB_of"], found["settings"]
    return (
        f"Against `transformers.generate` on the same {found['answers']} prompts"
        f" ({len(s['lengths'])} lengths to {max(s['lengths']):,} x {len(s['depths'])} depths,"
        f" {s['model']}, {found['dtype']}), in turns: {seconds['ours']:.0f} seconds and"
        f" {peak['ours']:.1f} GiB against {seconds['transformers']:.0f} and"
        f" {peak['transformers']:.1f}, ratio {found['ratio']:.2f},"
        f" {found['answers_equal']} of {found['answers']} answers equal; {found['threads']} cores"
        f" of {found['hardware']}, commit {found['commit']},"
        " [JSON](assets/results/eval_cost.json), `python studies/bench_eval.py`."
    )


def smallest() -> str:
    found = read(RESULTS / "smallest_run.json")
    if not found:
        return "Not measured yet: `python studies/real_run.py --smallest`."
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
        return "Not made yet: `python studies/make_plans.py`."
    rows = found["rows"]
    lines = [
        "| 39,424 tokens | GPU, GB | host, GB | disk, GB | hours: probe, analysis, extend"
        " | hours: replay (68M tokens) | hours: all, with merge and saves | measured on a GPU |",
        "|---" * 8 + "|",
    ]
    for name, r in rows.items():
        hours = [stage["seconds"] / 3600 for stage in r["stages"].values()]
        cells = [sum(r["bytes"][where].values()) / 1e9 for where in ("device", "host", "disk")]
        cells += [sum(hours[:3]), hours[3], r["seconds"] / 3600]
        lines.append(f"| `{name}` | " + " | ".join(f"{x:.1f}" for x in cells) + " | not run |")
    chosen = rows[found["chosen"]]
    saved = {k: 1 - a / b for k, (a, b) in chosen["one_sample"].items()}
    rate, disk = chosen["rate"], sum(found["disk_without_saves"].values()) / 1e9
    lines += [
        "",
        f"Chosen for an H100 with 80 GB: `{found['chosen']}`. Bytes and FLOPs are counted, speed is"
        f" not measured: {rate['flops_per_s'] / 1e12:.0f} TFLOP/s, {rate['from']}. With"
        f" `--no_saves`, {disk:.1f} GB of disk are enough, and a run that was stopped cannot go on."
        f" What {chosen['lengths'][0]:,} tokens save against {chosen['lengths'][1]:,}: "
        + ", ".join(f"{v:.1%} ({k})" for k, v in saved.items())
        + f". {full_length(chosen)} [JSON](assets/results/plan_8b.json).",
    ]
    return "\n".join(lines)


def full_length(chosen: dict) -> str:
    """The same run on whole samples, with the levers that it would be given."""
    full, there = chosen["full_length"], chosen["there"]["device"]
    ours, theirs = (
        [plan.extension_s(p["stages"]) / 3600, p["seconds"] / 3600] for p in (chosen, full)
    )
    less = [1 - a / b for a, b in zip(ours, theirs, strict=True)]
    device = sum(full["bytes"]["device"].values())
    needed = f"{device / 1e9:.1f} GB of the GPU, which fits"
    if device > there:
        needed = f"at least {device / 1e9:.1f} GB of the GPU, which has {there / 1e9:.0f}"
    return (
        "In hours: `--method full` with the same steps and samples, and the levers it would be"
        f" given (`{plan.as_flags(full['levers'])}`: {needed}),"
        f" takes {theirs[0]:.0f} for probe, analysis and extension, {theirs[1]:.0f} in all; against"
        f" these the chosen row saves {less[0]:.1%} and {less[1]:.1%}."
    )


def state_8b() -> str:
    """What does not fit, before the first sample."""
    row = read(RESULTS / "plan_8b.json")["rows"]["adamw --keep_attention"]
    there = row["there"]["device"]
    state = sum(row["bytes"]["device"][k] for k in ("weights", "gradients", "optimizer"))
    return (
        f"Weights, fp32 gradients and AdamW's state of Llama-3-8B take {state / 1e9:.0f} GB,"
        f" {state / there:.1f} times what such a GPU holds, before the first sample."
    )


def adamw_8bit() -> str:
    found = read(RESULTS / "adamw_8bit.json")
    if not found:
        return "`adamw-8bit` on a real model: not run."
    band, eight, masters = found["band"], found["gaps"]["adamw-8bit"], found["gaps"]["adamw"]
    run, curves = found["runs"]["adamw-8bit"], found["loss"]
    pairs = zip(curves["adamw-8bit"], curves["adamw"], strict=True)
    first = max(abs(a - b) for a, b in pairs)  # what the band was stated against, see LOG.md
    verdict = "missed" if first > band["any_step"] else "met"
    return (
        "SmolLM2-135M in bfloat16 beside the same in fp32,"
        f" {len(curves['adamw'])} steps of two samples of 1,024 tokens: with `adamw-8bit`"
        f" the losses of a step differ by at most {eight['any_step']:.3f} nat (band:"
        f" {band['any_step']}), those of the last ten by {eight['mean_of_last_10']:.3f} on average"
        f" (band: {band['mean_of_last_10']}; first stated against `adamw` in bf16, and {verdict}"
        f" there: {first:.3f} at one step), while the fp32 loss fell by"
        f" {found['fell']['adamw-fp32']:.2f}; with `adamw` (fp32 masters) by at most"
        f" {masters['any_step']:.3f} and {masters['mean_of_last_10']:.3f}: rounded from masters,"
        f" bf16 weights [lag behind at first](LOG.md#bf16-lags). {run['threads']} core(s) of"
        f" {run['hardware']}, [JSON](assets/results/adamw_8bit.json),"
        " `python studies/optimizer_run.py`."
    )


def cost_by_length() -> str:
    found = read(RESULTS / "cost_by_length.json")
    if not found:
        return "Cost against length: not run (`python studies/bench_cost.py --lengths`)."
    shown = ", ".join(f"{float(v):.2f} at {int(k):,}" for k, v in found["ratio_by_length"].items())
    return (
        f"By length, ours over transformers in seconds a step, in turns: {shown} tokens"
        f" ({found['dtype']}, {found['threads']} cores of {found['hardware']}, nothing beside;"
        " medians of one or two pairs of steps, [LOG.md](LOG.md#time-against-length);"
        " [JSON](assets/results/cost_by_length.json), [figure](assets/results/cost_by_length.png))."
    )


def fsdp() -> str:
    found = read(RESULTS / "fsdp.json")
    if found is None:
        return "Not run yet: `python examples/fsdp_run.py`."
    gaps, (low, high) = found["largest_difference_nats"], found["tolerance_nats"]
    steps, processes = len(found["loss"]["FSDP"]), found["processes"]
    return (
        f"Measured with the embedded model in {processes} CPU processes over gloo, each holding"
        f" {found['share_of_the_weights_per_process']:.0%} of the weights: over {steps} steps of"
        " probe, extension and replay the loss is never more than"
        f" {gaps['FSDP']:.1e} nat from that of `train.py` in one process (rounding in fp32 explains"
        f" {low:.1e} to {high:.1e}; each batch in reverse order moves `train.py` itself by"
        f" {gaps['train.py, batch reversed']:.1e}). Without the all-ones mask it is off by up to"
        f" {gaps['FSDP without a mask']:.2f} nat. transformers {found['transformers']}, accelerate"
        f" {found['accelerate']}, {found['hardware']}, commit {found['commit']},"
        " [JSON](assets/results/fsdp.json), `python examples/fsdp_run.py`."
    )


REGIONS = {
    "claims": claims,
    "files": files,
    "mutants": mutants,
    "fsdp": fsdp,
    "state": state_8b,
    "plan": plan_8b,
    "tiny": tiny,
    "study 32768": lambda: study(32_768),
    "results": results,
    "smallest": smallest,
    "costs": lambda: "\n".join(f"- {make()}" for make in (cost, cost_by_length, adamw_8bit)),
    "eval": judge,
}


def render(text: str) -> str:
    for name, make in REGIONS.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        if text.count(begin) != 1 or text.count(end) != 1:
            raise BadInput(f"README needs the region {name!r} exactly once")
        before, rest = text.split(begin)
        text = f"{before}{begin}{make()}\n{end}{rest.split(end)[1]}"
    return text


def main() -> None:
    path = ROOT / "README.md"
    path.write_text(render(path.read_text()))


if __name__ == "__main__":
    main()
