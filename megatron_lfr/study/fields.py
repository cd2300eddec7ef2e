"""Reads mappings of STUDY.yaml: unknown keys are refused with close matches, and values of the wrong type by name."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from megatron_lfr.output import did_you_mean, exponent_hint, is_number

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_+-]*")


class Fields:
    """A mapping at `where`, for instance "study.yaml: arms: lfr"; every error begins with that."""

    def __init__(self, value: Any, where: str, legal: Collection[str], required: Collection[str] = ()) -> None:
        self.where = where
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected a mapping with keys {', '.join(legal)}, got {value!r}")
        self._values: dict[str, Any] = dict(value)
        for key in self._values:
            if key not in legal:
                raise ValueError(f"{where}: unknown key {key!r}{close_matches(key, legal)}")
        for key in required:
            if key not in self._values:
                raise ValueError(f"{where}: {key} is missing")

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def get(self, key: str, default: Any = None) -> Any:
        """Return a value as it is."""
        return self._values.get(key, default)

    def text(self, key: str, default: str | None = None) -> str:
        """Return a text."""
        value = self._values.get(key, default)
        if not isinstance(value, str) or not value:
            raise ValueError(f"{self.where}: {key}: expected a text, got {value!r}")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """Return a mapping with names for keys, empty where it is not given."""
        value = self._values.get(key)
        value = {} if value is None else value
        if not isinstance(value, Mapping):
            raise ValueError(f"{self.where}: {key}: expected a mapping, got {value!r}")
        for name in value:
            if not isinstance(name, str):
                raise ValueError(
                    f"{self.where}: {key}: {name!r}: a name must be a text; put one that YAML takes for something "
                    "else, as on, no and numbers, in quotes"
                )
        return dict(value)

    def named(self, key: str) -> dict[str, Any]:
        """Return a mapping whose keys become parts of file names."""
        mapping = self.mapping(key)
        for name in mapping:
            if not _NAME.fullmatch(name):
                raise ValueError(f"{self.where}: {key}: {name!r}: a name has letters, digits, _, + and -")
        return mapping

    def texts(self, key: str) -> tuple[str, ...]:
        """Return a list of texts, empty where it is not given."""
        return tuple(self._list(key, lambda entry: isinstance(entry, str) and bool(entry), "texts"))

    def numbers(self, key: str, default: tuple[float, ...]) -> tuple[float, ...]:
        """Return a list of positive numbers."""
        return tuple(map(float, self._list(key, _is_positive, "positive numbers", list(default))))

    def integers(self, key: str) -> tuple[int, ...]:
        """Return a list of integers from 0 to below 2^63, each once; empty where it is not given."""
        what = "integers of at least 0 and below 2^63"
        values = self._list(key, lambda entry: type(entry) is int and 0 <= entry < 2**63, what)
        if len(set(values)) != len(values):
            raise ValueError(f"{self.where}: {key}: {values}: one is given twice")
        return tuple(values)

    def number(self, key: str, default: float) -> float:
        """Return a positive number."""
        value = self._values.get(key, default)
        if not _is_positive(value):
            raise ValueError(f"{self.where}: {key}: expected a positive number, got {value!r}{exponent_hint(value)}")
        return float(value)

    def choices(self, key: str, legal: Collection[str]) -> tuple[str, ...]:
        """Return a list of names of `legal`; all of them where it is not given."""
        names = self.texts(key)
        for name in names:
            check_choice(name, legal, f"{self.where}: {key}")
        return names or tuple(legal)

    def _list(self, key: str, is_legal: Any, what: str, default: list[Any] | None = None) -> list[Any]:
        value = self._values.get(key)
        value = (default or []) if value is None else value
        if not isinstance(value, list) or not all(map(is_legal, value)):
            raise ValueError(f"{self.where}: {key}: expected a list of {what}, got {value!r}")
        return value


def check_choice(name: str, legal: Collection[str], where: str) -> str:
    """Return `name`; ValueError where it is none of `legal`."""
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected a name, got {name!r}")
    if name not in legal:
        raise ValueError(f"{where}: unknown name {name!r}{close_matches(name, legal)}")
    return name


def close_matches(name: Any, legal: Collection[str]) -> str:
    """Return a hint at the legal names that resemble `name`, or at all of them."""
    return did_you_mean(str(name), legal) or f"; legal: {', '.join(legal) or 'none'}"


def _is_positive(value: Any) -> bool:
    return is_number(value) and value > 0
