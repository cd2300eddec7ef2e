"""What STUDY.yaml says, read and checked without opening a corpus."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from megatron_lfr.run_folder.settings import parse_yaml_file
from megatron_lfr.study.fields import Fields, check_choice

Settings = dict[str, Any]
Length = Literal["budget", "scaled", "schedule"]
LabelsOf = Literal["documents", "blocks"]
StepKind = Literal["train", "evaluate", "commonness", "clean"]

CANDIDATE = "candidate"
"""The name, in contrasts, of the arm that the candidate's rule picks."""
MANAGED = ("save", "load", "seed", "train_iters", "train_samples", "train_epochs")
"""Settings that the study sets for every run."""
OF_CORPORA = ("data_path", "data_args_path")
"""Settings that say what a run trains on: its corpus does."""
_STEP_KEYS: dict[StepKind, tuple[str, ...]] = {
    "train": ("size", "rate"),
    "evaluate": (),
    "commonness": (),
    "clean": ("near_copies", "junk"),
}


@dataclass(frozen=True)
class Labels:
    """What was planted in a corpus: for each document of its prefixes, or for each training block, one of `kinds`.

    file: .npy of integers, which index `kinds`, or a text file with a name a line.
    """

    file: Path
    of: LabelsOf
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class Corpus:
    name: str
    data_path: tuple[str, ...]
    labels: Labels | None


@dataclass(frozen=True)
class Step:
    """A step before an arm's runs: a model that is trained, its losses of all blocks, or commonness of the corpus.

    of: the step whose model `evaluate` takes, or whose results `clean` takes. settings: flags by their keys. size,
    rate: those of the study that a model is trained with; None: the run's.
    """

    name: str
    kind: StepKind
    of: str | None
    settings: Settings
    size: str | None
    rate: str | None


@dataclass(frozen=True)
class Arm:
    """A way of choosing data. corpus: the one it trains on, None for that of the grid. length: how its schedule gets
    the steps that the budget leaves: it is in shares (budget); its phases are stretched in proportion (scaled); it is
    trained as it is, whatever that costs (schedule). compute: the share of the usual budget that it gets."""

    name: str
    settings: Settings
    corpus: str | None
    prepare: tuple[Step, ...]
    length: Length
    compute: float

    @property
    def share(self) -> float | None:
        """The share of the usual budget that it computes; None where its schedule says how long it trains."""
        return None if self.length == "schedule" else self.compute


@dataclass(frozen=True)
class Block:
    """A part of the grid: all combinations of these names."""

    corpora: tuple[str, ...]
    sizes: tuple[str, ...]
    rates: tuple[str, ...]
    arms: tuple[str, ...]
    seeds: tuple[int, ...]
    compute_points: tuple[float, ...]


@dataclass(frozen=True)
class Candidate:
    """The rule that picks an arm: the lowest macro held-out loss among these, at these seeds, which then are in no
    interval of a contrast."""

    among: tuple[str, ...]
    corpus: str
    size: str
    rate: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Contrast:
    """The difference of two arms, `arm` - `against`, in macro held-out loss."""

    arm: str
    against: str

    @property
    def name(self) -> str:
        return f"{self.arm} - {self.against}"


@dataclass(frozen=True)
class Study:
    """compute: the budget of a run of each size, in forward_backward tokens of its model."""

    file: Path
    title: str
    corpora: dict[str, Corpus]
    held_out: tuple[str, ...]
    tasks: tuple[Path, ...]
    train: Settings
    sizes: dict[str, Settings]
    rates: dict[str, Settings]
    compute: dict[str, float]
    arms: dict[str, Arm]
    grid: tuple[Block, ...]
    reference: str
    upper_reference: str | None
    compute_points: tuple[float, ...]
    candidate: Candidate | None
    primary: tuple[Contrast, ...]
    secondary: tuple[Contrast, ...]
    smallest_difference: float

    def settings_of(self, size: str, rate: str, *more: Mapping[str, Any]) -> Settings:
        """Return the settings of a run: the common ones, then those of size and rate, then `more`."""
        merged: Settings = {}
        for settings in (self.train, self.sizes[size], self.rates[rate], *more):
            merged |= settings
        return merged


_KEYS = (
    *("title", "corpora", "held_out", "tasks", "train", "sizes", "rates", "seeds", "compute", "compute_points"),
    *("arms", "grid", "reference", "upper_reference", "candidate", "contrasts", "smallest_difference"),
)


def read_study(file: Path) -> Study:
    """Read STUDY.yaml. ValueError begins with the file's name and says where in it what is wrong."""
    try:
        content = parse_yaml_file(file, file.read_bytes())
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    top = Fields(content, str(file), _KEYS, ("corpora", "held_out", "sizes", "seeds", "compute", "arms"))
    corpora = {name: _corpus(name, value, f"{top.where}: corpora: {name}") for name, value in _some(top, "corpora")}
    sizes = {name: _settings(value, f"{top.where}: sizes: {name}") for name, value in _some(top, "sizes")}
    given_rates = top.named("rates") or {"default": {}}
    rates = {name: _settings(value, f"{top.where}: rates: {name}") for name, value in given_rates.items()}
    names = _Names(corpora, sizes, rates)
    arms = {name: _arm(name, value, f"{top.where}: arms: {name}", names) for name, value in _some(top, "arms")}
    points = top.numbers("compute_points", (1.0,))
    reference = check_choice(top.text("reference", "uniform"), arms, f"{top.where}: reference")
    upper = top.get("upper_reference")
    if upper is not None:
        check_choice(upper, arms, f"{top.where}: upper_reference")
    candidate = _candidate(top, names, arms)
    for name in (reference, *([] if upper is None else [upper]), *(candidate.among if candidate else ())):
        if arms[name].share != 1:
            given = "length: schedule" if arms[name].share is None else f"compute: {arms[name].compute:g}"
            raise ValueError(
                f"{top.where}: arms: {name}: {given}: not of an arm that others are compared with or picked from; give "
                "it to another arm"
            )
    primary, secondary = _contrasts(top, arms, reference, candidate is not None)
    return Study(
        file=file,
        title=top.text("title", file.stem),
        corpora=corpora,
        held_out=_prefixes(top, "held_out"),
        tasks=tuple(map(Path, top.texts("tasks"))),
        train=_settings(top.mapping("train"), f"{top.where}: train"),
        sizes=sizes,
        rates=rates,
        compute=_compute(top, sizes),
        arms=arms,
        grid=_grid(top, names, arms, points),
        reference=reference,
        upper_reference=upper,
        compute_points=points,
        candidate=candidate,
        primary=primary,
        secondary=secondary,
        smallest_difference=top.number("smallest_difference", 0.01),
    )


@dataclass(frozen=True)
class _Names:
    corpora: Mapping[str, Any]
    sizes: Mapping[str, Any]
    rates: Mapping[str, Any]


def _some(fields: Fields, key: str) -> list[tuple[str, Any]]:
    entries = fields.named(key)
    if not entries:
        raise ValueError(f"{fields.where}: {key}: give at least one")
    return list(entries.items())


def _settings(value: Any, where: str) -> Settings:
    """Read settings of runs; their keys have _ for -."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: expected a mapping of settings, as in config.yaml, got {value!r}")
    settings = _with_underscores(value, where)
    for key in settings:
        if key in MANAGED:
            raise ValueError(f"{where}: {key}: is set by the study for every run; leave it out")
        if key in OF_CORPORA:
            raise ValueError(
                f"{where}: {key}: a run trains on a corpus of `corpora`, which an arm may name as `corpus`"
            )
    return settings


def _with_underscores(value: Mapping[Any, Any], where: str) -> Settings:
    settings: Settings = {}
    for key, entry in value.items():
        if not isinstance(key, str):
            raise ValueError(f"{where}: {key!r}: expected the name of a setting")
        name = key.replace("-", "_")
        if name in settings:
            raise ValueError(f"{where}: {key}: given twice, with - and with _")
        settings[name] = entry
    return settings


def _corpus(name: str, value: Any, where: str) -> Corpus:
    fields = Fields(value, where, ("data_path", "labels"), ("data_path",))
    labels = None
    if "labels" in fields:
        given = Fields(fields.get("labels"), f"{where}: labels", ("file", "of", "kinds"), ("file", "kinds"))
        of = check_choice(given.text("of", "documents"), get_args(LabelsOf), f"{given.where}: of")
        labels = Labels(Path(given.text("file")), cast(LabelsOf, of), given.texts("kinds"))
        if not labels.kinds:
            raise ValueError(f"{given.where}: kinds: give at least one name")
    return Corpus(name, _prefixes(fields, "data_path"), labels)


def _prefixes(fields: Fields, key: str) -> tuple[str, ...]:
    """Read a list of prefixes; a pattern (as of files: *, ? and []) stands for all that fit it, in order of names."""
    prefixes: list[str] = []
    for text in fields.texts(key):
        fitting = [text] if glob.escape(text) == text else sorted(glob.glob(f"{text}.idx"))  # noqa: PTH207
        if not fitting:
            raise ValueError(f"{fields.where}: {key}: {text}: no prefix fits, looked for from {Path.cwd()}")
        prefixes += [path.removesuffix(".idx") for path in fitting]
    if not prefixes:
        raise ValueError(f"{fields.where}: {key}: give at least one prefix")
    return tuple(prefixes)


def _arm(name: str, value: Any, where: str, names: _Names) -> Arm:
    fields = Fields({} if value is None else value, where, ("settings", "corpus", "prepare", "length", "compute"))
    corpus = fields.get("corpus")
    if corpus is not None:
        check_choice(corpus, names.corpora, f"{where}: corpus")
    length = check_choice(fields.text("length", "budget"), get_args(Length), f"{where}: length")
    steps: list[Step] = []
    for step, given in fields.named("prepare").items():
        steps.append(_step(step, given, f"{where}: prepare: {step}", steps, names))
    if {"evaluate", "clean"} <= {step.kind for step in steps}:
        raise ValueError(f"{where}: prepare: evaluate and clean do not go together: a cleaned corpus has other blocks")
    compute = fields.number("compute", 1.0)
    if compute != 1 and length == "schedule":
        raise ValueError(f"{where}: compute: {compute:g}: with length: schedule the schedule says how long it trains")
    if name == CANDIDATE:
        raise ValueError(f"{where}: this name stands for the arm that the candidate's rule picks; take another")
    settings = _settings(fields.mapping("settings"), f"{where}: settings")
    return Arm(name, settings, corpus, tuple(steps), cast(Length, length), compute)


def _step(name: str, value: Any, where: str, earlier: list[Step], names: _Names) -> Step:
    legal = (*_STEP_KEYS, *dict.fromkeys(key for keys in _STEP_KEYS.values() for key in keys))
    fields = Fields(value, where, legal)
    kinds = [kind for kind in _STEP_KEYS if kind in fields]
    if len(kinds) != 1:
        raise ValueError(f"{where}: give one of {', '.join(_STEP_KEYS)}")
    kind = kinds[0]
    Fields(value, where, (kind, *_STEP_KEYS[kind]))
    of: str | None = None
    settings: Settings = {}
    if kind in ("evaluate", "clean"):
        taken = "train" if kind == "evaluate" else "commonness"
        known = [step.name for step in earlier if step.kind == taken]
        of = check_choice(fields.text(kind), known, f"{where}: {kind}: a {taken} step before this one")
        settings = {key: fields.get(key) for key in _STEP_KEYS[kind] if key in fields}
        _check_cleaning(settings, next(step for step in earlier if step.name == of), where)
    else:
        settings = _with_underscores(fields.mapping(kind), f"{where}: {kind}")
        given = Fields(settings, f"{where}: {kind}", settings)
        settings |= {key: list(_prefixes(given, key)) for key in ("data_path", "reference_data_path") if key in given}
        if "save" in settings or "output" in settings:
            raise ValueError(f"{where}: where results go is set by the study; leave save and output out")
    for key, legal_names in (("size", names.sizes), ("rate", names.rates)):
        if key in fields:
            check_choice(fields.text(key), legal_names, f"{where}: {key}")
    return Step(name, kind, of, settings, fields.get("size"), fields.get("rate"))


def _check_cleaning(rules: Settings, source: Step, where: str) -> None:
    for key in ("near_copies", "junk"):
        if not isinstance(rules.get(key, True), bool):
            raise ValueError(f"{where}: {key}: expected true or false, got {rules[key]!r}")
    if rules.get("junk") and not source.settings.get("reference_data_path"):
        raise ValueError(f"{where}: junk: needs reference_data_path in the step {source.name}")


def _compute(top: Fields, sizes: Mapping[str, Any]) -> dict[str, float]:
    if not isinstance(top.get("compute"), Mapping):
        return dict.fromkeys(sizes, top.number("compute", 0.0))
    by_size = Fields(top.get("compute"), f"{top.where}: compute", sizes, sizes)
    return {size: by_size.number(size, 0.0) for size in sizes}


def _grid(top: Fields, names: _Names, arms: Mapping[str, Arm], points: tuple[float, ...]) -> tuple[Block, ...]:
    keys = ("corpora", "sizes", "rates", "arms", "seeds", "compute_points")
    given = top.get("grid", [{}])
    if not isinstance(given, list) or not given:
        raise ValueError(f"{top.where}: grid: expected a list of mappings with keys {', '.join(keys)}")
    trained_on = [arm.corpus for arm in arms.values() if arm.corpus is not None]
    default_corpora = [name for name in names.corpora if name not in trained_on] or list(names.corpora)
    blocks = []
    for number, row in enumerate(given, 1):
        fields = Fields(row, f"{top.where}: grid: {number}", keys)
        seeds = fields.integers("seeds") or top.integers("seeds")
        if not seeds:
            raise ValueError(f"{top.where}: seeds: give at least one")
        blocks.append(
            Block(
                fields.choices("corpora", names.corpora) if "corpora" in fields else tuple(default_corpora),
                fields.choices("sizes", names.sizes),
                fields.choices("rates", names.rates),
                fields.choices("arms", arms),
                seeds,
                fields.numbers("compute_points", points),
            )
        )
    return tuple(blocks)


def _candidate(top: Fields, names: _Names, arms: Mapping[str, Arm]) -> Candidate | None:
    if "candidate" not in top:
        return None
    where, keys = f"{top.where}: candidate", ("among", "corpus", "size", "rate", "seeds")
    fields = Fields(top.get("candidate"), where, keys, ("among", "seeds"))
    chosen = {
        key: check_choice(fields.text(key, next(iter(legal))), legal, f"{where}: {key}")
        for key, legal in (("corpus", names.corpora), ("size", names.sizes), ("rate", names.rates))
    }
    if not fields.integers("seeds"):
        raise ValueError(f"{where}: seeds: give at least one")
    return Candidate(fields.choices("among", arms), seeds=fields.integers("seeds"), **chosen)


def _contrasts(
    top: Fields, arms: Mapping[str, Arm], reference: str, has_candidate: bool
) -> tuple[tuple[Contrast, ...], tuple[Contrast, ...]]:
    """Read "ARM", which is compared with the reference, and "ARM - ARM". By default all arms are secondary."""
    fields = Fields(top.get("contrasts", {}), f"{top.where}: contrasts", ("primary", "secondary"))
    legal = [*arms, *([CANDIDATE] if has_candidate else [])]

    def parse(key: str) -> tuple[Contrast, ...]:
        parsed = []
        for text in fields.texts(key):
            arm, minus, against = text.partition(" - ")
            pair = Contrast(arm.strip(), against.strip() if minus else reference)
            for name in (pair.arm, pair.against):
                check_choice(name, legal, f"{fields.where}: {key}: {text}")
            if pair.arm == pair.against:
                raise ValueError(f"{fields.where}: {key}: {text}: compares an arm with itself")
            parsed.append(pair)
        return tuple(parsed)

    primary = parse("primary")
    if "secondary" in fields:
        return primary, parse("secondary")
    others = [Contrast(name, reference) for name in arms if name != reference]
    return primary, tuple(other for other in others if other not in primary)
