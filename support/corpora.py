"""What a training run draws its samples from."""

from support.cli import log
from support.text import Corpus, load_tokens
from support.toy import TINY, ToyCorpus, load_toy_text


def load_corpora(args, tokenizer) -> tuple[Corpus, Corpus]:
    """What the extension and the replay draw from; the toy model's task is woven into both."""
    remedy = "give longer texts with --{}, join them with --join, or lower --{}"
    remedies = remedy.format("data", "train_len"), remedy.format("replay_data", "replay_len")
    if args.model == TINY and args.data is None and args.replay_data is None:
        log("toy model; for a real one: --model DIR")
        tokens = load_toy_text(tokenizer)
        return tuple(ToyCorpus(tokens, n, tokenizer) for n in (args.train_len, args.replay_len))
    tokens = load_tokens(args.data, tokenizer, args.join)
    corpus = Corpus(tokens, args.train_len, remedies[0])
    if args.replay_data:
        tokens = load_tokens(args.replay_data, tokenizer, args.join)
    return corpus, Corpus(tokens, args.replay_len, remedies[1]) if args.replay_steps else corpus
