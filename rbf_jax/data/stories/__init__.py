"""Simple stories, made by a grammar written for this project; the same on every machine."""

from __future__ import annotations

from collections.abc import Iterator

# Of all stories, training before validation, each followed by a zero byte. It names the corpus in
# caches, so it must change with the stories; a test compares it.
CORPUS_SHA256 = "3f26db76d5b40d084f89825d9185df8173fe106a68b04d9063fc695c43a81fb7"

# First seed and number of stories.
_SEEDS = {"train": (0, 4200), "valid": (1_000_000, 220)}


def generate(split: str) -> Iterator[str]:
    """Yields the stories of "train" (4.8 MB) or "valid" (0.25 MB)."""
    from rbf_jax.data.stories.frame import story

    first, count = _SEEDS[split]
    return (story(seed) for seed in range(first, first + count))
