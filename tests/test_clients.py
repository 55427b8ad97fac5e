"""Programs that nobody here wrote open a result: mergekit, trl with peft, lm_eval. Each in an
environment of its own that the test makes (pip; minutes and a few GB), hence slow."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import recipe
from model import load_pretrained, load_tokenizer, save_pretrained
from support.system.bad_input import BadInput

pytestmark = pytest.mark.slow

TRL = """
import sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer
folder, out = sys.argv[1:]
rows = Dataset.from_list([{"text": "Line 3 of the story says that Ada had 7 apples. " * 40}])
options = {"max_length": None, "max_steps": 1, "per_device_train_batch_size": 1, "use_cpu": True,
           "bf16": False, "report_to": "none", "save_strategy": "no", "output_dir": out}
lora = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False, r=4)
model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
trainer = SFTTrainer(model, SFTConfig(**options), train_dataset=rows, peft_config=lora)
trainer.train()
trainer.save_model(out + "/adapter")
trainer.model.merge_and_unload().save_pretrained(out + "/merged")
"""
LM_EVAL = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager
folder, tasks = sys.argv[1:]
found = lm_eval.simple_evaluate(
    model="hf", model_args=f"pretrained={folder},dtype=float32,device=cpu", tasks=["story"],
    task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0,
)
print(json.dumps({"bits": found["results"]["story"]["bits_per_byte,none"]}))
"""


def run(*command) -> str:
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture()
def client(tmp_path):
    """client(packages) -> the folder of programs of a new environment that holds them."""

    def make(*packages: str):
        programs = tmp_path / "environment" / "bin"
        run(sys.executable, "-m", "venv", programs.parent)
        pip = [programs / "pip", "install", "-q", f"torch=={torch.__version__}", *packages]
        done = subprocess.run(pip, check=False, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"pip cannot install {packages}: {done.stderr.strip()[-300:]}")
        return programs

    return make


@pytest.fixture(scope="module")
def result(toy_dir, tmp_path_factory):
    """(original, tuned, merged): folders; the last two with a window of 1,024."""
    folder = tmp_path_factory.mktemp("result")
    model = load_pretrained(toy_dir)
    model.config = model.config.with_rope(250_000.0, 1024)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    save_pretrained(model, folder / "tuned", tokenizer_from=toy_dir)
    recipe.merge(toy_dir, folder / "tuned", folder / "merged", 0.25)
    return toy_dir, folder / "tuned", folder / "merged"


def test_mergekit_averages_to_the_same_bits(result, client, tmp_path):
    """With base_model: without it mergekit takes theta and window of either folder."""
    original, tuned, merged = result
    weights = [(original, 0.75), (tuned, 0.25)]
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in weights]
    plan = {"merge_method": "linear", "base_model": str(tuned), "dtype": "float32"}
    (tmp_path / "plan.yml").write_text(json.dumps(plan | {"models": models}))  # JSON is YAML
    run(client("mergekit") / "mergekit-yaml", tmp_path / "plan.yml", tmp_path / "out")
    theirs, ours = (load_file(f / "model.safetensors") for f in (tmp_path / "out", merged))
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert load_pretrained(tmp_path / "out").config == load_pretrained(merged).config


def test_trl_and_peft_train_a_result_on(result, client, tmp_path):
    python = client("trl", "peft") / "python"
    run(python, "-c", TRL, result[2], tmp_path)
    before, after = load_pretrained(result[2]), load_pretrained(tmp_path / "merged")
    assert after.config == before.config
    trained = dict(after.named_parameters())
    changed = [n for n, p in before.named_parameters() if not torch.equal(p, trained[n])]
    assert {name.split(".")[-2] for name in changed} == {"q_proj", "v_proj"}
    with pytest.raises(BadInput, match="an adapter of PEFT"):
        load_pretrained(tmp_path / "adapter")


def test_lm_eval_reads_the_new_window(result, client, tmp_path):
    """The bits of a text longer than the old window, scored in one piece, equal ours."""
    text = " ".join(f"Line {i} says that Ada had {i * 7 % 53} apples." for i in range(30))
    (tmp_path / "story.jsonl").write_text(json.dumps({"text": text}) + "\n")
    task = {
        "task": "story",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "story.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "story.yaml").write_text(json.dumps(task))
    said = run(client("lm_eval[hf]") / "python", "-c", LM_EVAL, result[2], tmp_path)
    bits = json.loads(said.splitlines()[-1])["bits"]

    model, tokenizer = load_pretrained(result[2]), load_tokenizer(result[2])
    ids = torch.tensor([tokenizer.bos_id, *tokenizer.encode(text)])
    assert 64 < len(ids) < 1024
    with torch.no_grad():
        nats = model(ids[None])[0, :-1].log_softmax(-1).gather(-1, ids[1:, None]).sum()
    assert abs(bits + float(nats) / len(text.encode()) / math.log(2)) < 1e-4
