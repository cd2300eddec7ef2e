"""Settings by key, as YAML files give them: they become flags, and their values are checked as those of flags are."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import itertools
from collections.abc import Mapping, Sequence
from types import NoneType, UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from megatron_lfr.output import did_you_mean

T = TypeVar("T")


def to_flags(settings: Mapping[str, Any], config: type, where: str, more: Sequence[str] = ()) -> list[str]:
    """Turn settings of a configuration into flags. ValueError begins with `where` and names a key that is none of
    `config` and its sections, nor of `more` (which become no flags), and one with a list or no value where that is not
    legal."""
    types = _types(config)
    argv: list[str] = []
    for key, value in settings.items():
        name = str(key).replace("-", "_")
        if name not in types and name not in more:
            raise ValueError(f"{where}: unknown key {key!r}{did_you_mean(name, [*types, *more], cutoff=0.5)}")
        if name in types:
            _check_shape(name, value, types[name], f"{where}: {key}")
            argv += as_flag(name, value)
    return argv


def parse_flags(config: type[T], argv: Sequence[str], where: str, default: T | None = None) -> T:
    """Parse flags that stand for keys. ValueError begins with `where` and says in one line what is wrong."""
    said = io.StringIO()
    given: dict[str, Any] = {} if default is None else {"default": default}
    given["config"] = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            parsed: T = tyro.cli(config, args=list(argv), **given)
    except SystemExit:
        raise ValueError(f"{where}: {_first_words(said.getvalue())}") from None
    return parsed


def _first_words(message: str) -> str:
    """Return what is wrong by tyro's message: a box or lines, in which that stands after a title and before a rule."""
    lines = [line.strip("│╭╮╰╯─- ") for line in message.splitlines()]
    said = itertools.dropwhile(lambda line: not line, lines[1:])
    return " ".join(itertools.takewhile(bool, said)).removeprefix("Error parsing ")


@functools.cache
def _types(config: type) -> dict[str, Any]:
    """Return the type of each setting of a configuration, whose fields are settings or sections of them."""
    types: dict[str, Any] = {}
    for name, hint in get_type_hints(config, include_extras=True).items():
        types |= _types(hint) if isinstance(hint, type) and dataclasses.is_dataclass(hint) else {name: hint}
    return types


def _check_shape(name: str, value: Any, hint: Any, where: str) -> None:
    kinds = _kinds(hint)
    if isinstance(value, list) and not {list, tuple} & set(kinds) and name != "lfr_schedule":
        raise ValueError(f"{where}: takes one value, not a list, got {value!r}")
    if isinstance(value, Mapping):
        raise ValueError(f"{where}: takes a value, not a mapping, got {value!r}")
    if bool in kinds and not isinstance(value, bool | NoneType):
        raise ValueError(f"{where}: expected true or false, got {value!r}")
    if value is None and NoneType not in kinds:
        raise ValueError(f"{where}: has no value; leave the key out for the default")


def _kinds(hint: Any) -> list[Any]:
    """Return the types that a value may be of, a list's without what it holds."""
    if get_origin(hint) is Annotated:
        return _kinds(get_args(hint)[0])
    if get_origin(hint) in (Union, UnionType):
        return [kind for part in get_args(hint) for kind in _kinds(part)]
    return [get_origin(hint) or hint]


def as_flag(name: str, value: Any) -> list[str]:
    """Return the words of a command line that give a setting."""
    flag = "--" + name.replace("_", "-")
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    if name == "lfr_schedule" and isinstance(value, list):
        return [flag, yaml.safe_dump(value, default_flow_style=True, width=10**9).strip()]
    if name == "lfr_scores" and isinstance(value, list):  # repeated, one value each
        return [word for one in value for word in (flag, str(one))]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]
