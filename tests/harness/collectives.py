"""What a compiled program sends from device to device."""

import re

_MOVES = re.compile(r"(all-gather|all-to-all|reduce-scatter|collective-permute)(?:-start)?\(")


def collectives(compiled):
    """How often each collective that moves arrays, and does not add them up, is in the program."""
    found = _MOVES.findall(compiled.as_text())
    return {name: found.count(name) for name in set(found)}
