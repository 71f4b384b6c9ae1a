"""From the command line to a configuration whose every key and type is checked.

A configuration file imports `configs.base` and changes values. A file or a command line that sets
a key that base.py does not have, or gives one another type, is an error of one line that names the
nearest key.
"""

from __future__ import annotations

import difflib
import importlib.util
import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, FieldReference, config_flags

from configs import base

Schema = Callable[[], ConfigDict]


class _OrNone(flags.ArgumentParser):
    """Reads "None" as None and leaves the rest to absl's parser of the type."""

    def __init__(self, parser: flags.ArgumentParser, kind: str):
        self._parser, self._kind = parser, kind

    def parse(self, argument: Any) -> Any:
        try:
            return None if argument in ("None", None) else self._parser.parse(argument)
        except (TypeError, ValueError) as error:
            raise ValueError(f"it must be {self._kind}, not {argument!r}") from error

    def flag_type(self) -> str:
        return self._parser.flag_type()


class _TrueOrFalse(flags.BooleanParser):
    """As absl's, but its error is a sentence."""

    def parse(self, argument: Any) -> bool:
        try:
            return super().parse(argument)
        except (TypeError, ValueError) as error:
            raise ValueError(f"it must be true or false, not {argument!r}") from error


# Keys that may not be None are told apart by `checked`, behind the parser.
config_flags.register_flag_parser_for_type(bool, _TrueOrFalse())
config_flags.register_flag_parser_for_type(int, _OrNone(flags.IntegerParser(), "an int"))
config_flags.register_flag_parser_for_type(float, _OrNone(flags.FloatParser(), "a float"))
config_flags.register_flag_parser_for_type(str, _OrNone(flags.ArgumentParser(), "a string"))


def parse(argv: Sequence[str]) -> tuple[ConfigDict, Path]:
    """Reads ``--config=FILE.py[:VARIANT] [--run=DIR] [--config.KEY=VALUE …]``.

    Args:
      argv: the command line, the program's name first.

    Returns:
      The configuration, and the run folder: runs/FILE, or runs/FILE_VARIANT, unless given.

    Raises:
      ValueError: in one line, what is wrong with the command line or the configuration.
    """
    spec, argv = take_config(argv)
    values = flags.FlagValues()
    default_run = Path("runs") / Path(spec).name.replace(".py:", "_").removesuffix(".py")
    flags.DEFINE_string("run", str(default_run), "run folder", flag_values=values)
    config, argv = override(read_config(spec), "config", argv, values)
    require_no_more(argv)
    return config, Path(values.run)


def override(
    config: ConfigDict,
    name: str,
    argv: Sequence[str],
    values: flags.FlagValues,
    schema: Schema = base.get_config,
    *,
    known_only: bool = False,
) -> tuple[ConfigDict, list[str]]:
    """Sets what ``--NAME.KEY=VALUE`` on the command line says, and reads the flags of `values`.

    Args:
      config: is changed.
      name: of the configuration in flags.
      argv: the command line, the program's name first.
      values: other flags, defined.
      schema: of the configuration.
      known_only: leave flags that are not known for later; otherwise they are an error.

    Returns:
      The configuration, and the command line without what was understood.

    Raises:
      ValueError: in one line, what is wrong.
    """
    for argument in argv:
        if match := re.match(rf"--?(no)?{name}\.(?P<key>[^=]*)", argument):
            _require_key(match["key"], "on the command line", schema)
    try:
        config_flags.DEFINE_config_dict(name, config, flag_values=values, sys_argv=list(argv))
        rest = values(list(argv), known_only=known_only)
    except flags.UnrecognizedFlagError as error:
        keys = [key for key in _flat(schema()) if key.split(".")[-1] == error.flagname]
        hint = f"; did you mean --{name}.{keys[0]}?" if keys else ""
        raise ValueError(f"{_message(error)}{hint}") from error
    except (flags.Error, TypeError, ValueError) as error:
        raise ValueError(_message(error)) from error
    return checked(config, "on the command line", schema), rest


def require_no_more(argv: Sequence[str]) -> None:
    """Raises ValueError if the command line holds more than the program's name."""
    for argument in argv[1:]:
        raise ValueError(f"argument {argument!r} is not understood: give --name=value.")


def read_config(spec: str) -> ConfigDict:
    """Reads and checks a configuration file.

    Args:
      spec: path of the file, or path:VARIANT for a file whose get_config takes a variant.

    Raises:
      ValueError: the file is missing or wrong.
    """
    return checked(load_config(spec), f"in {spec.partition(':')[0]}")


def load_config(spec: str) -> Any:
    """Returns what the get_config of a file returns, unchecked.

    Raises:
      ValueError: the file is missing, or fails.
    """
    path, *variant = spec.split(":", 1)
    if not Path(path).is_file():
        files = sorted(str(file) for file in Path("configs").rglob("*.py") if file.stem[0] != "_")
        near = difflib.get_close_matches(path, files, n=1, cutoff=0)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise ValueError(f"config file {path} does not exist{hint}")
    module_spec = importlib.util.spec_from_file_location("config_file", path)
    if module_spec is None or module_spec.loader is None:
        raise ValueError(f"config file {path} is not a Python file.")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
        return module.get_config(*variant)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        # ConfigDict's own errors and those of a variant that does not exist.
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"{where}: {_message(error)}") from error


def checked(config: Mapping[str, Any], where: str, schema: Schema = base.get_config) -> ConfigDict:
    """Returns `config` as base.py has it: the same keys, each of its type.

    Args:
      config: a ConfigDict or nested dictionaries.
      where: of the configuration, for errors.
      schema: makes the configuration with all keys and their defaults.

    Raises:
      ValueError: a key is missing or unknown, or its value is of another type.
    """
    if not isinstance(config, Mapping | ConfigDict):
        raise ValueError(f"get_config {where} returned {type(config).__name__}, not a ConfigDict.")
    result = schema()
    known = _flat(result)
    given = _flat(config)
    for key in given:
        _require_key(key, where, schema)
    if missing := sorted(known.keys() - given.keys()):
        start = f"{schema.__module__}.get_config()"
        raise ValueError(f"{where}: {missing[0]} is missing; start from {start}.")
    for key, value in given.items():
        parent, _, leaf = key.rpartition(".")
        section = result[parent] if parent else result
        field, kind = known[key], section.get_type(leaf)
        value = value.get() if isinstance(value, FieldReference) else value
        if value is None and isinstance(field, FieldReference):
            section[leaf] = None
            continue
        wrong_items = kind is tuple and not all(isinstance(item, str) for item in value or ())
        if value is None or (kind is not bool and isinstance(value, bool)) or wrong_items:
            raise ValueError(_type_message(key, value, kind, where))
        try:
            section[leaf] = value
        except TypeError as error:
            raise ValueError(_type_message(key, value, kind, where)) from error
    return result.lock()


def _message(error: Any) -> str:
    """Returns an error's message in one line; ConfigDict wraps its KeyErrors in AttributeErrors."""
    while isinstance(error, Exception) and error.args:
        error = error.args[0]
    return " ".join(str(error).split())


def _type_message(key: str, value: Any, kind: type, where: str) -> str:
    kinds = {tuple: "a tuple of strings", int: "an int", bool: "true or false", str: "a string"}
    return f"{where}: {key} is {value!r}, but must be {kinds.get(kind, f'a {kind.__name__}')}."


def take_config(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Returns the value of --config, and the command line without it."""
    for position, argument in enumerate(argv):
        name, equals, value = argument.partition("=")
        if name in ("--config", "-config"):
            end = position + (1 if equals else 2)
            value = value if equals else " ".join(argv[position + 1 : end])
            return value, [*argv[:position], *argv[end:]]
    raise ValueError("--config=FILE.py is missing; for example --config=configs/smoke.py.")


def _require_key(key: str, where: str, schema: Schema = base.get_config) -> None:
    """Raises ValueError, with the nearest key, unless the schema has `key`."""
    keys = list(_flat(schema()))
    if key in keys:
        return

    def likeness(candidate: str) -> float:
        # The whole path is nearly right, or the name is, in another section, or its initials are.
        name, candidate_name = key.split(".")[-1], candidate.split(".")[-1]
        initials = "".join(word[0] for word in candidate_name.split("_"))
        pairs = ((key, candidate), (name, candidate_name), (name, initials))
        return max(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    nearest = max(keys, key=likeness)
    raise ValueError(f"{where}: there is no key {key}; did you mean {nearest}?")


def _flat(config: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"model.num_layers": value, …}; keys that may be None as FieldReferences."""
    if isinstance(config, ConfigDict):
        items = config.items(preserve_field_references=True)
    else:
        items = config.items()
    flat: dict[str, Any] = {}
    for name, value in items:
        if isinstance(value, Mapping | ConfigDict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat
