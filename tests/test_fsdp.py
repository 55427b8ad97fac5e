"""Exported samples in another engine: see fsdp_run.py."""

import json

import fsdp_run
import numpy as np
import pytest


def check(found: dict) -> None:
    """The loss of every step is train.py's up to fp32 rounding, from half of the weights in each
    process; without a mask it is another."""
    loss, tokens = found["loss"], found["tokens_of_a_step"]
    assert len(tokens) == 12 and found["share_of_the_weights_per_process"] == 0.5
    for ours, theirs, n in zip(loss["train.py"], loss["FSDP"], tokens, strict=True):
        assert abs(ours - theirs) <= fsdp_run.tolerance(ours, n)
    assert found["within"] and max(found["tolerance_nats"]) < 2e-5
    for name, gap in found["largest_difference_nats"].items():
        pairs = zip(loss["train.py"], loss[name], strict=True)
        assert gap == max(abs(a - b) for a, b in pairs)
    assert found["largest_difference_nats"]["FSDP without a mask"] > 0.1
    assert found["largest_difference_of_a_weight"] < 0.01 * 1e-3  # a hundredth of one step's --lr


def test_the_kept_run_is_within_fp32_rounding():
    check(json.loads(fsdp_run.OUT.read_text()))


@pytest.mark.slow
def test_two_processes_with_fsdp_learn_what_train_py_learns(tmp_path):
    """A minute. Needs accelerate, and a transformers that can shard while it loads."""
    pytest.importorskip("accelerate")
    distributed = pytest.importorskip("transformers.distributed")
    if not hasattr(distributed, "DistributedConfig"):
        pytest.skip("this transformers has no DistributedConfig")
    check(fsdp_run.measure(tmp_path))


def test_the_tolerance_holds_for_sums_in_any_order():
    """Numbers added one after the other in fp32, in 40 seeded orders: their standard deviation is
    at most a third of the tolerance, as derived, and all are within."""
    random = np.random.default_rng(0)
    terms = random.exponential(4.0, 2044).astype(np.float32)
    exact = terms.mean(dtype=np.float64)
    tolerance = fsdp_run.tolerance(exact, 2044)
    orders = [np.cumsum(random.permutation(terms), dtype=np.float32)[-1] for _ in range(40)]
    off = np.array(orders, dtype=np.float64) / 2044 - exact
    assert abs(off).max() <= tolerance
    assert 0.05 < np.sqrt((off**2).mean()) / tolerance < 1 / 3


def test_what_the_engine_is_given_keeps_the_scaling_of_the_rope():
    """Another theta and window, as train.py leaves them in the config of its result."""
    transformers = pytest.importorskip("transformers")
    scaling = {"rope_type": "linear", "factor": 2.0}
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048}
    for before, new in ((scaling, None), ({"rope_type": "default"}, yarn)):  # --rope ntk, yarn
        config = transformers.LlamaConfig(rope_parameters={**before, "rope_theta": 1e4})
        settings = {"target_len": 4096, "rope_base": 5e5, "rope_scaling": new}
        config = fsdp_run.extended(config, settings)
        assert config.rope_parameters == {**(new or before), "rope_theta": 5e5}
        assert config.max_position_embeddings == 4096


@pytest.mark.parametrize(
    ("processes", "argv", "line"),
    [
        ("1", "--samples nope --losses x", "No such file or directory: 'nope/samples.json'"),
        ("1", "--samples . --losses x", "is not complete: give the same --export again"),
        (None, "--samples . --losses x", "is for a process of torchrun"),
        ("1", "--samples .", "--samples DIR --losses FILE"),
    ],
)
def test_what_the_engine_cannot_work_with_is_one_line(
    processes, argv, line, tmp_path, monkeypatch, error_of
):
    (tmp_path / "samples.json").write_text('{"status": "running", "steps": [], "settings": {}}')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", processes or "")
    if processes is None:
        monkeypatch.delenv("WORLD_SIZE")
    assert line in error_of(fsdp_run.main, argv.split(), tmp_path)
