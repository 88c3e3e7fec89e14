"""From a mixture's names to files: which .bin/.idx pairs below the data root, and their weights."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_mlr1.data.disk import names_the_file
from megatron_mlr1.errors import DataError
from megatron_mlr1.recipes import Corpus, Mixture

KINDS = ("text", "chat")
"""What the name of a corpus of one pair says after its own: documents, or packed chats."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedCorpus:
    """One pair of files, or one of the several pairs of a corpus."""

    name: str
    """The corpus, as the mixture names it; its several pairs have the same name."""

    weight: float
    """Share of the samples."""

    prefix: Path
    """The path of the pair without .bin and .idx."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Blend:
    """Which corpora are read, and from which sample on."""

    first_sample: int
    """The first that is drawn by these weights; 0 for the first blend of a run."""

    corpora: tuple[ResolvedCorpus, ...]


def resolve(mixture: Mixture, data_root: Path) -> tuple[ResolvedCorpus, ...]:
    """Find the files of every corpus whose weight is above zero, in the order of the mixture.

    A corpus NAME is `data_root/NAME_text_document.{bin,idx}`, or packed chats
    `data_root/NAME_chat_document.{bin,idx}`, or all `*_document.{bin,idx}` of the folder
    `data_root/NAME`; the pairs of a folder share the weight by the bytes of their .bin.

    Raises:
        DataError: corpora without files, halves of pairs, or pairs without a token; names all of
            them with the paths that were tried.
    """
    found: list[ResolvedCorpus] = []
    faults: list[str] = []
    for corpus in mixture.corpora:
        if corpus.weight == 0:
            continue
        try:
            with names_the_file(data_root, DataError):
                found += _share_out(corpus, _pairs(corpus.name, data_root))
        except DataError as error:
            faults.append(f"  {corpus.name} ({corpus.dataset}): {error}")
    if faults:
        raise DataError(
            f"The mixture {mixture.name} reads {len(mixture.corpora)} corpora below {data_root}; "
            f"{len(faults)} cannot be read:\n" + "\n".join(faults) + "\n"
            "A corpus is made from JSON lines by\n"
            "  python tools/preprocess_data.py --input FILE.jsonl "
            f"--output-prefix {data_root}/NAME "
            "--tokenizer-type HuggingFaceTokenizer --tokenizer-model DIR --append-eod\n"
            "or take another mixture, or a file of your own: --mixture FILE.yaml"
        )
    return tuple(found)


def data_path_words(corpora: Iterable[ResolvedCorpus]) -> tuple[str, ...]:
    """Write the engine's flag for these corpora: `--data-path weight prefix weight prefix ...`."""
    pairs = ((repr(corpus.weight), str(corpus.prefix)) for corpus in corpora)
    return ("--data-path", *(word for pair in pairs for word in pair))


def _pairs(name: str, data_root: Path) -> list[Path]:
    """Find the prefixes of a corpus, each with both its files.

    Raises:
        DataError: none, a half, or two homes for one name.
    """
    folder = data_root / name
    files = [path for end in ("bin", "idx") for path in folder.glob(f"*_document.{end}")]
    singles = [data_root / f"{name}_{kind}_document" for kind in KINDS]
    homes = [
        [prefix]
        for prefix in singles
        if _file(prefix, "bin").exists() or _file(prefix, "idx").exists()
    ]
    if files:
        homes.append(sorted({path.with_suffix("") for path in files}))
    if not homes:
        raise DataError(
            f"neither {singles[0]}.bin nor {singles[1]}.bin nor {folder}/*_document.bin exists"
        )
    if len(homes) > 1:
        raise DataError(
            f"both {homes[0][0]}.bin and {homes[1][0]}.bin exist, and only one may be the corpus; "
            "move the other away"
        )
    (prefixes,) = homes
    halves = [
        f"{_file(prefix, end)} is missing beside its other half"
        for prefix in prefixes
        for end in ("bin", "idx")
        if not _file(prefix, end).exists()
    ]
    if halves:
        raise DataError("; ".join(halves) + "; preprocess it again")
    return prefixes


def _share_out(corpus: Corpus, prefixes: list[Path]) -> list[ResolvedCorpus]:
    """Split the weight of a corpus by the bytes of each .bin; empty pairs drop out."""
    sizes = {prefix: _file(prefix, "bin").stat().st_size for prefix in prefixes}
    total = sum(sizes.values())
    if total == 0:
        empty = ", ".join(f"{prefix}.bin" for prefix in prefixes)
        raise DataError(f"{empty} holds no token; preprocess it again")
    return [
        ResolvedCorpus(name=corpus.name, weight=corpus.weight * size / total, prefix=prefix)
        for prefix, size in sizes.items()
        if size
    ]


def _file(prefix: Path, end: str) -> Path:
    return prefix.with_name(f"{prefix.name}.{end}")
