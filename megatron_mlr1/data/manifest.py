"""A list of corpora to make, as YAML: for each its inputs, its tokenizer and what else is chosen.

    defaults:                       # for every corpus that does not say otherwise
      tokenizer: {type: HuggingFaceTokenizer, model: llama3}
      append_eod: true
    corpora:                        # or a list whose items have a `name`
      wiki:
        inputs: wiki/*.jsonl.zst    # or a list
        json_keys: text
        shuffle: 7                  # the seed; false keeps the order of the input
        on_error: skip

Paths are relative to the file. A corpus of one key becomes NAME_text_document.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.error import MarkedYAMLError, YAMLError

from megatron_mlr1.data.encode import EncodePlan
from megatron_mlr1.data.jobs import PreprocessPlan
from megatron_mlr1.data.tokenizers import TokenizerPlan
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.options import choose
from megatron_mlr1.recipes.sheet import CORPUS_NAME

DEFAULT_SEED = 0
TOP = ("defaults", "corpora")
SETTINGS = (
    *("inputs", "json_keys", "tokenizer", "append_eod", "vocab_size", "shuffle", "on_error"),
)
TOKENIZER = {
    field.name.removeprefix("tokenizer_"): field.name
    for field in fields(TokenizerPlan)
    if field.name != "vocab_size"
}
"""What may stand in a tokenizer, and the field of the plan that it is."""
KINDS: dict[str, type] = {
    field.name: type(field.default) if isinstance(field.default, int | tuple) else str
    for field in fields(TokenizerPlan)
}
"""What the value of each field of a tokenizer's plan is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ManifestRun:
    """What the command line says of all corpora of a manifest."""

    path: Path
    output_root: Path
    """The corpora are `OUTPUT_ROOT/NAME_text_document`, as `--data-root` of training wants them."""
    workers: int
    only: tuple[str, ...] = ()
    """Names of the corpora to make; none: all."""
    shard: tuple[int, int] | None = None
    overwrite: bool = False
    journal_bytes: int = 256 << 20


def read_manifest(run: ManifestRun) -> dict[str, PreprocessPlan]:
    """Read a manifest: a plan for each corpus by its name, in the order of the file.

    Raises:
        ConfigError: it cannot be read, is no YAML, or holds what a manifest may not; names the
            line.
    """
    try:
        top = YAML().load(run.path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{run.path}: cannot be read ({error}). Name a YAML file.") from error
    except YAMLError as error:
        raise _not_yaml(run.path, error) from error
    reader = _Reader(run)
    sections = reader.mapping(top, TOP, 1)
    defaults = reader.mapping(sections.get("defaults", CommentedMap()), SETTINGS, 1)
    plans = {}
    for name, row in reader.rows(sections):
        line = _line(row)
        if name in plans:
            raise reader.wrong(line, f"the corpus {name} stands there twice. Name it once.")
        plans[name] = reader.plan(name, defaults, row)
    for name in run.only:
        choose(name, plans, f"corpus in {run.path} called")
    return {name: plan for name, plan in plans.items() if not run.only or name in run.only}


def _not_yaml(path: Path, error: YAMLError) -> ConfigError:
    """Say in one line what the YAML library says in many."""
    what, where = str(error).splitlines()[0], str(path)
    if isinstance(error, MarkedYAMLError):
        what = error.problem or what
        mark = error.problem_mark or error.context_mark
        where = where if mark is None else f"{path}:{mark.line + 1}"
    return ConfigError(f"{where}: not YAML: {what}. Mend the line.")


class _Reader:
    """Reads the nodes of one manifest, and names the line of what is wrong."""

    def __init__(self, run: ManifestRun) -> None:
        self._run = run

    def wrong(self, line: int, what: str) -> ConfigError:
        place = f"{self._run.path}:"
        return ConfigError(what if what.startswith(place) else f"{place}{line}: {what}")

    def mapping(self, node: object, known: Sequence[str], line: int) -> CommentedMap:
        """Refuse what is not a mapping, or has a name that is not known there."""
        if not isinstance(node, CommentedMap):
            raise self.wrong(
                line,
                f"{'nothing' if node is None else repr(node)} stands where names with values must, "
                f"such as {known[0]}: ...",
            )
        for key in node:
            where = f"{self._run.path}:{_line(node, key)}"
            choose(str(key), known, f"setting at {where} called")
        return node

    def rows(self, top: CommentedMap) -> Iterator[tuple[str, CommentedMap]]:
        node = top.get("corpora")
        if isinstance(node, CommentedMap):
            for name, row in node.items():
                line = _line(node, name)
                yield self._name(name, line), self.mapping(row, SETTINGS, line)
        elif isinstance(node, CommentedSeq):
            for number, item in enumerate(node):
                line = int(node.lc.item(number)[0]) + 1
                row = self.mapping(item, ("name", *SETTINGS), line)
                yield self._name(row.get("name"), line), row
        else:
            raise self.wrong(1, "no corpora. Write `corpora:` with a name and inputs below it.")

    def _name(self, name: object, line: int) -> str:
        if not isinstance(name, str) or not CORPUS_NAME.fullmatch(name):
            raise self.wrong(
                line,
                f"the name of a corpus is {name!r}; it must be a plain file name of letters, "
                "digits, dots, dashes and underscores, for its files get it.",
            )
        return name

    def plan(self, name: str, defaults: CommentedMap, row: CommentedMap) -> PreprocessPlan:
        chosen = _Settings(self, defaults, row)
        keys = chosen.texts("json_keys", ["text"])
        seed = chosen.value("shuffle", DEFAULT_SEED, (bool, int), "a seed, or false")
        seed = (DEFAULT_SEED if seed else None) if isinstance(seed, bool) else seed
        on_error = chosen.value("on_error", "stop", (str,), "stop or skip")
        if on_error not in ("stop", "skip"):
            raise chosen.wrong("on_error", f"{on_error!r} must be stop or skip.")
        inputs = chosen.texts("inputs", [])
        if not inputs:
            raise self.wrong(_line(row), f"the corpus {name} has no inputs.")
        try:
            return PreprocessPlan(
                inputs=tuple(self._path(text) for text in inputs),
                output_prefix=str(self._run.output_root / name),
                output_key="text" if len(keys) == 1 else None,
                encode=EncodePlan(
                    tokenizer=self._tokenizer(chosen),
                    json_keys=tuple(keys),
                    append_eod=chosen.value("append_eod", False, (bool,), "true or false"),
                    vocab_size=chosen.value("vocab_size", None, (int,), "a number"),
                    workers=self._run.workers,
                    skip_bad=on_error == "skip",
                ),
                shard=self._run.shard,
                shuffle_seed=seed,
                overwrite=self._run.overwrite,
                journal_bytes=self._run.journal_bytes,
            )
        except ConfigError as error:
            raise self.wrong(_line(row), str(error)) from error

    def _path(self, text: str) -> str:
        return text if "://" in text else str(self._run.path.parent / text)

    def _tokenizer(self, chosen: "_Settings") -> TokenizerPlan:
        node = chosen.value("tokenizer", None, (CommentedMap,), "type and model")
        if node is None:
            raise chosen.wrong("tokenizer", "a tokenizer is missing: {type: ..., model: ...}.")
        known = self.mapping(node, tuple(TOKENIZER), chosen.line("tokenizer"))
        if "type" not in known:
            raise chosen.wrong("tokenizer", "the tokenizer has no type.")
        values: dict[str, Any] = {}
        for key, value in known.items():
            values[TOKENIZER[key]] = tuple(value) if isinstance(value, list) else value
            kind = KINDS[TOKENIZER[key]]
            if type(values[TOKENIZER[key]]) is not kind:
                raise self.wrong(
                    _line(known, key), f"{key} is {value!r}; it must be a {kind.__name__}."
                )
        model = values.get("tokenizer_model")
        # What is not there beside the file may be a name on the hub.
        if model is not None and (self._run.path.parent / str(model)).exists():
            values["tokenizer_model"] = str(self._run.path.parent / str(model))
        vocab_size = chosen.value("vocab_size", None, (int,), "a number")
        return TokenizerPlan(**values, vocab_size=vocab_size)


class _Settings:
    """The settings of one corpus over the defaults."""

    def __init__(self, reader: _Reader, defaults: CommentedMap, row: CommentedMap) -> None:
        self._reader, self._nodes = reader, (row, defaults)

    def line(self, name: str) -> int:
        node = next((node for node in self._nodes if name in node), self._nodes[0])
        return _line(node, name if name in node else None)

    def wrong(self, name: str, what: str) -> ConfigError:
        return self._reader.wrong(self.line(name), f"{name}: {what}")

    def value(self, name: str, default: Any, kinds: tuple[type, ...], what: str) -> Any:
        for node in self._nodes:
            if name in node:
                found = node[name]
                wrong_bool = isinstance(found, bool) and bool not in kinds
                if wrong_bool or not isinstance(found, kinds):
                    raise self.wrong(name, f"{found!r} must be {what}.")
                return found
        return default

    def texts(self, name: str, default: list[str]) -> list[str]:
        found = self.value(name, default, (str, list), "text, or a list of texts")
        texts = [found] if isinstance(found, str) else list(found)
        if not all(isinstance(text, str) for text in texts):
            raise self.wrong(name, f"{texts!r} must be texts. Write them in quotes.")
        return texts


def _line(node: Mapping[Any, Any], key: object = None) -> int:
    """Give the line of a node or of one of its keys; a file begins with line 1."""
    assert isinstance(node, CommentedMap), "nodes are as they were read"
    if key is not None and node.lc.data and key in node.lc.data:
        return int(node.lc.key(key)[0]) + 1
    return int(node.lc.line or 0) + 1
