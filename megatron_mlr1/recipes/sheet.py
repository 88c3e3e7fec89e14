"""The YAML sheets of this package and of its users: what may stand in one, and its sources.

A sheet is a named layer of engine flags, `NAME: VALUE  # SOURCE`, by the engine's own names without
their dashes. `true` writes the flag, `false` takes it back from the layers below, a list writes
several values. A mixture is a sheet of corpora and their weights.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from math import isfinite
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap
from ruamel.yaml.error import YAMLError

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.options import choose

Scalar = bool | int | float | str

KEYS = {
    "models": {"about", "flags"},
    "stages": {"about", "flags", "mixture", "starts_from", "needs"},
    "recipe": {"about", "flags", "model", "stage", "mixture"},
    "mixtures": {"about", "corpora"},
    "corpus": {"weight", "dataset"},
}
"""What may stand at the top of each kind of sheet, and in one corpus of a mixture."""

FLAG_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
CORPUS_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """One flag of the engine with its values and their source."""

    name: str
    """The flag without its dashes."""

    values: tuple[str, ...]
    """The words after the flag; none for a flag that is on by being there."""

    source: str
    """Where the value comes from: the comment at the end of its line."""

    on: bool = True
    """False takes the flag back from the layers below."""

    @property
    def words(self) -> tuple[str, ...]:
        """The flag as it stands on a command line."""
        return (f"--{self.name}", *self.values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """One layer of a recipe."""

    about: str
    """What it is, in one line."""

    flags: tuple[Flag, ...]
    """The flags in the order of the file."""

    model: str | None = None
    """A user's recipe only: the model below it."""

    stage: str | None = None
    """A user's recipe only: the stage below it."""

    mixture: str | None = None
    """Name or file of the mixture that the stage reads."""

    starts_from: str | None = None
    """A stage only: the stage whose weights it starts from."""

    needs: str | None = None
    """A stage only: what the command line must bring beside its corpora, a key of `plan.NEEDS`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """One row of a mixture."""

    name: str
    """The corpus as the file system names it below the data root."""

    weight: float
    """Share of the samples; shares need not sum to one, the engine normalises them."""

    dataset: str
    """What the corpus is called where it is published."""

    source: str
    """Where the weight comes from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mixture:
    """Corpora and their weights."""

    name: str
    """Name of the packaged mixture, or the file."""

    about: str
    """What it is, in one line."""

    corpora: tuple[Corpus, ...]
    """The corpora in the order of the file."""


def names(kind: str) -> tuple[str, ...]:
    """Name the packaged sheets of a kind ("models", "stages" or "mixtures"), sorted."""
    folder = resources.files(__package__).joinpath(kind)
    stems = (entry.name.removesuffix(".yaml") for entry in folder.iterdir())
    return tuple(sorted(stems))


def packaged(kind: str, name: str) -> Sheet:
    """Read the packaged model or stage `name`.

    Raises:
        ConfigError: there is none of that name.
    """
    choose(name, names(kind), kind.removesuffix("s"))
    return _sheet(_packaged_text(f"{kind}/{name}"), f"{kind}/{name}.yaml", kind)


def common() -> Sheet:
    """Read the layer below all others."""
    return _sheet(_packaged_text("common"), "common.yaml", "models")


def user_recipe(path: Path) -> Sheet:
    """Read a user's own recipe; a mixture file in it is relative to the recipe.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or has a key that a recipe has not.
    """
    sheet = _sheet(_text(path), str(path), "recipe")
    if sheet.mixture is None or not sheet.mixture.endswith((".yaml", ".yml")):
        return sheet
    return replace(sheet, mixture=str(path.parent / sheet.mixture))


def mixture(name: str) -> Mixture:
    """Read a mixture, packaged or from a file.

    Raises:
        ConfigError: neither a packaged name nor a readable .yaml file, or weights that are no
            shares.
    """
    if name.endswith((".yaml", ".yml")):
        return _mixture(_text(Path(name)), name)
    choose(name, names("mixtures"), "mixture")
    return _mixture(_packaged_text(f"mixtures/{name}"), name)


def _packaged_text(stem: str) -> str:
    return resources.files(__package__).joinpath(f"{stem}.yaml").read_text(encoding="utf-8")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({error}). Give the path of a YAML file, or the name of a "
            "packaged one: `python tools/recipes.py list`."
        ) from error


def _load(text: str, where: str, kind: str) -> CommentedMap:
    try:
        top = YAML().load(text)
    except YAMLError as error:
        raise ConfigError(f"{where}: not YAML. {error}") from error
    return _mapping(top, where, kind)


def _mapping(node: object, where: str, kind: str | None) -> CommentedMap:
    """Refuse what is not a mapping, or has a key that its kind has not; None allows any key."""
    if not isinstance(node, CommentedMap):
        raise ConfigError(
            f"{where}: holds {node!r} where names with values must stand, `name: value` on lines "
            "of their own. docs/recipe.md has an example."
        )
    for key in node:
        if not isinstance(key, str):
            raise ConfigError(f"{where}: {key!r} is not a name; write it in quotes.")
        if kind is not None:
            choose(key, sorted(KEYS[kind]), f"key in {where} called")
    return node


def _sheet(text: str, where: str, kind: str) -> Sheet:
    top = _load(text, where, kind)
    flags = _mapping(top.get("flags", CommentedMap()), f"{where}: flags", None)
    return Sheet(
        about=_line(top, "about", where) or "",
        flags=tuple(_flags(flags, where)),
        **{key: _line(top, key, where) for key in KEYS[kind] - {"about", "flags"}},
    )


def _line(node: CommentedMap, key: str, where: str) -> str | None:
    value = node.get(key)
    if value is not None and not isinstance(value, str):
        raise ConfigError(f"{where}: `{key}` is {value!r}; it must be text. Write it in quotes.")
    return value


def _flags(node: CommentedMap, where: str) -> Iterator[Flag]:
    for name, value in node.items():
        if not FLAG_NAME.fullmatch(name):
            raise ConfigError(
                f"{where}: {name!r} is not the name of a flag; write the engine's name without "
                "its leading dashes, for example `num-layers`."
            )
        values = value if isinstance(value, list) else [value]
        yield Flag(
            name=name,
            values=() if isinstance(value, bool) else tuple(_word(v, name, where) for v in values),
            source=_comment(node, name) or where,
            on=value is not False,
        )


def _word(value: object, name: str, where: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float):
        return repr(float(value))
    if isinstance(value, int) and not isinstance(value, bool):
        return str(int(value))
    raise ConfigError(
        f"{where}: {name} is {value!r}; it must be a number, text, a list of them, true or false."
    )


def _comment(node: CommentedMap, key: str) -> str:
    """Read the comment at the end of the line of `key`; empty where there is none."""
    token = (node.ca.items.get(key) or [None] * 3)[2]
    if token is None or not token.value.startswith("#"):
        return ""
    return str(token.value.splitlines()[0].removeprefix("#").strip())


def _mixture(text: str, name: str) -> Mixture:
    top = _load(text, name, "mixtures")
    rows = _mapping(top.get("corpora"), f"{name}: corpora", None)
    corpora = tuple(_corpus(rows[key], key, name) for key in rows)
    if sum(corpus.weight for corpus in corpora) <= 0:
        raise ConfigError(f"{name}: no corpus has a weight above zero; at least one must.")
    return Mixture(name=name, about=_line(top, "about", name) or "", corpora=corpora)


def _corpus(node: object, corpus: str, where: str) -> Corpus:
    if not CORPUS_NAME.fullmatch(corpus):
        raise ConfigError(
            f"{where}: corpus {corpus!r} must be a plain file name of letters, digits, dots, "
            "dashes and underscores; its files are found by that name below --data-root."
        )
    row = _mapping(node, f"{where}: {corpus}", "corpus")
    weight = row.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise ConfigError(f"{where}: the weight of {corpus} is {weight!r}; it must be a number.")
    if not isfinite(weight) or weight < 0:
        raise ConfigError(f"{where}: the weight of {corpus} is {weight}; it must be zero or more.")
    return Corpus(
        name=corpus,
        weight=float(weight),
        dataset=_line(row, "dataset", where) or corpus,
        source=_comment(row, "weight") or where,
    )
