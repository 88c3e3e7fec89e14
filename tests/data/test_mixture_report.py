"""What a mixture means for a run is what training will draw."""

from collections import Counter

import pytest

from megatron_mlr1.data.mixture_report import (
    PUBLISHED_TOKENS,
    plan_run,
    pools_below,
    published_pools,
    read,
    table,
    title,
    warnings,
)
from megatron_mlr1.data.sampler import Phase, SampleOrder, Stream
from megatron_mlr1.errors import ConfigError, DataError
from megatron_mlr1.recipes.sheet import mixture, names
from tests.support.corpora import write_corpus
from tests.support.records import write_record_of

FIRST = "corpora: {web: {weight: 3}, wiki: {weight: 1}, never: {weight: 0}}"
LATER = "corpora: {wiki: {weight: 1}, code: {weight: 1}}"
LENGTH = 10


@pytest.fixture
def root(tmp_path):
    """Two files of web with 60 and 30 samples of ten tokens, wiki with 10 and code with 20."""
    (tmp_path / "web").mkdir()
    for place, tokens in (
        ("web/00", 605),
        ("web/01", 300),
        ("wiki", 100),
        ("code", 200),
    ):
        end = "_document" if "/" in place else "_text_document"
        write_corpus(tmp_path / f"{place}{end}", [5] * (tokens // 5), [1] * (tokens // 5))
    (tmp_path / "first.yaml").write_text(FIRST)
    (tmp_path / "later.yaml").write_text(LATER)
    return tmp_path


def plan(root, switches=None, num_samples=400):
    later = None if switches is None else f"{switches}={root}/later.yaml"
    return plan_run(f"{root}/first.yaml", later, seq_length=LENGTH, num_samples=num_samples)


def test_each_corpus_is_told_with_its_files_tokens_and_epochs(root):
    web, wiki = read(plan(root), pools_below(plan(root), root))
    assert (web.corpus, web.weights, web.num_files) == ("web", (0.75,), 2)
    assert (web.num_tokens, web.num_samples, web.drawn_tokens) == (905, 300, 3000)
    assert web.epochs == pytest.approx(3000 / 905)
    assert web.repeated == pytest.approx(1 - 90 / 300)
    assert (wiki.num_files, wiki.num_samples, wiki.epochs) == (1, 100, 10.0)
    assert wiki.repeated == pytest.approx(0.9)
    assert wiki.share == 0.25


def test_the_counts_are_those_of_the_order_of_samples(root):
    run = plan(root, switches=123)
    streams = [
        Stream(name=name, key=name, weight=weight, num_items=num_items)
        for name, weight, num_items in (
            ("web", 3 * 605 / 905, 60),
            ("web", 3 * 300 / 905, 30),
            ("wiki", 1.0, 10),
            ("code", 0.0, 20),
        )
    ]
    order = SampleOrder(streams, 7, [Phase(first_sample=123, weights=(0.0, 0.0, 1.0, 1.0))])
    places = order.places(0, 400)
    drawn = Counter(streams[number].name for number in places.stream.tolist())
    seen = {(*it,) for it in zip(places.stream.tolist(), places.item.tolist(), strict=True)}
    new = Counter(streams[number].name for number, _ in seen)
    for it in read(run, pools_below(run, root)):
        assert it.num_samples == drawn[it.corpus]
        assert it.repeated == pytest.approx(1 - new[it.corpus] / drawn[it.corpus])


def test_weights_are_told_for_each_mixture(root):
    run = plan(root, switches=123)
    readings = {it.corpus: it.weights for it in read(run, pools_below(run, root))}
    assert readings == {"web": (0.75, 0.0), "wiki": (0.25, 0.5), "code": (0.0, 0.5)}


def test_packs_are_counted_as_packs(root):
    for path in (root / "web").iterdir():
        path.unlink()
    write_corpus(root / "web" / "00_document", [3, 4, 5, 6], [2, 2])
    write_record_of(f"{root}/web/00_document", kind="packs", pack_length=LENGTH)
    run = plan(root, num_samples=8)
    web = read(run, pools_below(run, root))[0]
    assert (web.num_samples, web.drawn_tokens, web.epochs) == (6, 54, 3.0)
    assert web.repeated == pytest.approx(1 - 2 / 6)


def test_missing_corpora_are_refused(root):
    (root / "wiki_text_document.bin").unlink()
    with pytest.raises(DataError, match="wiki"):
        pools_below(plan(root), root)


def test_a_stage_gives_length_samples_and_training_part():
    run = plan_run("pretrain_phase1", stage=("950m", "pretrain_phase1"))
    assert (run.seq_length, run.num_samples) == (2048, 500_000 * 2048)
    assert run.training_share == pytest.approx(0.999)
    assert title(run).startswith("pretrain_phase1 (samples 0 to 1,023,999,999); 2,048 tokens")
    shorter = plan_run("pretrain_phase1", stage=("950m", "pretrain_phase1"), num_samples=5)
    assert (shorter.seq_length, shorter.num_samples) == (2048, 5)


@pytest.fixture(scope="module")
def paper():
    """Both phases of pre-training."""
    return plan_run(
        "pretrain_phase1",
        "1024000000=pretrain_phase2",
        seq_length=2048,
        num_samples=2_048_000_000,
    )


def test_the_papers_mixtures_read_openwebmath_about_fifty_times(paper):
    epochs = {it.corpus: it.epochs for it in read(paper, published_pools(paper))}
    assert epochs["openwebmath"] == pytest.approx(50, abs=1)
    assert epochs["fineweb_edu"] == pytest.approx(1.9, abs=0.1)
    assert epochs["natural_reasoning"] == pytest.approx(37, abs=1)


def test_what_is_read_too_often_is_warned_of(paper):
    readings = read(paper, published_pools(paper))
    assert any(
        line.startswith("openwebmath is read 50.4 times, more than 4;")
        for line in warnings(readings)
    )
    assert len(list(warnings(readings))) == sum(it.epochs > 4 for it in readings)
    assert len(list(warnings(readings, 40))) == 1
    assert not list(warnings(readings, 51))


def test_the_table_has_a_line_for_each_corpus(paper):
    lines = table(paper, read(paper, published_pools(paper))).splitlines()
    assert len(lines) == 1 + 14 + 1
    line = next(line for line in lines if line.startswith("openwebmath"))
    assert line.split() == [
        "openwebmath", "6.93%", "->", "23.33%", "-", "12.6B", "309,879,196", "634.6B", "50.37",
        "98.0%",
    ]  # fmt: skip


def test_sizes_that_are_not_published_stay_unknown():
    run = plan_run("midtrain_phase1", seq_length=4096, num_samples=1000)
    readings = read(run, published_pools(run))
    assert "benchmark_train" not in {it.corpus for it in readings}  # it has no weight
    dclm = next(it for it in readings if it.corpus == "dolmino_dclm")
    assert (dclm.num_tokens, dclm.epochs, dclm.repeated) == (None, None, None)
    assert dclm.num_samples == 370
    assert table(run, readings).splitlines()[1].split()[3] == "?"
    assert [line.split()[0] for line in warnings(readings, 0)] == ["starcoder"]


def test_the_published_sizes_are_of_corpora_that_mixtures_have():
    known = {corpus.name for name in names("mixtures") for corpus in mixture(name).corpora}
    assert known >= PUBLISHED_TOKENS.keys()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_samples": 5}, "How much is read is not known"),
        ({"seq_length": 5}, "How much is read is not known"),
        ({"seq_length": 0, "num_samples": 5}, "--seq-length is 0"),
        ({"seq_length": 5, "num_samples": 0}, "--train-samples 0"),
        ({"seq_length": 5, "num_samples": 7, "switches": "7=pretrain_phase2"}, "after the last"),
        ({"seq_length": 5, "num_samples": 7, "switches": "x"}, "--mixture-switch has 'x'"),
        ({"seq_length": 5, "num_samples": 7, "switches": "3=nowhere"}, "no mixture 'nowhere'"),
    ],
)
def test_a_run_that_is_not_one_is_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        plan_run("pretrain_phase1", **given)
