"""`python recipe.py`: what chapters 2 to 6 of recipe.py do to one text, in words and as a figure.
recipe.py passes itself and model.py, because support/ imports none of the four files."""

from pathlib import Path
from types import ModuleType

import torch
from matplotlib.backend_bases import FigureCanvasBase
from torch import Tensor

from support.data.segments import digit_types
from support.data.sources import load_reference, load_tokens
from support.data.text import Corpus
from support.data.toy import TINY
from support.explain import figure, words
from support.explain.distances import DRAWS, Distances, Samples, angles_of
from support.huggingface.config import read_window
from support.huggingface.hub import SMALL, local_folder
from support.huggingface.tokenizer import load_tokenizer
from support.runs.analysis import read_impactful
from support.runs.flags import Parser
from support.system.bad_input import BadInput
from support.system.console import check_ranges, report_errors


def run(argv: list[str] | None, model: ModuleType, recipe: ModuleType) -> None:
    p = Parser("recipe.py", "What LongRecipe does to one text.")
    add = p.add_argument
    add("--model", default=TINY, metavar="DIR", help="model whose tokenizer and RoPE are used")
    add("--text", metavar="FILE", help="a text file (default: Python's language reference)")
    add("--target_len", type=int, default=131_072, metavar="N", help="the new window, tokens")
    length = "length of a sample, tokens (default: 30 %% of --target_len)"
    add("--train_len", type=int, metavar="N", help=length)
    impactful = "impactful.json (default: the model's own; without one, digits are taken)"
    add("--impactful", metavar="FILE", help=impactful)
    add("--figure", default="recipe.png", metavar="PNG", help="file for the figure")
    only = "draw only where each method puts the tokens of a sample"
    add("--positions", metavar="PNG", help=only)
    add("--seed", type=int, default=0, metavar="N", help="seed of the sample")
    with report_errors():
        args = p.parse_args(argv)
        check_ranges(args, above_1=("target_len",), seed=("seed",))
        if args.train_len is None:
            args.train_len = recipe.train_length(args.target_len)
        if not 2 <= args.train_len <= args.target_len:
            raise BadInput(
                f"--train_len {args.train_len} must be between 2 and --target_len {args.target_len}"
            )
        check_path(args.positions or args.figure)
        folder = local_folder(args.model, SMALL)
        if args.positions:
            draw_positions(args, folder, recipe)
        else:
            explain(args, folder, model, recipe)


def check_path(path: str) -> None:
    """BadInput, before any work, if no figure can be written to `path`."""
    formats, folder = FigureCanvasBase.get_supported_filetypes(), Path(path).parent
    if not folder.is_dir():
        raise BadInput(f"--figure {path}: folder {folder} does not exist")
    if Path(path).suffix[1:].lower() not in formats:
        raise BadInput(f"--figure {path} must end in one of .{', .'.join(sorted(formats))}")


def text_of(args, folder: str, recipe: ModuleType):
    """The tokenizer, the generator of everything random, ids (T,) of --text or of the default text,
    at most --target_len, and the starts (N,) of their segments."""
    tokenizer = load_tokenizer(folder)
    generator = torch.Generator().manual_seed(args.seed)
    tokens = load_tokens([args.text], tokenizer) if args.text else load_reference(tokenizer)
    remedy = "give a longer --text, or lower --train_len or --target_len"
    ids = Corpus(tokens, args.train_len, remedy).window(args.target_len, generator)
    return tokenizer, generator, ids, recipe.split_segments(ids, tokenizer)


def samples_of(args, recipe: ModuleType, starts: Tensor, generator) -> Samples:
    """Method -> a few words, and position ids of a sample whose segments begin at `starts`."""
    samples = {}
    for name, (label, _) in recipe.METHODS.items():
        length = args.target_len if name == "full" else args.train_len
        drawn = recipe.sample_position_ids(name, length, args.target_len, starts, generator)
        samples[name] = label, drawn
    return samples


def draw_positions(args, folder: str, recipe: ModuleType) -> None:
    """Draw where each method puts a sample of randomly selected segments."""
    _, generator, ids, starts = text_of(args, folder, recipe)
    _, starts = recipe.select_segments(ids, starts, args.train_len, "random", generator)
    samples = samples_of(args, recipe, starts, generator)
    drawn = figure.draw_positions(samples, starts, args.target_len, read_window(folder))
    drawn.savefig(args.positions, dpi=120, metadata={"Software": None})
    print(f"figure: {args.positions}")


def explain(args, folder: str, model: ModuleType, recipe: ModuleType) -> None:
    """Print and draw which sentences are selected, their positions, and the angles of RoPE."""
    tokenizer, generator, ids, starts = text_of(args, folder, recipe)
    file = args.impactful or words.known_analysis(folder)
    if file:
        select, impactful = "impact", read_impactful(file, tokenizer.vocab_size)
    else:
        select, impactful = "digits", digit_types(tokenizer)
    words.tell_types(file, impactful, ids, tokenizer)

    share = recipe.impactful_share(ids, starts, impactful)
    sizes = recipe.segment_lengths(starts, len(ids))
    kept, new_starts = recipe.select_segments(
        ids, starts, args.train_len, select, generator, impactful
    )
    held = torch.bincount(torch.searchsorted(starts, kept, right=True) - 1, minlength=len(starts))
    words.tell_selection(ids, starts, share, held > 0, len(kept), tokenizer, select)

    draws = [samples_of(args, recipe, new_starts, generator) for _ in range(DRAWS)]
    found = {
        name: Distances.of([draw[name][1] for draw in draws], args.target_len)
        for name in recipe.METHODS
    }
    words.tell_positions(draws[0], found)

    angles = angles_of(folder, args.target_len, model.inverse_frequencies, recipe.ntk_rope_base)
    words.tell_angles(angles)
    selection, window = (share, sizes, held), read_window(folder)
    drawn = figure.draw(draws[0], new_starts, window, selection, found, angles)
    drawn.savefig(args.figure, dpi=90)
    print(f"\nfigure: {args.figure}")
