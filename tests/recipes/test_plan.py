"""Layers merge into one command line, and the user's words win."""

from itertools import product
from pathlib import Path

import pytest

from megatron_mlr1.errors import ConfigError
from megatron_mlr1.recipes import Flag, Plan, expand
from megatron_mlr1.recipes.plan import NEEDS, merge
from megatron_mlr1.recipes.sheet import names, packaged

STAGES = names("stages")
PAPER_BATCH = {"pretrain": 2048, "midtrain": 512}
PAPER_STAGES = [stage for stage in STAGES if not stage.startswith("sft")]
"""The stages whose batch is the paper's own; those of chats count packs."""
IN_SAMPLES = ("--train-samples", "10", "--lr-warmup-samples", "1")


def plan(*words: str, world_size: int = 1) -> Plan:
    return expand(["--model", "950m", "--stage", "pretrain_phase1", *words], world_size)


def values(made: Plan) -> dict[str, str]:
    return {flag.name: " ".join(flag.values) for flag in made.flags}


@pytest.mark.parametrize(
    ("model", "stage"), [*product(("140m", "360m", "950m"), PAPER_STAGES)], ids=lambda value: value
)
def test_the_global_batch_is_the_papers_on_any_number_of_processes(model: str, stage: str) -> None:
    batch = next(size for start, size in PAPER_BATCH.items() if stage.startswith(start))
    for world_size in (1, 8, 128, 512):
        flags = values(expand(["--model", model, "--stage", stage], world_size))
        assert int(flags["global-batch-size"]) == batch
        assert batch % (int(flags["micro-batch-size"]) * world_size) == 0


def test_on_the_papers_128_devices_the_micro_batch_is_the_papers() -> None:
    for stage in PAPER_STAGES:
        asked = values(expand(["--model", "950m", "--stage", stage], 128))["micro-batch-size"]
        printed = {flag.name: flag.values for flag in packaged("stages", stage).flags}
        assert (asked,) == printed["micro-batch-size"]


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage not in PAPER_STAGES])
def test_packs_of_chats_share_out_over_whole_nodes(stage: str) -> None:
    batch = int(values(expand(["--model", "950m", "--stage", stage], 1))["global-batch-size"])
    for world_size in (8, 16, 32, 64, 128):
        flags = values(expand(["--model", "950m", "--stage", stage], world_size))
        assert int(flags["global-batch-size"]) == batch
        assert batch % (int(flags["micro-batch-size"]) * world_size) == 0


@pytest.mark.parametrize("stage", STAGES)
def test_tiny_runs_any_stage_on_a_laptop(stage: str) -> None:
    for world_size in (1, 2, 4, 8, 16):
        flags = values(expand(["--model", "tiny", "--stage", stage], world_size))
        assert flags["global-batch-size"] == "16"
        assert flags["seq-length"] == "256"
        assert flags["train-iters"] == "300"
        assert "bf16" not in flags
        assert "lr-warmup-fraction" not in flags
    with pytest.raises(ConfigError, match="Start 16 processes"):
        expand(["--model", "tiny", "--stage", stage], 128)


def test_the_recipes_words_stand_before_the_users() -> None:
    made = plan("--lr", "1e-3", "--fp8-format=hybrid", "--data-path", "1", "a", "2", "b")
    user = ("--lr", "1e-3", "--fp8-format=hybrid", "--data-path", "1", "a", "2", "b")
    assert made.words[-len(user) :] == user
    assert made.words.count("--lr") == 1
    assert "0.004" not in made.words
    assert not {"--model", "950m", "--stage", "pretrain_phase1"} & set(made.words)


def test_the_flags_are_the_words() -> None:
    made = plan("--lr", "1e-3", "--data-path", "1", "a")
    assert tuple(word for flag in made.flags for word in flag.words) == made.words


@pytest.mark.parametrize(
    ("words", "gone"),
    [
        (("--fp16",), "bf16"),
        (IN_SAMPLES, "train-iters"),
        (("--lr-warmup-fraction", "0.01"), "lr-warmup-iters"),
        (("--lr-warmup-samples", "100"), "lr-warmup-iters"),
        (("--step-batch-size-schedule", "0:16", *IN_SAMPLES), "global-batch-size"),
        (("--vocab-size", "1000"), "padded-vocab-size"),
        (("--train-data-path", "a", "--valid-data-path", "b"), "split"),
        (("--without", "bf16"), "bf16"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else value,
)
def test_a_users_flag_takes_the_recipes_rival_away(words: tuple[str, ...], gone: str) -> None:
    assert gone in values(plan())
    assert gone not in values(plan(*words))


def test_rivals_in_one_layer_are_left_for_the_engine_to_refuse() -> None:
    flags = [Flag(name=name, values=(), source="mine") for name in ("bf16", "fp16")]
    assert tuple(merge([flags])) == ("bf16", "fp16")


def test_layers_win_in_the_order_stage_model_recipe_user(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("flags:\n  eval-iters: 7  # mine\n  seed: 5\n  rotary-interleaved: false\n")
    made = expand(
        ["--model", "tiny", "--stage", "sft_general", "--recipe", str(own), "--seed", "6"], 1
    )
    found = values(made)
    assert found["save-interval"] == "100"
    assert found["lr"] == "5e-06"
    assert found["eval-iters"] == "7"
    assert found["seed"] == "6"
    assert "rotary-interleaved" not in found
    assert {flag.source for flag in made.flags if flag.name == "eval-iters"} == {"mine"}


def test_a_recipe_may_name_model_stage_and_mixture_and_the_command_line_wins(
    tmp_path: Path,
) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("model: tiny\nstage: pretrain_phase1\nmixture: pretrain_phase2\n")
    made = expand(["--recipe", str(own), "--stage", "pretrain_phase2"], 1)
    assert (made.options.model, made.options.stage) == ("tiny", "pretrain_phase2")
    assert made.mixture is not None
    assert made.mixture.name == "pretrain_phase2"
    again = expand(["--recipe", str(own), "--mixture", "pretrain_phase1_model_card"], 1)
    assert again.mixture is not None
    assert again.mixture.name == "pretrain_phase1_model_card"


def test_taking_back_a_flag_that_is_not_there_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("flags: {bf61: false}")
    with pytest.raises(ConfigError, match="Did you mean bf16"):
        plan("--recipe", str(own))
    with pytest.raises(ConfigError, match="Did you mean bf16"):
        plan("--without", "bf61")


def test_one_recipe_may_take_a_flag_back_for_every_model(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("flags: {bf16: false}")
    for model in names("models"):
        words = ["--model", model, "--stage", "pretrain_phase1", "--recipe", str(own)]
        assert "bf16" not in values(expand(words, 1))


def test_our_own_flags_do_not_belong_in_a_recipe(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("flags: {data-root: corpora}")
    with pytest.raises(ConfigError, match="data-root is not a flag of the engine"):
        plan("--recipe", str(own))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--stage pretrain_phase1", "--model is missing"),
        ("--model tiny", "--stage is missing"),
        ("--model 960m --stage pretrain_phase1", "Did you mean 950m"),
        ("--model tiny --stage pretrain_phase3", "Did you mean pretrain_phase"),
        ("--model tiny --stage pretrain_phase1 --mixture pretrain_phase9", "no mixture"),
        ("--model tiny --stage pretrain_phase1 --train-iters 10", "warm-up must be shorter"),
        ("--model tiny --stage pretrain_phase1 --micro-batch-size 5", "Give 4"),
        ("--model tiny --stage pretrain_phase1 --global-batch-size x", "one whole number"),
        ("--model tiny --stage pretrain_phase1 --train-samples 9", "Give --lr-warmup-samples"),
        (
            "--model tiny --stage pretrain_phase1 --train-samples 9 --lr-warmup-samples 1 "
            "--lr-wsd-decay-iters",
            "Give --lr-wsd-decay-samples",
        ),
        (
            "--model tiny --stage pretrain_phase1 --step-batch-size-schedule 0:8",
            "--train-iters 300 .* and --lr-warmup-iters 20 .* Give --train-samples and",
        ),
        ("--model tiny --stage pretrain_phase1 --mixture pretrain_phase1 --mock-data", "only one"),
    ],
)
def test_a_command_line_that_cannot_work_is_refused(words: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        expand(words.split(), 1)


def test_parallel_sizes_lower_the_number_of_copies() -> None:
    words = ("--tensor-model-parallel-size", "2", "--pipeline-model-parallel-size", "2")
    cp = ("--context-parallel-size", "2")
    assert values(plan(*words, *cp, world_size=2048))["micro-batch-size"] == "8"
    assert values(plan(*words, *cp, world_size=1024))["micro-batch-size"] == "16"


def test_a_fitted_micro_batch_says_why() -> None:
    made = plan(world_size=512)
    (flag,) = (flag for flag in made.flags if flag.name == "micro-batch-size")
    assert flag.values == ("4",)
    assert "512 copies" in flag.source
    assert "paper v1 Table 2" in flag.source


def test_a_users_own_micro_batch_and_global_batch_win() -> None:
    assert values(plan("--micro-batch-size", "2"))["micro-batch-size"] == "2"
    flags = values(plan("--global-batch-size", "6", world_size=2))
    assert (flags["global-batch-size"], flags["micro-batch-size"]) == ("6", "3")


def test_the_micro_batch_makes_up_every_batch_of_a_schedule() -> None:
    scheduled = (*IN_SAMPLES, "--step-batch-size-schedule", "0:24 1B:48,2b:1K")
    assert values(plan(*scheduled, world_size=2))["micro-batch-size"] == "4"
    plan(*scheduled, "--micro-batch-size", "2", world_size=2)
    with pytest.raises(ConfigError, match=r"global batch of 1000 sequences\. Give 5"):
        plan(*scheduled, "--micro-batch-size", "6", world_size=2)
    with pytest.raises(ConfigError, match=r"A global batch of 24 .*Start 12 or 24 processes"):
        plan(*scheduled, world_size=16)


@pytest.mark.parametrize("schedule", ["", "8", "0:x", "0:0", "0:K", "0:inf"])
def test_a_schedule_that_is_none_is_left_for_the_engine_to_refuse(schedule: str) -> None:
    assert values(plan(*IN_SAMPLES, "--step-batch-size-schedule", schedule))


def test_a_users_own_data_leaves_no_mixture_to_read() -> None:
    made = plan("--data-path", "corpus")
    assert made.mixture is None
    made.require_runnable()


def test_a_mixture_without_a_data_root_is_refused_when_training_starts() -> None:
    with pytest.raises(ConfigError, match="--data-root is missing"):
        plan().require_runnable()
    plan("--data-root", "corpora").require_runnable()


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage.startswith("midtrain")])
def test_a_stage_that_needs_a_teacher_expands_but_does_not_train_without(stage: str) -> None:
    words = ["--model", "950m", "--stage", stage, "--data-root", "corpora"]
    with pytest.raises(ConfigError, match=f"Stage {stage} .*--teacher is missing.*serve_teacher"):
        expand(words, 8).require_runnable()
    expand([*words, "--teacher", "tcp://a:1"], 8).require_runnable()


def test_any_stage_may_have_a_teacher() -> None:
    plan("--data-root", "corpora", "--teacher", "tcp://a:1").require_runnable()


def test_every_need_of_a_stage_has_a_reason_and_the_reverse() -> None:
    assert {packaged("stages", stage).needs for stage in STAGES} - {None} == set(NEEDS)


def test_the_stages_form_one_chain() -> None:
    after = {packaged("stages", stage).starts_from: stage for stage in STAGES}
    chain = [after[None]]
    while chain[-1] in after:
        chain.append(after[chain[-1]])
    assert chain == [
        "pretrain_phase1",
        "pretrain_phase2",
        "midtrain_phase1",
        "midtrain_phase2",
        "sft_general",
        "sft_reasoning",
    ]
