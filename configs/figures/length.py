"""The model that all rows of experiments/paper/length.py start from: RBF, RoPE, no sink.

Command:  python -m experiments.paper.length
Hardware: a GPU.

The text is English books, one document each with a line `<|endoftext|>` after it; their files are
not part of the project: put them at data/books-train-1.txt.xz and data/books-valid.txt.xz, or name
others with --base.data.train_files and --base.data.valid_files. The kept records were trained on 86
MB from Project Gutenberg, 24.8 M tokens of a BPE of 4,096 made from the same file; 1,840 steps of
32 rows of 256 tokens are 15.1 M, so that nothing repeats.
"""

from configs import base
from configs.figures import scales

# Of every row.
SEEDS = {"smoke": 2, "paper": 8}
# Contexts to evaluate at, over the length that is trained at.
LENGTHS = {"smoke": (1, 2, 8), "paper": (1, 2, 4, 8, 16, 32)}
# Documents' pieces of the longest context that all contexts are evaluated on.
PIECES = {"smoke": 4, "paper": 128}


def get_config(scale: str = "paper"):
    """Returns the configuration of the scale "smoke" or "paper".

    Raises:
      ValueError: there is no such scale.
    """
    if scale not in SEEDS:
        raise ValueError(f"the scale is {scale!r}; it must be one of {', '.join(SEEDS)}.")
    config = scales.get_config(scale)
    config.model.positions = "rope"
    config.model.attention.sink = "none"
    return _paper(config) if scale == "paper" else config


def _paper(config):
    config.data = base.data()
    config.data.source = "text"
    config.data.train_files = ("data/books-train-1.txt.xz",)
    config.data.valid_files = ("data/books-valid.txt.xz",)
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 4096
    config.train.steps = 1840
    config.train.eval_every = 230
    config.train.checkpoint_every = 1840
    return config
