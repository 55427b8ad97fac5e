"""Do the tests see a wrong formula? Break each line under a tag [E..] and run the test that
docs/equations.md names for it: `python studies/mutate.py` (minutes; --tags E5 E6: some).

A mutant is one wrong text in place of a right one: a flipped sign, an off-by-one, a dropped factor.
It is killed if the named test fails, or else another test of the same file. The table goes to
assets/results/mutants.json. tests/test_docs.py checks that each tag has two mutants or more, that
their right text is under its tag, and that the table is of this list: so it fails when a line
changes, until this is run again.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import ROOT, read_json, write_json
from fresh_copy import environment, fresh_copy

from support.system.bad_input import BadInput
from support.system.console import log, progress, provenance

TABLE = ROOT / "assets" / "results" / "mutants.json"

MUTANTS = {  # tag -> file, and (right, wrong) for each mutant
    "E1": (
        "model.py",
        ("1.0 / theta ** (j / head_dim)", "1.0 * theta ** (j / head_dim)"),
        ("theta ** (j / head_dim)", "theta ** (2 * j / head_dim)"),
        (":, None].float() * inv_freq", ":, None].float().add(1) * inv_freq"),
        ("a * cos - b * sin", "a * cos + b * sin"),
        ("b * cos + a * sin", "b * cos - a * sin"),
    ),
    "E2": (
        "recipe.py",
        ("(1.0, extended), (-1.0, base)", "(-1.0, extended), (1.0, base)"),
        ("+= sign * score", "+= score"),
        ("delta[i + 1 : i + 1 + len(y)]", "delta[i : i + len(y)]"),
    ),
    "E3": (
        "recipe.py",
        ("delta[counted].double()", "delta[counted].double().abs()"),
        ("positions >= first_position", "positions > first_position"),
        ("counted[0] = False", "counted[0] = True"),
    ),
    "E4": (
        "recipe.py",
        ("torch.where(often, per_type_sum / count.clamp(min=1)", "torch.where(often, per_type_sum"),
        ("mean.argsort(descending=True", "mean.argsort(descending=False"),
        ("covered_before < top", "covered_before <= top"),
        ("cumsum(0) - count[order]", "cumsum(0)"),
        ("often = count >= max(1,", "often = count > max(1,"),
    ),
    "E5": (
        "support/data/segments.py",
        ("(latest(stop) > before_run) & space_next", "(latest(stop) > before_run) & ~space_next"),
        ("latest(wide) > before_run", "latest(wide) < before_run"),
        ('(char == ord("\\n")) | ', '(char == ord("\\n")) & '),
        ("searchsorted(token_begin, end_byte)", "searchsorted(token_begin, end_byte + 1)"),
    ),
    "E6": (
        "recipe.py",
        ("slots = 1 + torch", "slots = 2 + torch"),
        ("randperm(T - L + N - 1,", "randperm(T - L + N,"),
        ("slots)) - torch.arange(N)", "slots)) + torch.arange(N)"),
        ("torch.arange(L) + skipped", "torch.arange(L) + 1 + skipped"),
    ),
    "E7": (
        "support/data/other_methods.py",
        ("r, u = uniform(1, (L + 1) // 2, ", "r, u = uniform(0, T - L, "),
        ("r, u = uniform(1, (L + 1) // 2, ", "r, u = uniform(1, L // 2, "),
        ("uniform(0, T - L, generator)\n", "uniform(0, T - L - 1, generator)\n"),
        ("plain[r:] + u", "plain[r:] - u"),
    ),
    "E8": (
        "recipe.py",
        ("(head_dim / (head_dim - 2))", "((head_dim - 2) / head_dim)"),
        ("old_len - (f - 1))", "old_len + (f - 1))"),
        ("(f * new_len / old_len", "(new_len / old_len"),
    ),
    "E9": (
        "model.py",
        ("lse - logits.gather", "lse + logits.gather"),
        ("[:, 0] * valid).sum()", "[:, 0]).sum()"),
        ("index, -torch.ones_like(lse)", "index, torch.ones_like(lse)"),
    ),
    "E10": (
        "recipe.py",
        ("((1 - weight) * original", "(weight * original"),
        ("+ weight * tuned", "+ (1 - weight) * tuned"),
    ),
    "E11": (
        "eval_needle.py",
        ("bisect_right(p.places", "bisect_left(p.places"),
        ("d * room) - 1]", "d * room) - 2]"),
        ("d * room", "d * length"),
    ),
    "E12": (
        "support/memory/kernels.py",
        ("sigmoid(lse_a - lse_b)", "sigmoid(lse_b - lse_a)"),
        ("(1 - share) * b", "(1 + share) * b"),
        ("share * a + (1 - share)", "a + (1 - share)"),
    ),
    "E13": (
        "recipe.py",
        ("hits[starts + size] - hits[starts]", "hits[starts + size - 1] - hits[starts]"),
        ("hits[starts]).double() / size", "hits[starts]).double()"),
    ),
    "E14": (
        "recipe.py",
        ("randint(1, (L + 1) // 2 + 1, ", "randint(1, L // 2 + 1, "),
        ("positions[:r] = torch.arange(r)", "positions[: r - 1] = torch.arange(r - 1)"),
        ("positions[:r] = torch.arange(r)", "positions[:r] = torch.arange(r) + 1"),
    ),
    "E15": (
        "support/data/other_methods.py",
        ("torch.randperm(T, generator", "torch.randperm(T - 1, generator"),
        ("[:L].sort().values", "[:L]"),
    ),
    "E16": (
        "recipe.py",
        ("-(-target_len * 3 // 1280)", "(target_len * 3 // 1280)"),
        ("target_len * 3 //", "target_len * 4 //"),
        ("min(target_len, -(", "max(target_len, -("),
    ),
    "E17": (
        "train.py",
        ("loss = loss_sum / valid", "loss = loss_sum / int((targets != -100).sum())"),
        ("loss = loss_sum / valid", "loss = loss_sum / targets.numel()"),
        ("total += float(loss.detach())", "total = float(loss.detach())"),
    ),
    "E18": (
        "train.py",
        ("(1 - step / stage.steps)", "(1 + step / stage.steps)"),
        ("(first_step + step + 1)", "(first_step + step)"),
        ("min(1.0, (first", "max(1.0, (first"),
    ),
    "E19": (
        "eval_needle.py",
        ("for answer in expected) / len(expected)", "for answer in expected)"),
        ("fold(answer) in fold(output)", "answer in output"),
    ),
    "E20": (
        "support/needles/intervals.py",
        ("(p + z2 / (2 * n))", "(p - z2 / (2 * n))"),
        ("z2 / (4 * n * n)", "z2 / (2 * n * n)"),
        ("p * (1 - p) / n", "p * (1 + p) / n"),
    ),
    "E21": (
        "support/needles/intervals.py",
        ("return sum(means) / len(means)", "return sum(means)"),
        ("/ sum(map(len, clusters))", "/ len(clusters)"),
    ),
    "E22": (
        "support/needles/intervals.py",
        ("int(0.025 * draws)", "int(0.5 * draws)"),
        ("int(0.975 * draws)", "int(0.5 * draws)"),
        ("rng.choices(g, k=len(g))", "rng.sample(g, k=len(g))"),
    ),
    "E23": (
        "support/memory/count.py",
        ("return 6.0 * matmul_parameters", "return 2.0 * matmul_parameters"),
        ("* tokens + 6.0 * attention_flops", "* tokens - 6.0 * attention_flops"),
        ("training_flops(config, tokens) + 6.0", "training_flops(config, tokens) + 3.0"),
    ),
    "E24": (
        "support/needles/summary.py",
        ('["answer_logprob"] - control', '["answer_logprob"] + control'),
        ('control["answer_logprob"]) / len', 'control["answer_logprob"]) * len'),
    ),
    "E25": (
        "support/data/other_methods.py",
        ("positions[-END_TOKENS:] += T - L", "positions[-END_TOKENS:] += T"),
        ("positions[-END_TOKENS:] += T - L", "positions[END_TOKENS:] += T - L"),
        ("positions[-END_TOKENS:] += T - L", "positions[-END_TOKENS:] += T - L - 1"),
    ),
    "E26": (
        "support/data/other_methods.py",
        ("h = L // 3 if uniform(0, 1, generator) == 0 else", "h ="),
        ("min(4 * T // L, L // 3)", "min(4, L // 3)"),
        ("2 * T / L], dtype", "T / L], dtype"),
        ("mean, sigma = 1 + T / L,", "mean, sigma = T / L,"),
        ("u = below + (above - below) * torch", "u = torch"),
        ("int(a * L / 2)", "int(a * L)"),
        ("h + (m - 1) * W // L, W - h - 1", "h + m * W // L, W - h - 1"),
        ("h + (m - 1) * W // L, W - h - 1", "h + (m - 1) * W // L, T - h - 1"),
        ("positions[h : h + m] += last - (h + m - 1)", "positions[h : h + m] += last - (h + m)"),
        ("positions[h + m :] += T - L", "positions[h + m :] += T - L - 1"),
    ),
    "E27": (
        "support/huggingface/yarn.py",
        ("L0 / (2 * math.pi * turns)", "L0 / (math.pi * turns)"),
        ("/ (2 * math.log(theta))", "/ math.log(theta)"),
        ("return 1 - ((i - first)", "return 1 - ((i - last)"),
        ("((last - first) or 0.001)", "(last - first + 1)"),
    ),
    "E28": (
        "support/huggingface/yarn.py",
        ("return 1 + 0.1 * m", "return 1 - 0.1 * m"),
        ('max(1, scaling["factor"])', 'scaling["factor"]'),
        ('growth(scaling["mscale"]) / growth', 'growth(scaling["mscale"]) * growth'),
    ),
    "E29": (
        "recipe.py",
        ("start - kept[-1] >= min_tokens", "start - kept[-1] > min_tokens"),
        ("start - kept[-1] >=", "start - kept[0] >="),
        ("total_tokens - start >= min_tokens", "total_tokens - start > min_tokens"),
        (" and total_tokens - start >= min_tokens", ""),
    ),
}


# Lines of the training that hold no formula: each wrong text has to fail one of TRAIN_TESTS.
TRAIN_TESTS = [
    "tests/test_train.py::test_a_sample_is_drawn_from_seed_step_and_number_alone",
    "tests/test_train.py::test_every_setting_reaches_its_place",
]
LEVERS = "support/memory/activations.py"
TRAIN_MUTANTS = (
    ("train.py", "settings.seed * 1_000_003 + step +", "settings.seed * 1_000_003 +"),
    ("train.py", "analyse(original, extended, probe", "analyse(extended, original, probe"),
    ("train.py", '"first_position": settings.base_len', '"first_position": 0'),
    ("train.py", "settings.lr, settings.weight_decay", "settings.lr, 0.0"),
    ("train.py", "self.optimizer.step(lr, settings.clip,", "self.optimizer.step(lr, 1e9,"),
    ("train.py", "step - first, settings.warmup_steps, first)", "step - first, 0, first)"),
    (LEVERS, "model.activation_checkpointing = True", "model.activation_checkpointing = False"),
    (LEVERS, "model.keep_attention = settings.keep_attention", "model.keep_attention = False"),
    (LEVERS, "LayerInputsOnHost() if settings.offload_inputs else None", "None"),
    ("train.py", "return stage.lr * (1 - step / stage.steps)", "return stage.lr"),
    ("train.py", "trainer.train(replay, replay_corpus)", "trainer.train(replay, corpus)"),
    ("train.py", 'run.path / "merged", settings.merge_weight)', 'run.path / "merged", 0.5)'),
)


def mutate_train() -> None:
    """Break each line of TRAIN_MUTANTS. SystemExit if a wrong text is not noticed."""
    with tempfile.TemporaryDirectory() as folder:
        copy = fresh_copy(Path(folder) / "copy", models=True)
        if fails(copy, TRAIN_TESTS):
            raise SystemExit("error: the tests fail before anything is broken")
        survivors = 0
        for file, right, wrong in TRAIN_MUTANTS:
            line_of(file, right)
            who = killer(copy, file, right, wrong, TRAIN_TESTS)
            survivors += who is None
            print(f"{file}: {right!r} -> {wrong!r}: {who or 'SURVIVES'}", flush=True)
    raise SystemExit(1 if survivors else 0)


def named_tests() -> dict[str, list[str]]:
    """Tag -> the tests of its row in docs/equations.md, as pytest takes them."""
    page = (ROOT / "docs" / "equations.md").read_text()
    rows = re.findall(r"^\| \[(E\d+)\].*\|(.*)\|$", page, re.MULTILINE)
    named = {tag: re.findall(r"`(\w+\.py::\w+)`", cell) for tag, cell in rows}
    return {tag: [f"tests/{test}" for test in tests] for tag, tests in named.items()}


def line_of(file: str, right: str) -> str:
    """The whole line: the table is stale when anything in it changes."""
    text = (ROOT / file).read_text()
    if text.count(right) != 1:
        raise BadInput(f"{file} must hold {right!r} once: mend MUTANTS")
    begin = text.index(right)
    return text[text.rfind("\n", 0, begin) + 1 : text.index("\n", begin)].strip()


def fails(folder: Path, tests: list[str]) -> bool:
    """Run pytest on them in the copy. RuntimeError if it did not get as far as running them."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    run = subprocess.run(
        command, check=False, cwd=folder, env=environment(), capture_output=True, text=True
    )
    if run.returncode not in (0, 1):
        raise RuntimeError(f"pytest {' '.join(tests)}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 1


def killer(folder: Path, file: str, right: str, wrong: str, tests: list[str]) -> str | None:
    """The tests that fail with the wrong text: those named, or else their files. None: no test."""
    path = folder / file
    text = path.read_text()
    path.write_text(text.replace(right, wrong))
    try:
        files = sorted({test.split("::")[0] for test in tests})
        for candidates in (tests, files):
            if fails(folder, candidates):
                return " or ".join(candidates).replace("tests/", "")
        return None
    finally:
        path.write_text(text)


def main() -> None:
    p = argparse.ArgumentParser(description="Break each tagged line; do the tests notice?")
    p.add_argument("--tags", nargs="+", choices=MUTANTS, default=list(MUTANTS), metavar="E1")
    p.add_argument("--train", action="store_true", help="the lines of TRAIN_MUTANTS instead")
    args, started, tests = p.parse_args(), time.time(), named_tests()
    if args.train:
        mutate_train()
    known = read_json(TABLE).get("mutants", [])
    rows = [row for row in known if row["tag"] in MUTANTS and row["tag"] not in args.tags]
    work = [(t, MUTANTS[t][0], *pair) for t in args.tags for pair in MUTANTS[t][1:]]
    lines = [line_of(file, right) for _, file, right, _ in work]  # before anything is run
    with tempfile.TemporaryDirectory() as folder:
        copy = fresh_copy(Path(folder) / "copy", models=True)
        if fails(copy, sorted({test for tag in args.tags for test in tests[tag]})):
            raise SystemExit("error: the tests fail before anything is broken")
        bar = progress(zip(lines, work, strict=True), "mutants", total=len(work), unit="mutant")
        for line, (tag, file, right, wrong) in bar:
            who = killer(copy, file, right, wrong, tests[tag])
            log(f"[{tag}] {right!r} -> {wrong!r}: {who or 'SURVIVES'}")
            row = {"tag": tag, "file": file, "line": line, "right": right, "wrong": wrong}
            rows.append(row | {"killed_by": who})
    rows.sort(key=lambda row: int(row["tag"][1:]))
    found = {"mutants": rows, "run": provenance(started) | {"tags": args.tags}}
    write_json(TABLE, found, indent=1)
    survivors = [row for row in rows if row["killed_by"] is None]
    print(f"{len(rows)} mutants of {len(MUTANTS)} formulas, {len(survivors)} survive: {TABLE.name}")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
