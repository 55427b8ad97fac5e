"""The answers of docs/exercises.md run, and are right; so do the cells of the notebook."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from fresh_copy import ROOT, environment, fresh_copy

EXERCISES = Path(__file__).resolve().parents[1] / "examples/exercises"
sys.path.insert(0, str(EXERCISES))
import new_theta  # noqa: E402
import pose_defect  # noqa: E402

from model import LlamaConfig, inverse_frequencies  # noqa: E402
from recipe import METHODS, ntk_rope_base  # noqa: E402
from support.explain.distances import meets_new_angles  # noqa: E402


def test_the_derived_theta_is_the_papers(capsys):
    """To all digits of table 4; by a way that does not use the formula."""
    new_theta.main()
    out = capsys.readouterr().out
    assert all(name in out for name in new_theta.PAPER)
    for numbers, paper in new_theta.PAPER.values():
        found = new_theta.theta_by_bisection(*numbers)
        assert round(found / 1e6, 1) == paper
        assert abs(found / ntk_rope_base(*numbers) - 1) < 1e-9


def test_under_the_papers_theta_no_pair_meets_a_new_angle():
    """docs/method.md says so of the toy at 131,072 tokens and of the paper's models. Under the old
    theta, and under one raised by T / L0 only, some do. `python recipe.py` counts them as well."""
    tiny = LlamaConfig.from_dir(ROOT / "assets" / "tiny")
    toy = (tiny.rope_theta, tiny.head_dim, tiny.max_position_embeddings, 131_072, None)
    for theta, d, L0, T, f in [toy, *(numbers for numbers, _ in new_theta.PAPER.values())]:
        thetas = theta, theta * T / L0, ntk_rope_base(theta, d, L0, T, f)
        counts = [new_theta.pairs_with_new_angles(theta, new, d, L0, T) for new in thetas]
        assert counts[0] > 0 and counts[1] > 0 and counts[2] == 0
        old, *changed = (inverse_frequencies(d, x) for x in (theta, *thetas))
        assert counts == [int(meets_new_angles(old, now, L0, T).sum()) for now in changed]


def test_the_defect_shows_in_the_samples_alone():
    """4,000 samples: the share of plain ones is 801 / 1401 = 0.572 with standard error 0.0078; six
    of them are allowed on both sides (chance of accident 2e-9). As published it is 1 / 1401: more
    than 40 of 4,000 has a chance below 1e-20."""
    L, T = pose_defect.L, pose_defect.T
    bad = pose_defect.diagnose(pose_defect.black_box(), T)
    good = pose_defect.diagnose(pose_defect.published(), T)
    assert abs(bad["plain"] - 801 / 1401) < 6 * 0.0078 and bad["plain"] > 0.5
    assert good["plain"] < 0.01
    assert abs(bad["range of the split"] - (T - L + 1)) < 160  # 6 standard errors
    assert bad["last split / L"] > 0.9 and good["last split / L"] == 0.5
    assert bad["least skip - split"] >= 0 > good["least skip - split"]


def test_the_diagnosis_by_hand():
    samples = torch.tensor([[0, 1, 2, 3], [0, 1, 4, 5], [0, 3, 4, 5], [0, 1, 2, 9]])
    assert pose_defect.diagnose(samples, 10) == {
        "plain": 0.25,
        "plain, as published": 1 / 7,
        "range of the split": 4 / 0.75,
        "last split / L": 0.75,
        "least skip - split": 0,
    }


def test_a_position_method_of_your_own_is_a_small_patch(tmp_path):
    """It applies to a fresh copy; its own test and those of all methods pass, that of the command
    among them."""
    patch = EXERCISES / "own_method.patch"
    changed = re.findall(r"^[+-](?!\+\+ |-- )", patch.read_text(), re.MULTILINE)
    assert 10 < len(changed) < 30
    copy = fresh_copy(tmp_path / "copy")
    chosen = "bins or positions_increase or make_example or what_is_drawn"
    said = ""
    for command in (
        ["git", "apply", str(patch)],
        [sys.executable, "-m", "pytest", "tests/test_recipe.py", "-k", chosen],
    ):
        options = {"cwd": copy, "env": environment(), "capture_output": True, "text": True}
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        said += done.stdout
    # its own and two that take all methods, and one for each method (bins instead of full)
    assert f"\n{len(METHODS) + 3} passed" in said, said


def test_the_notebook_extends_a_model_in_memory(monkeypatch, capsys):
    """Its cells in one namespace, with fewer steps: at most 12 lines extend a model, the loss
    beyond the old window falls, and the figure has a column for each method."""
    notebook = json.loads((EXERCISES.parent / "longrecipe.ipynb").read_text())
    cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    extension = next(c for c in cells if "make_example" in c)
    assert len(extension.splitlines()) <= 12
    monkeypatch.chdir(EXERCISES.parent)
    monkeypatch.syspath_prepend("..")
    here: dict = {}
    for cell in cells[:-1]:
        exec(cell.replace("STEPS := 6", "STEPS := 3"), here)
    losses = here["losses"]
    assert losses["result"] < losses["untrained"] < losses["original"]
    assert here["types"].sum() > 10 and "parameters, window 8,192" in capsys.readouterr().out
    *body, last = cells[-1].rsplit("\n", 1)
    exec(body[0], here)
    assert len(eval(last, here).axes) == 2 * len(here["recipe"].METHODS)
