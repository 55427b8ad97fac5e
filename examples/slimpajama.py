"""The paper's training data, as token files for train.py --data.

    pip install datasets "transformers>=5"
    python examples/slimpajama.py DIR    # DIR: the model; 10,000 files, data/slimpajama

Needs a network and access to the Llama 2 tokenizer, which is gated on the hub. Not run with them
by this project. Each row of the data set is 131,072 tokens of Llama 2: decoded, and encoded for
the model.
"""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from model import load_tokenizer
from support.runs.flags import Parser
from support.system.bad_input import BadInput
from support.system.console import check_ranges, progress, report_errors

NAME, SAMPLES = "yaofu/slimpajama-per-source-length-upsample", 10_000


def main(argv: list[str] | None = None) -> None:
    p = Parser("slimpajama.py", __doc__)
    p.add_argument("model", metavar="DIR", help="its tokenizer encodes the texts")
    p.add_argument("--out", default="data/slimpajama", metavar="DIR")
    p.add_argument("--samples", type=int, default=SAMPLES, help="rows; the paper's number")
    with report_errors():
        args = p.parse_args(argv)
        check_ranges(args, at_least_1=("samples",))
        try:
            import datasets  # here, so that --help needs neither
            import transformers
        except ImportError as error:
            raise BadInput(f'{error}: pip install datasets "transformers>=5"') from error

        mine = load_tokenizer(args.model)
        llama2 = transformers.AutoTokenizer.from_pretrained("meta-llama/Llama-2-7b-hf")
        rows = datasets.load_dataset(NAME, split="train", streaming=True).take(args.samples)
        out = Path(args.out)
        out.mkdir(parents=True, exist_ok=True)
        for i, row in enumerate(progress(rows, "samples", total=args.samples, unit="sample")):
            np.save(out / f"{i}.npy", np.array(mine.encode(llama2.decode(row["input_ids"]))))


if __name__ == "__main__":
    main()
