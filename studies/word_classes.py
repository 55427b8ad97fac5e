"""Which kinds of words gain from a longer window? The paper's figure 4, on our own prose.

    python studies/word_classes.py --extended runs/smollm2_study/longrecipe_0    # resumable

The shift of each token (eq. 2) between the original, under the new theta, and the extended model,
in nats, as in the analysis of studies/real_study.py: samples of 4,992 tokens at positions over
16,384, counted past the old window. The paper tags parts of speech; here the classes are lists of
English function words, which need no tagger: "have" counts as an auxiliary everywhere. A text's
row is kept as soon as it is there.
"""

import argparse
import itertools
import os
import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from common import RESULTS, ROOT, gain, read_json, resolved, write_json

import train
from model import load_pretrained, load_tokenizer
from recipe import logit_shift
from support.data.sources import load_texts
from support.needles.intervals import paired
from support.system.console import progress, provenance, report_errors

FILE = RESULTS / "word_classes.json"
FLAGS = (
    "--model {model} --target_len 16384 --data data/prose --join --rope_base {theta:g}"
    " --log_softmax --rebased_analysis --seed 1000"  # texts that no row of the study began with
)
WORDS = {
    "pronouns": "i me my mine you your yours he him his she her hers it its we us our ours they"
    " them their theirs who whom whose which what myself yourself itself themselves someone anyone"
    " something anything everything nothing",
    "auxiliaries": "am is are was were be been being have has had do does did will would shall"
    " should can could may might must",
    "conjunctions": "and or but nor yet so",
    "prepositions": "of in to for on with at by from as into through after over between out against"
    " during without before under around among within along across behind beyond until since upon"
    " about above below off onto toward towards via per",
}
CLASS_OF = {word: name for name, words in WORDS.items() for word in words.split()}
CLASSES = ("numbers", *WORDS, "other words", "other signs")


def classes_of(texts: list[str]) -> list[str]:
    """The class of each token, given the text of each. All tokens of a word have its class.

    >>> classes_of(["In", " 19", "99", " they", " reset", "tled", ".", "\\n"])
    ['prepositions', 'numbers', 'numbers', 'pronouns', 'other words', 'other words', \
'other signs', 'other signs']
    """
    at = {}  # position of a character -> class of the word that it is in
    for word in re.finditer(r"[^\W\d_]+|\d+", "".join(texts)):
        name = "numbers" if word[0].isdigit() else CLASS_OF.get(word[0].lower(), "other words")
        at |= dict.fromkeys(range(*word.span()), name)
    ends = [0, *itertools.accumulate(map(len, texts))]
    return [
        next((at[i] for i in range(start, end) if i in at), "other signs")
        for start, end in itertools.pairwise(ends)
    ]


def tally(delta: torch.Tensor, names: list[str], top: float = 0.2) -> dict:
    """class -> [tokens, sum of their shifts (nats), how many are among the `top` of the text]."""
    best = torch.zeros(len(delta), dtype=torch.bool)
    best[delta.topk(round(top * len(delta))).indices] = True
    found = {name: [0, 0.0, 0] for name in CLASSES}
    for shift, name, is_top in zip(delta.tolist(), names, best.tolist(), strict=True):
        n, total, in_top = found[name]
        found[name] = [n + 1, total + shift, in_top + is_top]
    return found


def cells() -> list[dict[str, str]]:
    """The table of the docs, column -> cell: a row a class, sums over the texts, and the interval
    over texts. Empty where nothing was measured."""
    texts = list(read_json(FILE).get("texts", {}).values())
    if len(texts) < 2:
        return []
    n, best = (sum(t[name][k] for t in texts for name in CLASSES) for k in (0, 2))
    rows = []
    for name in CLASSES:
        tokens, in_top = (sum(t[name][k] for t in texts) for k in (0, 2))
        shift = paired([t[name][1] / t[name][0] for t in texts if t[name][0]])
        row = {f"{n:,} tokens of {len(texts)} texts": name, "of all tokens": f"{tokens / n:.1%}"}
        row["of the fifth with the largest shift"] = f"{in_top / best:.1%}"
        row["of its tokens in that fifth"] = f"{in_top / tokens:.1%}"
        rows.append(row | {"mean shift of a text, nats": gain(shift, 1, "+.2f")})
    return rows


def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--model", default="models/smollm2", metavar="DIR", help="the original")
    p.add_argument("--extended", required=True, metavar="DIR", help="the original, extended")
    p.add_argument("--texts", type=int, default=41, help="samples; 4,992 tokens each")
    p.add_argument("--out", type=Path, default=FILE, help="JSON file of the rows")
    with report_errors():
        args = p.parse_args(argv)
        os.chdir(ROOT)
        extended = load_pretrained(args.extended, torch.bfloat16)
        original = load_pretrained(args.model, torch.bfloat16)
        theta = extended.config.rope_theta
        original.config = replace(original.config, rope_theta=theta)
        settings = resolved(FLAGS.format(model=args.model, theta=theta))
        tokenizer = load_tokenizer(args.model)
        corpus, _ = load_texts(settings, tokenizer)
        probe = train.plan_stages(settings)[0]
        found = read_json(args.out) or {"texts": {}}
        for i in progress(range(args.texts), "word classes", unit="text"):
            if str(i) in found["texts"]:
                continue
            began = time.time()
            ids, positions = train.analysis_sample(i, probe, corpus, tokenizer, settings)
            delta, _, _ = logit_shift(original, extended, ids, positions, log_softmax=True)
            names = classes_of([tokenizer.decode([v]) for v in ids.tolist()])
            past = (positions >= settings.base_len).nonzero()[:, 0]
            row = tally(delta[past], [names[t] for t in past.tolist()])
            found["texts"][str(i)] = row | {"made_by": provenance(began)}
            write_json(args.out, found | {"flags": FLAGS, "extended": args.extended})


if __name__ == "__main__":
    main()
