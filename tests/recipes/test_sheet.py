"""The packaged sheets are whole and sourced; a user's sheet is read, or refused with a reason."""

import math
import re
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.recipes.sheet import (
    Flag,
    Sheet,
    common,
    mixture,
    names,
    packaged,
    user_recipe,
)

MODELS, STAGES, MIXTURES = names("models"), names("stages"), names("mixtures")
DOCS = Path(__file__).parents[2] / "docs" / "recipe.md"
UNSOURCED = re.compile(r".*\.yaml")
"""A value without a comment has the name of its file for a source."""


def layers() -> Iterator[tuple[str, Sheet]]:
    yield "common", common()
    for kind in ("models", "stages"):
        for name in names(kind):
            yield name, packaged(kind, name)


def sources() -> list[str]:
    flags = [flag.source for _, layer in layers() for flag in layer.flags]
    return flags + [corpus.source for name in MIXTURES for corpus in mixture(name).corpora]


def number(layer: Sheet, name: str) -> int:
    return next(int(flag.values[0]) for flag in layer.flags if flag.name == name)


def test_the_paper_has_three_models_and_six_stages() -> None:
    assert MODELS == ("140m", "360m", "950m", "tiny")
    assert set(STAGES) == {
        "pretrain_phase1",
        "pretrain_phase2",
        "midtrain_phase1",
        "midtrain_phase2",
        "sft_general",
        "sft_reasoning",
    }


def test_every_value_has_its_source() -> None:
    for name, layer in layers():
        bare = [flag.name for flag in layer.flags if UNSOURCED.fullmatch(flag.source)]
        assert bare == [], name
    for name in MIXTURES:
        bare = [c.name for c in mixture(name).corpora if c.source == name]
        assert bare == [], name


def test_every_sheet_says_what_it_is_in_one_line() -> None:
    for name, layer in layers():
        assert 20 < len(layer.about) < 100, name
    for name in MIXTURES:
        assert 20 < len(mixture(name).about) < 100, name


def test_every_decision_that_a_source_points_at_is_documented_and_no_number_is_skipped() -> None:
    used = {
        decision for text in [*sources(), *abouts()] for decision in re.findall(r"\((D\d+)\)", text)
    }
    documented = set(re.findall(r"^\| (D\d+) \|", DOCS.read_text(), flags=re.MULTILINE))
    assert used <= documented
    assert documented == {f"D{n}" for n in range(1, len(documented) + 1)}


def abouts() -> list[str]:
    return [layer.about for _, layer in layers()]


def test_every_recipe_is_named_in_the_documentation() -> None:
    text = DOCS.read_text()
    missing = [name for name in (*MODELS, *STAGES, *MIXTURES) if f"`{name}`" not in text]
    assert missing == []


@pytest.mark.parametrize(
    ("model", "parameters"),
    [("140m", 140_248_512), ("360m", 359_431_168), ("950m", 949_685_760)],
)
def test_dimensions_give_the_published_number_of_parameters(model: str, parameters: int) -> None:
    layer = packaged("models", model)
    width, head = number(layer, "hidden-size"), number(layer, "kv-channels")
    attention = 2 * width * head * number(layer, "num-attention-heads")
    attention += 2 * width * head * number(layer, "num-query-groups")
    block = attention + 3 * width * number(layer, "ffn-hidden-size") + 2 * width
    embedding = number(layer, "padded-vocab-size") * width
    assert embedding + number(layer, "num-layers") * block + width == parameters


def test_the_vocabulary_splits_over_every_tensor_parallel_size_that_the_heads_allow() -> None:
    for model in ("140m", "360m", "950m"):
        layer = packaged("models", model)
        groups = number(layer, "num-query-groups")
        allowed = [size for size in range(1, groups + 1) if groups % size == 0]
        assert [number(layer, "padded-vocab-size") % size for size in allowed] == [0] * len(allowed)


@pytest.mark.parametrize(
    ("name", "total"),
    [
        ("pretrain_phase1", 1.0001),
        ("pretrain_phase1_model_card", 0.9999),
        ("pretrain_phase2", 0.9999),
        ("midtrain_phase1", 0.9999),
        ("midtrain_phase2", 0.9998),
        ("sft_general", 1.0),
        ("sft_reasoning", 1.0),
    ],
)
def test_a_mixture_sums_to_what_the_paper_prints(name: str, total: float) -> None:
    assert math.fsum(c.weight for c in mixture(name).corpora) == pytest.approx(total, abs=1e-9)


def test_every_mixture_is_reached_by_a_stage_or_documented_as_an_alternative() -> None:
    used = {packaged("stages", stage).mixture for stage in STAGES}
    assert set(MIXTURES) - used == {"pretrain_phase1_model_card"}


def test_a_corpus_is_the_same_data_set_in_every_mixture() -> None:
    datasets: dict[str, set[str]] = {}
    for name in MIXTURES:
        for corpus in mixture(name).corpora:
            datasets.setdefault(corpus.name, set()).add(corpus.dataset)
    assert {name for name, found in datasets.items() if len(found) > 1} == set()


def test_every_file_of_the_package_is_a_sheet_that_is_listed() -> None:
    root = resources.files("megatron_mlr1.recipes")
    for kind in ("models", "stages", "mixtures"):
        files = sorted(entry.name for entry in root.joinpath(kind).iterdir())
        assert files == [f"{name}.yaml" for name in names(kind)]


def test_a_users_recipe_is_read_with_its_comments(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(
        "model: tiny\nflags:\n  lr: 1.5e-3  # swept in May\n  # why\n  bf16: false\n"
        "  seed: 12_000\n  recompute-modules: [core_attn, mlp]\n  profile: true\n"
    )
    recipe = user_recipe(path)
    assert recipe.model == "tiny"
    assert recipe.flags == (
        Flag(name="lr", values=("0.0015",), source="swept in May"),
        Flag(name="bf16", values=(), source=str(path), on=False),
        Flag(name="seed", values=("12000",), source=str(path)),
        Flag(name="recompute-modules", values=("core_attn", "mlp"), source=str(path)),
        Flag(name="profile", values=(), source=str(path)),
    )


def test_a_mixture_file_in_a_recipe_is_found_beside_the_recipe(tmp_path: Path) -> None:
    path = tmp_path / "own.yaml"
    path.write_text("mixture: mine.yaml\n")
    assert user_recipe(path).mixture == str(tmp_path / "mine.yaml")
    path.write_text("mixture: pretrain_phase2\n")
    assert user_recipe(path).mixture == "pretrain_phase2"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("flgas: {}", "key in .* called 'flgas'. Did you mean flags"),
        ("flags: [1]", "where names with values must stand"),
        ("just text", "where names with values must stand"),
        ("flags: {--lr: 1}", "without its leading dashes"),
        ("flags: {lr: {a: 1}}", "lr is .* it must be a number, text"),
        ("flags: {lr: }", "lr is None"),
        ("flags: {1: 2}", "1 is not a name"),
        ("model: 950", "`model` is 950; it must be text"),
        ("flags: {lr: 1, lr: 2}", "not YAML"),
        ("flags: {", "not YAML"),
    ],
    ids=lambda value: value[:16],
)
def test_a_users_recipe_that_cannot_be_meant_is_refused(
    text: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        user_recipe(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpora: {a: {weight: 0}}", "no corpus has a weight above zero"),
        ("corpora: {a: {weight: -1}}", "must be zero or more"),
        ("corpora: {a: {weight: .nan}}", "must be zero or more"),
        ("corpora: {a: {weight: much}}", "must be a number"),
        ("corpora: {a: {wait: 1}}", "Did you mean weight"),
        ("corpora: {../a: {weight: 1}}", "must be a plain file name"),
        ("corpora: {a: 1}", "where names with values must stand"),
        ("about: nothing", "corpora: holds None"),
    ],
    ids=lambda value: value[:30],
)
def test_a_mixture_that_cannot_be_meant_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        mixture(str(path))


def test_a_missing_file_is_refused_with_its_path(tmp_path: Path) -> None:
    for read in (lambda path: user_recipe(Path(path)), mixture):
        with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read"):
            read(str(tmp_path / "gone.yaml"))
