"""Stages follow each other, documents are masked, and bad words are refused before training."""

import json
import sys

import pytest

from megatron_mlr1 import cpu
from megatron_mlr1.train import main
from tests.end_to_end.conftest import LAST, record

cpu.activate()

from megatron.core.num_microbatches_calculator import (  # noqa: E402
    unset_num_microbatches_calculator,
)
from megatron.training.global_vars import destroy_global_vars  # noqa: E402


def test_the_next_stage_starts_from_the_weights_with_its_own_schedule(train, single, tmp_path):
    save = tmp_path / "phase2"
    words = ("--load", str(single), "--document-mask", "--train-iters", "6")
    done = train(save, *words, stage="pretrain_phase2")
    assert done.code == 0, done.output[-3000:]
    assert "starts from the weights of pretrain_phase1" in done.output
    for noise in ("DEPRECATED", "confluence"):
        assert noise not in done.output, "the engine warns of what nobody here can change"
    rows = record(save)
    assert set(rows) == set(range(1, 7))
    assert rows[1]["consumed_samples"] == 16, "the data start anew"
    assert rows[1]["learning_rate"] == pytest.approx(4e-3 / 4), "and so does the schedule"
    assert rows[1]["lm loss"] < record(single)[1]["lm loss"] - 0.2, "but not the weights"
    assert json.loads((save / "run.json").read_text())["stage"] == "pretrain_phase2"
    # 16 sequences of 64 tokens, cut into documents, have less attention than whole ones.
    assert rows[5]["tflops_per_gpu"] > 0


def test_megatrons_order_is_taken_where_asked_and_not_by_chance(train, from_step_five):
    save = from_step_five("save")
    words = ("--mlr1-dataset", "megatron", "--exit-interval", "7", "--log-interval", "1")
    refused = train(save, *words)
    assert refused.code != 0
    assert "read its data by --mlr1-dataset mlr1, and this one reads by megatron" in refused.output
    done = train(save, *words, "--new-data-order")
    assert done.code == 0, done.output[-3000:]
    assert set(record(save)) == {6, 7}
    assert sum(record(save)[7]["corpus_tokens"].values()) == record(save)[7]["tokens"]
    assert json.loads((save / "run.json").read_text())["dataset"] == "megatron"


def test_another_schedule_is_refused_unless_it_is_meant(train, from_step_five):
    save = from_step_five("save")
    words = ("--train-iters", "30", "--exit-interval", "7")
    refused = train(save, *words)
    assert refused.code != 0
    assert "error: The checkpoint is of another schedule" in refused.output
    assert "--override-opt-param-scheduler" in refused.output
    assert "Traceback" not in refused.output
    done = train(save, *words, "--override-opt-param-scheduler")
    assert done.code == 0, done.output[-3000:]
    assert set(record(save)) == {6, 7}


def test_the_mixture_changes_at_its_sample(train, corpora, from_step_five):
    tests_alone = corpora.root / "tests_alone.yaml"
    tests_alone.write_text("about: tests\ncorpora:\n  tests: {weight: 1, dataset: its tests}\n")
    save = from_step_five("save")
    words = ("--mixture-switch", f"{6 * 16}={tests_alone}", "--log-interval", "1")
    done = train(save, *words, "--exit-interval", "8")
    assert done.code == 0, done.output[-3000:]
    seen = {step: row.get("corpus_tokens") for step, row in record(save).items()}
    assert seen[8]["code"] == seen[7]["code"], "after step 6 none of it is read"
    assert seen[8]["tests"] == seen[7]["tests"] + 16 * 64


def test_training_has_written_its_words_beside_the_checkpoints(single):
    run = json.loads((single / "run.json").read_text())
    assert (run["model"], run["stage"]) == ("tiny", "pretrain_phase1")
    assert run["words"].count("--train-iters") == 1, "the user's word replaced the recipe's"
    assert run["words"][run["words"].index("--train-iters") + 1] == str(LAST)
    assert run["versions"]["megatron-core"].startswith("0.19.")
    assert list((single / "tensorboard").iterdir()), "TensorBoard has its file"


def test_fine_tuning_refuses_documents_unless_they_are_meant(train, tmp_path):
    words = ("--from-scratch", "--train-iters", "2", "--lr-warmup-iters", "0")
    words += ("--global-batch-size", "4", "--micro-batch-size", "2")
    refused = train(tmp_path / "save", *words, stage="sft_general", processes=2)
    assert refused.output.count("error: Stage sft_general fine-tunes on packed chats") == 1
    assert "prompts included. Make packs of the chats" in refused.output
    assert "[rank 0] exitcode : 2\n[rank 1] exitcode : 2" in refused.output
    assert not record(tmp_path / "save")
    meant = train(tmp_path / "save", *words, "--verify-data", "off", stage="sft_general")
    assert meant.code == 0, meant.output[-3000:]


MOCK = ("--model", "tiny", "--stage", "pretrain_phase1", "--mock-data", "--tokenizer-type")
MOCK += ("NullTokenizer", "--vocab-size", "255")
BAD = {
    "an unknown size": (("--model", "950n", "--stage", "pretrain_phase1"), "950m"),
    "an unknown stage": (("--model", "tiny", "--stage", "pretrain_phase3"), "pretrain_phase"),
    "no data root": (("--model", "tiny", "--stage", "pretrain_phase1"), "--data-root is missing"),
    "no teacher": (
        ("--model", "tiny", "--stage", "midtrain_phase1", "--data-root", "."),
        "--teacher is missing",
    ),
    "a teacher for Megatron's order": (
        (*MOCK[:4], "--data-root", ".", "--mlr1-dataset", "megatron", "--teacher", "null:512,8"),
        "--teacher belongs to --mlr1-dataset mlr1",
    ),
    "a missing corpus": (
        ("--model", "tiny", "--stage", "pretrain_phase1", "--data-root", "nowhere"),
        "tools/preprocess_data.py",
    ),
    "an unknown flag": (
        ("--model", "tiny", "--stage", "pretrain_phase1", "--mock-data", "--micro-batch-sise=4"),
        "micro-batch-size",
    ),
    "a later stage from nothing": (
        ("--model", "tiny", "--stage", "pretrain_phase2", "--mock-data"),
        "--from-scratch",
    ),
    "a folder without a checkpoint": (
        ("--model", "tiny", "--stage", "pretrain_phase1", "--mock-data", "--load", "nowhere"),
        "holds no checkpoint",
    ),
    "no tokenizer": (
        ("--model", "tiny", "--stage", "pretrain_phase1", "--mock-data"),
        "There is no tokenizer",
    ),
    "a folder of a tokenizer that is not there": (
        (*MOCK[:5], "--tokenizer-model", "/nowhere"),
        "--tokenizer-model /nowhere is not a folder",
    ),
    "layers that are not there": (
        (*MOCK, "--transformer-impl", "transformer_engine"),
        "there is none here",
    ),
    "a graph of a GPU's work on a CPU": (
        (*MOCK, "--cuda-graph-impl", "local"),
        "--cuda-graph-impl local records what a GPU does",
    ),
    "a graph by its former flag": ((*MOCK, "--enable-cuda-graph"), "records what a GPU does"),
    "NVIDIA's profiler on a CPU": ((*MOCK, "--profile"), "without --use-pytorch-profiler"),
    "a GPU's memory on a CPU": ((*MOCK, "--record-memory-history"), "the memory of a GPU"),
    "clocks of GPUs on a CPU": ((*MOCK, "--log-straggler"), "compares clocks and temperatures"),
    "saving on the side on a CPU": ((*MOCK, "--async-save"), "takes a GPU of its own accord"),
    "a restart that is not here": ((*MOCK, "--inprocess-restart"), "has no part in it"),
    "flags of a file": ((*MOCK, "--yaml-cfg", "own.yaml"), "by --recipe FILE"),
    "settings that cannot be written": ((*MOCK, "--config-logger-dir=x"), "run.json"),
    "gradients of layers that are not there": (
        (*MOCK, "--save-dgrads-interval", "1"),
        "--save-wgrads-interval does without them",
    ),
    "an optimizer that is not there": (
        (*MOCK, "--use-precision-aware-optimizer", "--use-distributed-optimizer"),
        "Transformer Engine's Adam",
    ),
    "an optimizer that is on the CPU": (
        (
            *(*MOCK, "--optimizer-cpu-offload", "--use-precision-aware-optimizer"),
            "--use-distributed-optimizer",
        ),
        "--optimizer-cpu-offload moves the optimizer",
    ),
    "a run without a name": ((*MOCK, "--wandb-project", "p"), "--wandb-exp-name is missing"),
    "a value that is none": ((*MOCK, "--ckpt-format", "zarr"), "invalid choice: 'zarr'"),
    "a word without its flag": ((*MOCK, "--lr", "1", "2"), "2: no flag before it"),
    "layers of another model": ((*MOCK, "--spec", "megatron.core", "layers"), "Leave it out"),
    "a flag that the engine refuses": ((*MOCK, "--seq-length", "9999"), "max_position_embeddings"),
    "gradients that only NCCL adds": (
        (*MOCK, "--use-megatron-fsdp", "--ckpt-format", "fsdp_dtensor"),
        "--use-megatron-fsdp reduces gradients",
    ),
    "a head of its own": (
        (*MOCK, "--untie-embeddings-and-output-weights"),
        "untie_embeddings_and_output_weights is True; a MobileLLM-R1 has False",
    ),
    "an optimizer's precision": (
        (*MOCK, "--main-grads-dtype", "bf16"),
        "main_grads_dtype can only be fp32 when not using precision-aware optimizer",
    ),
    "a window": ((*MOCK, "--window-size", "8,0"), "window_size is (8, 0)"),
    "an end before the begin": ((*MOCK, "--adlr-autoresume"), "ends before the first step"),
    "heads that do not split": (
        (*MOCK, "--num-query-groups", "3"),
        "4 attention heads do not split",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_words_end_in_one_error_and_exit_code_two(case, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train"])
    # A case before may have set it, as a run does.
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    words, expected = BAD[case]
    assert main(words) == 2
    destroy_global_vars()
    unset_num_microbatches_calculator()
    errors = capsys.readouterr().err
    assert errors.count("error: ") == 1
    assert expected in errors
