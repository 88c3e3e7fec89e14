"""Documents that share a sequence know nothing of each other, from the files to the losses."""

from argparse import Namespace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.world import run_in_world

LENGTH, BATCH, VOCABULARY, END = 64, 3, 1000, 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Everything in one process: the engine takes seconds to import."""
    (answer,) = run_in_world(
        1, measure, tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("corpus")
    )
    return answer


def measure(root: Path) -> dict[str, Any]:
    prefix = write_corpus(root / "c_text_document")
    (model, engines), step = models_and_step()
    before = losses_of(prefix, model, step)
    documents = documents_of(before["batch"])
    alone = [loss_alone(before["batch"], document, model) for document in documents]
    rotated_by_the_engine = losses_of(prefix, engines, step)["losses"]
    changed = next(d for d in documents if len(d) > 4)
    place = 2
    token = before["batch"]["tokens"].flatten()[changed[place]].item()
    change(prefix, token)
    return {
        "before": before,
        "after": losses_of(prefix, model, step),
        "alone": alone,
        "rotated by the engine": rotated_by_the_engine,
        "documents": documents,
        "changed": changed,
        "places": changed[place:],
    }


def write_corpus(prefix: Path) -> str:
    """Forty documents of 3 to 30 tokens, each with its end."""
    from megatron_mlr1.data.index import DocumentBlock, IndexWriter

    random = np.random.default_rng(5)
    lengths = random.integers(3, 31, 40)
    # Fewer tokens than ids: none but the end comes twice.
    tokens = 1 + np.arange(lengths.sum())
    tokens[np.cumsum(lengths) - 1] = END
    writer = IndexWriter(str(prefix), np.dtype("<u2"))
    writer.write(DocumentBlock(tokens, lengths, np.ones(40, np.int64)))
    writer.seal()
    writer.publish()
    return str(prefix)


def change(prefix: str, token: int) -> None:
    """Put an id that is nowhere else in the place of a token in the file of the corpus."""
    tokens = np.memmap(f"{prefix}.bin", "<u2", mode="r+")
    tokens[tokens == token] = VOCABULARY - 1
    tokens.flush()


def models_and_step() -> tuple[list[Any], Any]:
    """A small model, one of the same weights that the engine rotates, the engine's forward step."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_mlr1.engine.forward import ForwardStep
    from megatron_mlr1.model.build import build
    from megatron_mlr1.model.head_kernels import HeadKernels
    from megatron_mlr1.model.shape import ModelShape

    torch.manual_seed(0)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1)
    shape = ModelShape(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        vocab_size=VOCABULARY,
    )
    groups = ProcessGroupCollection.use_mpu_process_groups()
    # Angles that turn every pair far within a document, so that a wrong distance is seen.
    models = [
        build(shape, groups, rotary_base=10, max_positions=LENGTH, qk_norm_rope_kernel=kernel)
        for kernel in ("mlr1", "reference")
    ]
    models[1].load_state_dict(models[0].state_dict())
    args = Namespace(
        dataloader_inter_document_masking=True,
        context_parallel_size=1,
        pipeline_model_parallel_size=1,
        padded_vocab_size=VOCABULARY,
        micro_batch_size=BATCH,
        eval_micro_batch_size=BATCH,
        seq_length=LENGTH,
    )
    return models, ForwardStep(args, HeadKernels())


def losses_of(prefix: str, model: Any, step: Any) -> dict[str, Any]:
    """Read a batch, and run it through the engine's step once for each document's loss alone."""
    import torch

    from megatron_mlr1.data.feed import Reading, open_feed
    from megatron_mlr1.data.loader import Loader, Turns
    from megatron_mlr1.data.mixture import Blend, ResolvedCorpus

    corpus = ResolvedCorpus(name="c", weight=1.0, prefix=Path(prefix))
    reading = Reading(seq_length=LENGTH, seed=3, end=END, num_ids=VOCABULARY)
    feed = open_feed([Blend(first_sample=0, corpora=(corpus,))], (0.0, 1.0), reading)
    turns = Turns(consumed=0, rank=0, num_ranks=1, micro_batch=BATCH)
    loader = Loader(feed, turns, LENGTH)
    batch = next(loader)
    loader.close()
    sums = []
    for document in documents_of(batch):
        alone = torch.zeros_like(batch["loss_mask"])
        alone.view(-1)[list(document)] = batch["loss_mask"].view(-1)[list(document)]
        with torch.no_grad():
            loss, _ = step(iter([{**batch, "loss_mask": alone}]), model)
        sums.append(loss.total.item())
    return {"batch": batch, "losses": sums}


def loss_alone(batch: Any, document: range, model: Any) -> float:
    """Sum of a document's losses, run as a batch of its own that knows no bounds."""
    import torch

    places = list(document)
    tokens, labels, mask = (
        batch[name].flatten()[places] for name in ("tokens", "labels", "loss_mask")
    )
    positions = torch.arange(len(places))
    with torch.no_grad():
        logits = model(tokens[None], positions[None], None)[0]
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    return float((losses * mask).sum())


def documents_of(batch: Any) -> list[range]:
    """Where each document of a batch stands in its flattened tokens."""
    return [
        range(row * LENGTH + begin, row * LENGTH + end)
        for row, bounds in enumerate(batch["cu_seqlens"].tolist())
        for begin, end in pairwise(bounds)
        if end > begin
    ]


def test_the_batches_differ_in_one_document_alone(measured):
    before, after = (measured[when]["batch"]["tokens"].flatten() for when in ("before", "after"))
    (places,) = (before != after).nonzero(as_tuple=True)
    assert places.tolist() == [measured["places"][0]]


def test_no_bit_of_any_other_documents_loss_changes(measured):
    documents, before, after = (
        measured["documents"],
        measured["before"]["losses"],
        measured["after"]["losses"],
    )
    differ = [d for d, x, y in zip(documents, before, after, strict=True) if x != y]
    assert differ == [measured["changed"]]
    assert len(documents) > 5
    assert sum(loss > 0 for loss in before) > 5


def test_every_document_has_the_loss_that_it_has_alone(measured):
    assert measured["before"]["losses"] == pytest.approx(measured["alone"], rel=1e-5)


def test_the_engines_rotation_gives_the_same_losses(measured):
    expected = pytest.approx(measured["rotated by the engine"], rel=2e-6)
    assert measured["before"]["losses"] == expected


def test_no_loss_is_taken_where_the_label_is_another_documents(measured):
    batch = measured["before"]["batch"]
    mask, tokens = batch["loss_mask"].flatten(), batch["tokens"].flatten()
    labels, positions = batch["labels"].flatten(), batch["position_ids"].flatten()
    for document in measured["documents"]:
        inner = list(document)[:-1]
        assert labels[inner].equal(tokens[[place + 1 for place in inner]])
        assert (mask[inner] == 1).all()
        assert positions[list(document)].tolist() == list(range(len(document)))
        # The last token's label is its own document's only where the row cuts the document.
        cut = (document.stop % LENGTH == 0) and tokens[document.stop - 1] != END
        assert mask[document.stop - 1] == float(cut)
