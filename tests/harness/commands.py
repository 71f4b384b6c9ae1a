"""Commands as README.md and docs/ show them, and the programs that understand them."""

import re
import shlex

from experiments import (
    compare,
    evaluate,
    export,
    generate,
    inspect,
    sweep,
)

PROGRAMS = {
    "experiments.sweep": sweep.main,
    "experiments.evaluate": evaluate.main,
    "experiments.compare": compare.main,
    "experiments.inspect": inspect.main,
    "experiments.generate": generate.main,
    "experiments.export": export.main,
}


def commands_in(text: str) -> list[str]:
    """The indented lines that run a program, with what follows a backslash."""
    return re.findall(
        r"^    (?:srun )?(python -m experiments.*(?:(?<=\\)\n.*)*)", text, re.MULTILINE
    )


def arguments(command: str) -> list[str]:
    """What the program is given, its name first."""
    return shlex.split(command.replace("\\\n", " "), comments=True)[2:]
