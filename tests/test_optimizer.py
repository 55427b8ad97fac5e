"""memory/optimizer.py: three places of AdamW's state, against plain fp32 training."""

import gc
import importlib.util
import json
import logging
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import optimizer_run
import pytest
import torch

import train
from model import Llama, LlamaConfig
from support.memory.optimizer import NAMES, make_optimizer
from support.system.bad_input import BadInput

CONFIG = LlamaConfig(97, 32, 48, 2, 4, 2, 8, 64)
TIED = LlamaConfig(97, 32, 48, 2, 4, 2, 8, 64, tie_word_embeddings=True)
needs_torchao = pytest.mark.skipif(
    not importlib.util.find_spec("torchao"), reason="torchao is not installed"
)


@pytest.fixture()
def name(request):
    """An optimizer of NAMES (indirect parameter); torchao's runs uncompiled."""
    if request.param == "adamw-8bit":
        request.getfixturevalue("eager")
    return request.param


every_optimizer = pytest.mark.parametrize("name", NAMES, indirect=True)


def batch(step: int) -> list:
    """Three sequences of unequal length."""
    generator = torch.Generator().manual_seed(step)
    ids = [torch.randint(97, (1, n), generator=generator) for n in (12, 30, 21)]
    return [(x, torch.arange(x.shape[1])[None], train.next_token_targets(x)) for x in ids]


def made(name: str, config=CONFIG, dtype=torch.float32):
    torch.manual_seed(0)
    model = Llama(config).to(dtype)
    return model, make_optimizer(name, model, 1e-3, 0.1)


def take(steps: range, model, optimizer, clip: float = 0.5) -> list[float]:
    """Accumulate, clip, step -> the norms before clipping."""
    norms = []
    for i in steps:
        train.accumulate(model, batch(i))
        norms.append(optimizer.step(1e-3 * (1 + i % 3), clip))
    return norms


def trained(name: str, config=CONFIG, dtype=torch.float32, steps: int = 20, clip: float = 0.5):
    """(parameters, norms before clipping)."""
    model, optimizer = made(name, config, dtype)
    norms = take(range(steps), model, optimizer, clip)
    return list(model.parameters()), norms


class Plain:
    """The same without this project's optimizers: fp32 weights under torch.optim.AdamW."""

    def __init__(self, model):
        self.model = model
        groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1}]
        groups += [{"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0}]
        self.adamw = torch.optim.AdamW(groups, fused=True)

    def step(self, lr: float, clip: float) -> float:
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        return norm


@pytest.mark.parametrize("config", [CONFIG, TIED], ids=["untied", "tied"])
def test_steps_equal_plain_fp32_training(config):
    """Not one bit may differ: the same fp32 operations on the same numbers in the same order,
    wherever the state lives. Clipping was at work."""
    torch.manual_seed(0)
    model = Llama(config)
    norms = take(range(20), model, Plain(model))
    assert sum(norm > 0.5 for norm in norms) > 10
    for name in NAMES[:2]:
        ours, our_norms = trained(name, config)
        assert our_norms == norms
        assert all(torch.equal(a, b) for a, b in zip(ours, model.parameters(), strict=True))


def test_host_and_device_give_bf16_models_the_same_bits():
    a, b = (trained(name, dtype=torch.bfloat16, steps=10)[0] for name in NAMES[:2])
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert all(x.dtype == torch.bfloat16 for x in b)


def test_96_gradients_are_summed_in_fp32_not_in_bf16():
    """p.grad_dtype: error of the sum over 96 bf16 gradients, relative to the largest entry.
    In fp32 at most 95 roundings of 2^-24; in bf16 they show."""
    torch.manual_seed(0)
    x = torch.randn(96, 1, 64).bfloat16()
    exact, errors = x.double().sum(0).expand(32, -1), []
    for fp32 in (True, False):
        layer = torch.nn.Linear(64, 32, bias=False).bfloat16()
        if fp32:
            make_optimizer("adamw", layer, 1e-3, 0.0)
        for row in x:
            layer(row).sum().backward()
        errors.append(float((layer.weight.grad.double() - exact).abs().max() / exact.abs().max()))
    assert errors[0] <= 95 * 2.0**-24 < 1e-3 < errors[1]


def test_the_host_holds_one_gradient_at_a_time():
    (model, optimizer), held = made("adamw-host"), []

    def count(*_) -> None:
        both = (optimizer.masters, optimizer.params)
        held.append(tuple(sum(x.grad is not None for x in tensors) for tensors in both))

    optimizer.adamw.register_step_pre_hook(count)
    take(range(1), model, optimizer)
    n = len(optimizer.params)
    assert held == [(1, n - 1 - i) for i in range(n)]  # the device's gradients go one by one


@every_optimizer
@pytest.mark.parametrize(("value", "usable"), [(float("nan"), True), (1.0, False)])
def test_gradients_that_are_not_finite_or_not_usable_are_dropped(name, value, usable):
    model = torch.nn.Linear(4, 4)
    optimizer = make_optimizer(name, model, 1e-3, 0.1)
    before = [p.detach().clone() for p in model.parameters()]
    for p in model.parameters():
        p.grad = torch.full(p.shape, value)
    optimizer.step(1e-3, 1.0, usable=usable)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@every_optimizer
def test_a_saved_state_goes_on_bit_for_bit_and_lets_go_of_its_file(name, tmp_path):
    file, maps = tmp_path / "state.pt", Path("/proc/self/maps")
    model, optimizer = made(name, dtype=torch.bfloat16)
    take(range(3), model, optimizer)
    torch.save(optimizer.state_dict(), file)
    take(range(3, 6), model, optimizer)
    other, resumed = made(name, dtype=torch.bfloat16)
    torch.nn.init.zeros_(other.lm_head.weight)
    resumed.load_state_dict(torch.load(file, weights_only=True, mmap=True))
    gc.collect()
    if maps.is_file() and name != "adamw-8bit":  # its state is small, and copied to the GPU anyway
        assert "state.pt" not in maps.read_text()
    torch.manual_seed(1)  # rounding at random must not hang on it
    take(range(3, 6), other, resumed)
    pairs = zip(model.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@every_optimizer
def test_the_state_of_another_model_is_refused(name):
    """Of equal norms: with adamw-8bit these alone have masters."""
    (_, optimizer), (_, other) = made(name), made(name, replace(CONFIG, vocab_size=98))
    with pytest.raises(BadInput, match="is of another model"):
        optimizer.load_state_dict(other.state_dict())


# ---- 8 bits ------------------------------------------------------------------------------------


def test_small_updates_survive_8_bit_on_average(eager):
    """250 updates of 4e-5 on 8,192 bf16 ones: each rounds down with probability 4e-5 / 0.0039, so
    on average the weights move by 0.01. The mean's standard deviation is
    sqrt(250 * 4e-5 * 0.0039 / 8192) = 7e-5: a deviation of 1e-3 has no chance by accident."""
    model = torch.nn.Linear(128, 64, bias=False).bfloat16()
    torch.nn.init.ones_(model.weight)
    optimizer = make_optimizer("adamw-8bit", model, 4e-5, 0.0)
    for _ in range(250):
        model.weight.grad = torch.ones(64, 128)
        optimizer.step(4e-5, max_norm=1e9)
    assert model.weight.dtype == torch.bfloat16
    assert abs(float(model.weight.detach().float().mean()) - 0.99) < 1e-3


def test_8_bit_stays_close_to_fp32_on_a_toy(eager):
    """Not equal; how close on a real model: optimizer_run.py."""
    start = torch.cat([p.detach().flatten() for p in made("adamw")[0].parameters()])
    (eight, norms), (exact, their_norms) = (trained(n, clip=10.0) for n in ("adamw-8bit", "adamw"))
    assert norms[0] == their_norms[0] and norms != their_norms
    exact, eight = (torch.cat([p.flatten() for p in ps]) for ps in (exact, eight))
    assert (eight - exact).norm() < 0.1 * (exact - start).norm()


LOUD = """
import logging, warnings
logging.getLogger("torchao").warning("noise")
logging.getLogger("torchao").error("real")
warnings.warn("noise")
raise ImportError("no libcuda.so")
"""


def test_a_torchao_that_cannot_be_imported_is_one_line_without_its_warnings(
    tmp_path, monkeypatch, caplog, recwarn
):
    """A package of that name that warns as torchao 0.18 does, and then fails."""
    (tmp_path / "optim.py").write_text(LOUD)
    package = types.ModuleType("torchao")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "torchao", package)
    monkeypatch.delitem(sys.modules, "torchao.optim", raising=False)
    needs = r"needs torchao: pip install torchao \(no libcuda.so\)"
    with pytest.raises(ValueError, match=needs):
        make_optimizer("adamw-8bit", Llama(CONFIG), 1e-3, 0.1)
    logging.getLogger("torchao").warning("as before")
    assert caplog.messages == ["real", "as before"] and not recwarn.list


@pytest.mark.slow
@needs_torchao
def test_the_real_torchao_is_imported_without_a_word():
    code = "import torch; from support.memory.optimizer import make_optimizer as make\n"
    code += "make('adamw-8bit', torch.nn.Linear(4, 4), 1e-3, 0.1)"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, check=True, capture_output=True, cwd=optimizer_run.ROOT)
    assert (done.stdout, done.stderr) == (b"", b"")


def check_band(file: Path) -> None:
    found = json.loads(file.read_text())
    seen, band = optimizer_run.gaps(found, "adamw-8bit"), optimizer_run.BAND
    assert all(seen[name] <= band[name] for name in band)
    assert found["fell"]["adamw-fp32"] > 5 * band["any_step"]


def test_the_recorded_run_on_smollm2_is_within_its_band():
    check_band(optimizer_run.OUT)


@pytest.mark.slow
@needs_torchao
def test_8_bit_on_smollm2_is_within_its_band(smollm2_dir, tmp_path):
    flags = f"--model {smollm2_dir} --work {tmp_path} --out {tmp_path}/found.json"
    optimizer_run.main(flags.split())
    check_band(tmp_path / "found.json")
