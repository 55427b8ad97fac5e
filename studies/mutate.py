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

MUTANTS = [  # tag, right text (once in the file that docs/equations.md names), wrong text
    ("E1", "1.0 / theta ** (2 * j / head_dim)", "1.0 * theta ** (2 * j / head_dim)"),
    ("E1", "theta ** (2 * j / head_dim)", "theta ** (j / head_dim)"),
    ("E1", ":, None].float() * inv_freq", ":, None].float().add(1) * inv_freq"),
    ("E1", "a * cos - b * sin", "a * cos + b * sin"),
    ("E1", "b * cos + a * sin", "b * cos - a * sin"),
    ("E2", "(1.0, extended), (-1.0, base)", "(-1.0, extended), (1.0, base)"),
    ("E2", "+= sign * score", "+= score"),
    ("E2", "delta[i + 1 : i + 1 + len(y)]", "delta[i : i + len(y)]"),
    ("E3", "delta[counted].double()", "delta[counted].double().abs()"),
    ("E3", "positions >= first_position", "positions > first_position"),
    ("E3", "counted[0] = False", "counted[0] = True"),
    ("E4", "often, per_type_sum / count.clamp(min=1)", "often, per_type_sum"),
    ("E4", "mean.argsort(descending=True", "mean.argsort(descending=False"),
    ("E4", "covered_before < top", "covered_before <= top"),
    ("E4", "cumsum(0) - count[order]", "cumsum(0)"),
    ("E4", "often = count >= max(1,", "often = count > max(1,"),
    ("E5", "(latest(stop) > before_run) & space_next", "(latest(stop) > before_run) & ~space_next"),
    ("E5", "latest(wide) > before_run", "latest(wide) < before_run"),
    ("E5", '(char == ord("\\n")) | ', '(char == ord("\\n")) & '),
    ("E5", "searchsorted(token_begin, end_byte)", "searchsorted(token_begin, end_byte + 1)"),
    ("E6", "slots = 1 + torch", "slots = 2 + torch"),
    ("E6", "randperm(T - L + N - 1,", "randperm(T - L + N,"),
    ("E6", "slots)) - torch.arange(N)", "slots)) + torch.arange(N)"),
    ("E6", "torch.arange(L) + skipped", "torch.arange(L) + 1 + skipped"),
    ("E7", "r, u = uniform(1, (L + 1) // 2, ", "r, u = uniform(0, T - L, "),
    ("E7", "r, u = uniform(1, (L + 1) // 2, ", "r, u = uniform(1, L // 2, "),
    ("E7", "uniform(0, T - L, generator)\n", "uniform(0, T - L - 1, generator)\n"),
    ("E7", "plain[r:] + u", "plain[r:] - u"),
    ("E8", "(head_dim / (head_dim - 2))", "((head_dim - 2) / head_dim)"),
    ("E8", "old_len - (f - 1))", "old_len + (f - 1))"),
    ("E8", "(f * new_len / old_len", "(new_len / old_len"),
    ("E9", "lse - logits.gather", "lse + logits.gather"),
    ("E9", "[:, 0] * valid).sum()", "[:, 0]).sum()"),
    ("E9", "index, -torch.ones_like(lse)", "index, torch.ones_like(lse)"),
    ("E10", "((1 - weight) * original", "(weight * original"),
    ("E10", "+ weight * tuned", "+ (1 - weight) * tuned"),
    ("E11", "bisect_right(p.places", "bisect_left(p.places"),
    ("E11", "d * room) - 1]", "d * room) - 2]"),
    ("E11", "d * room", "d * length"),
    ("E12", "sigmoid(lse_a - lse_b)", "sigmoid(lse_b - lse_a)"),
    ("E12", "(1 - share) * b", "(1 + share) * b"),
    ("E12", "share * a + (1 - share)", "a + (1 - share)"),
    ("E13", "hits[starts + size] - hits[starts]", "hits[starts + size - 1] - hits[starts]"),
    ("E13", "hits[starts]).double() / size", "hits[starts]).double()"),
    ("E14", "randint(1, (L + 1) // 2 + 1, ", "randint(1, L // 2 + 1, "),
    ("E14", "positions[:r] = torch.arange(r)", "positions[: r - 1] = torch.arange(r - 1)"),
    ("E14", "positions[:r] = torch.arange(r)", "positions[:r] = torch.arange(r) + 1"),
    ("E15", "torch.randperm(T, generator", "torch.randperm(T - 1, generator"),
    ("E15", "[:L].sort().values", "[:L]"),
    ("E16", "-(-target_len * 3 // 1280)", "(target_len * 3 // 1280)"),
    ("E16", "target_len * 3 //", "target_len * 4 //"),
    ("E16", "min(target_len, -(", "max(target_len, -("),
    ("E17", "loss = loss_sum / valid", "loss = loss_sum / int((targets != -100).sum())"),
    ("E17", "loss = loss_sum / valid", "loss = loss_sum / targets.numel()"),
    ("E17", "total += float(loss.detach())", "total = float(loss.detach())"),
    ("E18", "(1 - step / stage.steps)", "(1 + step / stage.steps)"),
    ("E18", "(first_step + step + 1)", "(first_step + step)"),
    ("E18", "min(1.0, (first", "max(1.0, (first"),
    ("E19", "for answer in expected) / len(expected)", "for answer in expected)"),
    ("E19", "fold(answer) in fold(output)", "answer in output"),
    ("E20", "(p + z2 / (2 * n))", "(p - z2 / (2 * n))"),
    ("E20", "z2 / (4 * n * n)", "z2 / (2 * n * n)"),
    ("E20", "p * (1 - p) / n", "p * (1 + p) / n"),
    ("E21", "return sum(means) / len(means)", "return sum(means)"),
    ("E21", "/ sum(map(len, clusters))", "/ len(clusters)"),
    ("E22", "int(0.025 * draws)", "int(0.5 * draws)"),
    ("E22", "int(0.975 * draws)", "int(0.5 * draws)"),
    ("E22", "rng.choices(g, k=len(g))", "rng.sample(g, k=len(g))"),
    ("E23", "return 6.0 * matmul_parameters", "return 2.0 * matmul_parameters"),
    ("E23", "* tokens + 6.0 * attention_flops", "* tokens - 6.0 * attention_flops"),
    ("E23", "training_flops(config, tokens) + 6.0", "training_flops(config, tokens) + 3.0"),
    ("E24", '["answer_logprob"] - control', '["answer_logprob"] + control'),
    ("E24", 'control["answer_logprob"]) / len', 'control["answer_logprob"]) * len'),
    ("E25", "positions[-END_TOKENS:] += T - L", "positions[-END_TOKENS:] += T"),
    ("E25", "positions[-END_TOKENS:] += T - L", "positions[END_TOKENS:] += T - L"),
    ("E25", "positions[-END_TOKENS:] += T - L", "positions[-END_TOKENS:] += T - L - 1"),
    ("E26", "h = L // 3 if uniform(0, 1, generator) == 0 else", "h ="),
    ("E26", "min(4 * T // L, L // 3)", "min(4, L // 3)"),
    ("E26", "2 * T / L], dtype", "T / L], dtype"),
    ("E26", "mean, sigma = 1 + T / L,", "mean, sigma = T / L,"),
    ("E26", "u = below + (above - below) * torch", "u = torch"),
    ("E26", "int(a * L / 2)", "int(a * L)"),
    ("E26", "h + (m - 1) * W // L, W - h - 1", "h + m * W // L, W - h - 1"),
    ("E26", "h + (m - 1) * W // L, W - h - 1", "h + (m - 1) * W // L, T - h - 1"),
    ("E26", "positions[h : h + m] += last - (h + m - 1)", "positions[h : h + m] += last - (h + m)"),
    ("E26", "positions[h + m :] += T - L", "positions[h + m :] += T - L - 1"),
    ("E27", "L0 / (2 * math.pi * turns)", "L0 / (math.pi * turns)"),
    ("E27", "/ (2 * math.log(theta))", "/ math.log(theta)"),
    ("E27", "return 1 - ((i - first)", "return 1 - ((i - last)"),
    ("E27", "((last - first) or 0.001)", "(last - first + 1)"),
    ("E28", "return 1 + 0.1 * m", "return 1 - 0.1 * m"),
    ("E28", 'max(1, scaling["factor"])', 'scaling["factor"]'),
    ("E28", 'growth(scaling["mscale"]) / growth', 'growth(scaling["mscale"]) * growth'),
    ("E29", "start - kept[-1] >= min_tokens", "start - kept[-1] > min_tokens"),
    ("E29", "start - kept[-1] >=", "start - kept[0] >="),
    ("E29", "total_tokens - start >= min_tokens", "total_tokens - start > min_tokens"),
    ("E29", " and total_tokens - start >= min_tokens", ""),
    ("E30", "student(texts - 1) * spread", "student(texts) * spread"),
    ("E30", "spread / math.sqrt(texts)", "spread / texts"),
]

# Lines of the training that hold no formula: each wrong text has to fail one of TRAIN_TESTS.
LEVERS = "support/memory/activations.py"
TRAIN_MUTANTS = [  # file, right, wrong
    ("train.py", "settings.seed * 1_000_003 + step +", "settings.seed * 1_000_003 +"),
    ("train.py", "analyse(original, extended, probe", "analyse(extended, original, probe"),
    ("train.py", '"first_position": settings.base_len', '"first_position": 0'),
    ("train.py", "settings.lr, settings.weight_decay", "settings.lr, 0.0"),
    ("train.py", "self.optimizer.step(lr, settings.clip,", "self.optimizer.step(lr, 1e9,"),
    ("train.py", "step - first, settings.warmup_steps, first)", "step - first, 0, first)"),
    (LEVERS, "model.activation_checkpointing = True", "model.activation_checkpointing = False"),
    (LEVERS, "keep_attention if settings.keep_attention else noop_context_fn", "noop_context_fn"),
    (LEVERS, "LayerInputsOnHost() if settings.offload_inputs else nullcontext", "nullcontext"),
    ("train.py", "return stage.lr * (1 - step / stage.steps)", "return stage.lr"),
    ("train.py", "trainer.train(replay, replay_corpus)", "trainer.train(replay, corpus)"),
    ("train.py", 'run.path / "merged", settings.merge_weight)', 'run.path / "merged", 0.5)'),
]
TRAIN_TESTS = [
    "tests/test_train.py::test_a_sample_is_drawn_from_seed_step_and_number_alone",
    "tests/test_train.py::test_every_setting_reaches_its_place",
]


def equations() -> dict[str, tuple[str, str, list[str]]]:
    """Tag -> its row of docs/equations.md: file, function, and the tests as pytest takes them."""
    row = re.compile(r"^\| \[(E\d+)\] .* \| `([\w/]+\.py):(\w+)` \| (`.*`) \|$", re.MULTILINE)
    rows = row.findall((ROOT / "docs" / "equations.md").read_text())
    return {
        tag: (file, function, [f"tests/{test}" for test in re.findall(r"`(\w+\.py::\w+)`", tests)])
        for tag, file, function, tests in rows
    }


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
    run = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    if run.returncode not in (0, 1):
        raise RuntimeError(f"pytest {' '.join(tests)}: {run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 1


def killer(path: Path, right: str, wrong: str, copy: Path, tests: list[str]) -> str | None:
    """The tests that fail with the wrong text in a file of the copy: those named, or else their
    files. None: no test."""
    text = path.read_text()
    path.write_text(text.replace(right, wrong))
    try:
        files = sorted({test.split("::")[0] for test in tests})
        for candidates in (tests, files):
            if fails(copy, candidates):
                return " or ".join(candidates).replace("tests/", "")
        return None
    finally:
        path.write_text(text)


def main() -> None:
    p = argparse.ArgumentParser(description="Break each tagged line; do the tests notice?")
    known, page = list(dict.fromkeys(tag for tag, _, _ in MUTANTS)), equations()
    p.add_argument("--tags", nargs="+", choices=known, default=known, metavar="E1")
    p.add_argument("--train", action="store_true", help="the lines of TRAIN_MUTANTS instead")
    args, started = p.parse_args(), time.time()
    tests = {tag: page[tag][2] for tag in args.tags}
    work = [(tag, page[tag][0], *texts) for tag, *texts in MUTANTS if tag in args.tags]
    if args.train:
        tests = {"train": TRAIN_TESTS}
        work = [("train", *mutant) for mutant in TRAIN_MUTANTS]
    rows = [
        {"tag": tag, "file": file, "line": line_of(file, right), "right": right, "wrong": wrong}
        for tag, file, right, wrong in work
    ]
    with tempfile.TemporaryDirectory() as folder:
        copy = fresh_copy(Path(folder) / "copy", models=True)
        if fails(copy, sorted({test for named in tests.values() for test in named})):
            raise SystemExit("error: the tests fail before anything is broken")
        for row in progress(rows, "mutants", unit="mutant"):
            tag, right, wrong = row["tag"], row["right"], row["wrong"]
            row["killed_by"] = killer(copy / row["file"], right, wrong, copy, tests[tag])
            log(f"[{tag}] {right!r} -> {wrong!r}: {row['killed_by'] or 'SURVIVES'}")
    if not args.train:
        kept = [row for row in read_json(TABLE).get("mutants", []) if row["tag"] in known]
        rows += [row for row in kept if row["tag"] not in args.tags]
        rows.sort(key=lambda row: int(row["tag"][1:]))
        found = {"mutants": rows, "run": provenance(started) | {"tags": args.tags}}
        write_json(TABLE, found, indent=1)
    survivors = [row for row in rows if row["killed_by"] is None]
    print(f"{len(rows)} mutants, {len(survivors)} survive")
    raise SystemExit(1 if survivors else 0)


if __name__ == "__main__":
    main()
