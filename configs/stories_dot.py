"""The dot-product twin of stories_rbf.py: other attention, positions and register, no more.

Command:  python -m experiments.train --config=configs/stories_dot.py
          On your own text: as stories_rbf.py says.
Hardware: as stories_rbf.py says.

Unlike the original, as stories_rbf.py says: a vocabulary of 8,192 tokens, and tied embeddings.
"""

from configs import stories_rbf
from configs.twins import twin


def get_config():
    """Returns the configuration."""
    return twin(stories_rbf.get_config(), "dot")
