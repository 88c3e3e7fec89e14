"""FP8 that cannot work is refused before training starts, with the reason."""

import pytest

from megatron_mlr1.engine import fp8
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.recipes import expand

H100 = fp8.Device(name="NVIDIA H100", capability=(9, 0), cuda=(13, 0))
ADA = fp8.Device(name="NVIDIA L40S", capability=(8, 9), cuda=(13, 0))
AMPERE = fp8.Device(name="NVIDIA A100", capability=(8, 0), cuda=(13, 0))
OLD_CUDA = fp8.Device(name="NVIDIA H100", capability=(9, 0), cuda=(12, 6))
FP8 = ("--fp8-format", "hybrid", "--fp8-recipe")


def judge(*words, device=H100, transformer_engine="2.9"):
    fp8.refuse_impossible(words, device=device, transformer_engine=transformer_engine)


def words_of(model, *more, processes=1):
    words = ["--model", model, "--stage", "pretrain_phase1", "--save", "s", *more]
    return expand(words, processes).words


@pytest.mark.parametrize("model", ["tiny", "140m", "360m", "950m"])
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
def test_every_size_may_train_in_every_recipe_of_hopper(model, recipe):
    words = words_of(model, *FP8, recipe)
    assert fp8.is_asked_for(words)
    judge(*words)


@pytest.mark.parametrize(
    ("model", "tensor"), [("360m", 2), ("360m", 4), ("950m", 2), ("950m", 3), ("950m", 6)]
)
def test_tensor_parallel_processes_have_sizes_for_fp8(model, tensor):
    parallel = ("--tensor-model-parallel-size", str(tensor))
    judge(*words_of(model, *FP8, "delayed", *parallel, processes=tensor))


def test_a_run_without_the_flag_asks_for_nothing():
    assert not fp8.is_asked_for(words_of("950m"))


def test_the_equals_sign_asks_too():
    assert fp8.is_asked_for(("--fp8-format=hybrid",))


@pytest.mark.parametrize(
    ("recipe", "device", "sentence"),
    [
        ("delayed", AMPERE, r"8\.9, and NVIDIA A100 has 8\.0\. Leave the FP8 flags out"),
        ("blockwise", ADA, r"9\.0, and NVIDIA L40S has 8\.9\. Choose --fp8-recipe delayed"),
        ("mxfp8", H100, r"10\.0, and NVIDIA H100 has 9\.0\. Choose .*blockwise"),
        ("blockwise", OLD_CUDA, r"CUDA 12\.9, and torch was built for 12\.6"),
    ],
)
def test_a_recipe_that_the_device_has_not_is_refused_with_those_it_has(recipe, device, sentence):
    with pytest.raises(ConfigError, match=sentence):
        judge(*FP8, recipe, device=device)


def test_the_recipe_that_is_not_named_is_the_engines_default():
    with pytest.raises(ConfigError, match="--fp8-recipe delayed needs"):
        judge("--fp8-format", "hybrid", device=AMPERE)


def test_layers_of_torch_would_stay_in_bf16_and_are_refused():
    with pytest.raises(ConfigError, match="would be in bf16"):
        judge(*FP8, "tensorwise", "--transformer-impl", "local")


def test_the_last_of_two_words_counts():
    judge(*FP8, "mxfp8", "--fp8-recipe", "tensorwise")


def test_without_transformer_engine_it_is_refused():
    with pytest.raises(ConfigError, match="does not import here"):
        judge(*FP8, "tensorwise", transformer_engine=None)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--hidden-size", "584"), "channels of --hidden-size are 584"),
        (("--seq-length", "100", "--micro-batch-size", "1"), "tokens .* are 100"),
        (
            ("--seq-length", "64", "--micro-batch-size", "1", "--context-parallel-size", "8"),
            "tokens .* are 8",
        ),
        (
            ("--ffn-hidden-size", "2048", "--tensor-model-parallel-size", "3"),
            "of one process are 682",
        ),
    ],
)
def test_sizes_that_are_no_multiples_of_16_are_named(words, sentence):
    with pytest.raises(ConfigError, match=sentence):
        judge(*FP8, "tensorwise", *words)


def test_mxfp8_wants_multiples_of_32():
    blackwell = fp8.Device(name="NVIDIA B200", capability=(10, 0), cuda=(13, 0))
    judge(*FP8, "mxfp8", "--hidden-size", "96", device=blackwell)
    with pytest.raises(ConfigError, match="multiples of 32"):
        judge(*FP8, "mxfp8", "--hidden-size", "80", device=blackwell)
