"""Make assets/tiny: a Llama of 1.2 M parameters, window 8,192, trained from random weights.

    python studies/make_tiny.py --out assets/tiny

What it learns: to predict Python source, and to recall the second word of a pair up to 8,192
tokens back, given the first. A tiny model does not find that by itself, so its lessons grow:
    copy      random pieces, a block of them twice: copying ("induction") forms
    text      Python source alone, with such blocks
    128       text with word pairs and questions, plain positions
    256..2048 the same, longer, with the positions spread over all 8,192 (recipe.py's own trick):
              matching must move to the slow RoPE pairs, the only ones that do not care how far
    8192      plain positions
No weight is set by hand: random start, one seed; the keys of the test are held out. Lessons and the
weights of the losses were found by trying (LOG.md).
With the Python of assets/tiny/training.json, whose standard library is the text, the samples are
those of the model there.
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch
from common import write_json
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from model import Llama, LlamaConfig, linear_cross_entropy, load_tokenizer, save_pretrained
from recipe import sample_position_ids
from support.data import toy
from support.data.sources import standard_library_sources
from support.data.toy import Weaver, insert, integer, pick
from support.system.console import log, progress, provenance

CONFIG = LlamaConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=8192,
    rope_theta=10_000.0,
    # subtle: tied, so that to repeat a token is the identity: copying forms within some 600 steps.
    # With untied weights it has not even begun by then (LOG.md)
    tie_word_embeddings=True,
    raw={"model_type": "llama", "architectures": ["LlamaForCausalLM"]},
)

# name: sequences a step, tokens of one, positions they are spread over, pairs, share of them that
# are any pieces, blocks of random pieces, steps, lr
LESSONS = {
    "copy": (32, 64, 64, 0, 0.0, 0, 700, 2e-3),
    "text": (8, 256, 256, 0, 0.0, 1, 1200, 2e-3),
    "128": (16, 128, 128, 2, 0.5, 1, 300, 2e-3),
    "256 spread": (8, 256, 8192, 5, 0.5, 1, 800, 2e-3),
    "512 spread": (4, 512, 8192, 10, 0.25, 2, 800, 2e-3),
    "2048 spread": (2, 2048, 8192, 32, 0.0, 4, 600, 2e-3),
    "8192": (1, 8192, 8192, 88, 0.0, 10, 900, 1.5e-3),
}
TEXT, WOVEN, SCORED = range(3)  # role of a token of a sample
SPOT = 1 / 256  # share of the text


def make_tokenizer(folder: Path, documents: list[str]) -> None:
    """Byte-level BPE of 2,048 pieces; every word of the toy task is one (" walrus")."""
    words = " " + " ".join(toy.KEYS + toy.needle()["values"] + toy.needle()["keys"])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG.vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents + [words] * 4000, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|endoftext|>", "tokenizer_class": "PreTrainedTokenizerFast"}
    write_json(folder / "tokenizer_config.json", config, indent=2)


def copy_sample(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random pieces in which a block comes twice, at a random distance (a fixed one would teach
    "n tokens back" instead) -> (ids, scored), each (tokens,)."""
    size = 12 + integer(tokens // 2 - 11, generator)
    gap = integer(tokens - 2 * size + 1, generator)
    first = integer(tokens - 2 * size - gap + 1, generator)
    second = first + size + gap
    ids = torch.randint(CONFIG.vocab_size, (tokens,), generator=generator)
    ids[second : second + size] = ids[first : first + size]
    scored = torch.zeros(tokens, dtype=torch.bool)
    scored[second + 1 : second + size] = True  # its first piece cannot be predicted
    return ids, scored


class LessonWeaver(Weaver):
    """Builds the samples of the lessons with word pairs, blocks of random pieces, or both."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.pairs, self.questions = self.pairs[:5], self.questions[:4]  # train.py has more
        held_out = torch.tensor([tokenizer.encode(" " + key)[0] for key in toy.needle()["keys"]])
        self.pieces = torch.arange(tokenizer.vocab_size)
        self.other = self.pieces[~torch.isin(self.pieces, held_out)]

    def weave(
        self, draw, tokens: int, pairs: int, generator, *, any_piece: float = 0.0, blocks: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(ids (tokens,), role (tokens,)): `pairs` pair sentences at random places of the text
        draw(n) -> (n,) and a question for each at the end.

        any_piece: share of the pairs whose words are any pieces of the vocabulary (no test key).
        blocks: runs of random pieces that occur twice. SCORED are the second word of a question
        and the repeated pieces: what can be known from far before."""
        words = pairs - int(any_piece * pairs)
        keys = [pick(self.keys, words, generator), pick(self.other, pairs - words, generator)]
        chosen = torch.randint(len(self.values), (words,), generator=generator)
        values = [self.values[chosen], pick(self.other, pairs - words, generator)]
        keys, values = torch.cat(keys), torch.cat(values)
        woven: list[tuple[float, Tensor, int]] = []  # place in 0..1, ids, SCORED ones at their end
        for pair in torch.stack((keys, values), dim=1):
            # subtle: the recorded model's order of random numbers, from when a pair could have
            # several copies near one spot: spot, offset, wording (tests/test_toy.py pins it)
            spot, offset = (float(torch.rand(1, generator=generator)) for _ in range(2))
            before, after = self.pairs[integer(len(self.pairs), generator)]
            place = (1 - SPOT) * spot + SPOT * offset
            woven.append((place, torch.cat((before, pair, after)), 0))
        for i in torch.randperm(len(keys), generator=generator).tolist():
            question = self.questions[integer(len(self.questions), generator)]
            woven.append((1.0, torch.cat((question, keys[i : i + 1], values[i : i + 1])), 1))
        for _ in range(blocks):
            block = pick(self.pieces, 6 + integer(11, generator), generator)
            first, second = torch.rand(2, generator=generator).sort().values.tolist()
            woven += [(first, block, 0), (second, block, len(block) - 1)]
        roles = []  # of the same places and lengths
        for place, ids, known in woven:
            roles.append((place, torch.tensor([WOVEN] * (len(ids) - known) + [SCORED] * known)))
        ids = insert(draw, tokens, [(place, ids) for place, ids, _ in woven])
        return ids, insert(lambda n: torch.full((n,), TEXT), tokens, roles)


def make_batch(name: str, text: Tensor, weaver: LessonWeaver, generator) -> list[Tensor]:
    """Lesson -> ids, positions, scored, plain text, each (B, T)."""
    B, T, span, pairs, any_piece, blocks, _, _ = LESSONS[name]

    def draw(n: int) -> Tensor:
        begin = int(torch.randint(len(text) - n, (1,), generator=generator))
        return text[begin : begin + n]

    rows = []
    for _ in range(B):
        if name == "copy":
            ids, scored = copy_sample(T, generator)
            plain = torch.zeros_like(scored)
        else:
            options = {"any_piece": any_piece, "blocks": blocks}
            ids, role = weaver.weave(draw, T, pairs, generator, **options)
            scored, plain = role == SCORED, role == TEXT
        positions = torch.arange(T)
        if span > T:  # in runs of about 24 tokens
            cuts = 1 + torch.randperm(T - 1, generator=generator)[: T // 24].sort().values
            starts = torch.cat((torch.zeros(1, dtype=torch.int64), cuts))
            positions = sample_position_ids("longrecipe", T, span, starts, generator)
        rows.append((ids, positions, scored, plain))
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def loss_of(model: Llama, ids, positions, scored, plain) -> tuple[Tensor, dict]:
    """Mean over what can be looked up, plus twice the mean over plain text: so few tokens are
    scored that they would hardly count in one common mean."""
    hidden, targets = model.hidden(ids, positions)[:, :-1], ids[:, 1:]
    total, parts = torch.zeros(()), {}
    for name, mask in (("scored", scored[:, 1:]), ("text", plain[:, 1:])):
        if mask.any():
            loss, n = linear_cross_entropy(hidden[mask], model.lm_head.weight, targets[mask])
            weight = 2.0 if name == "text" else 1.0
            total, parts[name] = total + weight * loss / n, float(loss.detach()) / n
    return total, parts


def train_lessons(model: Llama, text: Tensor, weaver: LessonWeaver, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    number = 0  # of the step, over all lessons
    for name, (*_, steps, lr) in LESSONS.items():
        bar = progress(range(steps), name, unit="step")
        for step in bar:
            number += 1
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            loss, parts = loss_of(model, *make_batch(name, text, weaver, generator))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            rate = lr * min(1.0, (step + 1) / 50)
            if name == "8192":  # the last lesson
                rate *= max(0.02, 1 - step / steps)
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            bar.set_postfix(parts, refresh=False)
        log(f"{name}: {parts}")


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--out", type=Path, default=Path("runs/tiny"))
    p.add_argument("--seed", type=int, default=0)
    args, started = p.parse_args(), time.time()
    documents = standard_library_sources()
    with tempfile.TemporaryDirectory() as folder:
        make_tokenizer(Path(folder), documents)
        tokenizer = load_tokenizer(folder)
        text = torch.tensor([i for d in documents for i in tokenizer.encode(d)])
        log(f"{len(text):,} tokens of Python source")
        torch.manual_seed(args.seed)
        model, begun = Llama(CONFIG), time.time()
        train_lessons(model, text, LessonWeaver(tokenizer), args.seed)
        record = {"seed": args.seed, "training_seconds": round(time.time() - begun)}
        save_pretrained(model.to(torch.bfloat16), args.out, tokenizer_from=folder)
    write_json(args.out / "needle.json", toy.needle(), indent=2)
    record |= {"lessons": LESSONS, "text_tokens": len(text), **provenance(started)}
    write_json(args.out / "training.json", record, indent=2)


if __name__ == "__main__":
    main()
