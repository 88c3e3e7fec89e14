"""Our own flags: what they become, and what is refused."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest

from megatron_mlr1.distillation_options import DistillationOptions
from megatron_mlr1.errors import ConfigError
from megatron_mlr1.options import KERNELS, Mlr1Options, add_mlr1_arguments, choose, split_words


def test_flags_become_frozen_options() -> None:
    words = (
        "--model 950m --stage pretrain_phase1 --recipe own.yaml --without bf16,--seed "
        "--from-scratch "
        "--mixture pretrain_phase2 --data-root corpora --mlr1-kernels swiglu=reference "
        "--mlr1-logits bf16 --mlr1-dataset megatron --mlr1-loader dali "
        "--mixture-switch 500=b,1000=c.yaml --verify-data full --document-mask --new-data-order "
        "--peak-tflops 989 --teacher tcp://a:1"
    )
    options, _ = split_words(words.split())
    assert options == Mlr1Options(
        model="950m",
        stage="pretrain_phase1",
        recipe=Path("own.yaml"),
        without=("bf16", "seed"),
        from_scratch=True,
        mixture="pretrain_phase2",
        data_root=Path("corpora"),
        kernels={
            "swiglu": "reference",
            "linear_cross_entropy": "mlr1",
            "linear_kl": "mlr1",
            "qk_norm_rope": "mlr1",
        },
        logits="bf16",
        dataset="megatron",
        loader="dali",
        mixture_switch=((500, "b"), (1000, "c.yaml")),
        verify_data="full",
        document_mask=True,
        new_data_order=True,
        peak_tflops=989.0,
        distillation=DistillationOptions(teacher="tcp://a:1"),
    )


def test_an_empty_command_line_takes_the_first_kernel_of_each_op_and_nothing_else() -> None:
    options, rest = split_words([])
    assert dict(options.kernels) == {op: names[0] for op, names in KERNELS.items()}
    assert options.without == rest == ()
    assert not options.from_scratch
    assert options.peak_tflops is None
    assert (options.dataset, options.loader, options.verify_data) == ("mlr1", "thread", "quick")
    assert options.mixture_switch == ()
    assert not options.document_mask
    assert not options.new_data_order


def test_the_engines_words_keep_their_order() -> None:
    _, rest = split_words(["--lr", "1e-3", "--model", "tiny", "--data-path", "1", "a", "--fp16"])
    assert rest == ("--lr", "1e-3", "--data-path", "1", "a", "--fp16")


def test_the_beginning_of_one_of_our_flags_is_not_taken_for_it() -> None:
    assert split_words(["--mix", "x"])[1] == ("--mix", "x")


def test_a_parsed_namespace_may_hold_the_engines_values_too() -> None:
    parser = add_mlr1_arguments(ArgumentParser())
    namespace = parser.parse_args(["--model", "tiny"], Namespace(num_layers=4))
    assert Mlr1Options.from_namespace(namespace).model == "tiny"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mlr1-kernels", "swiglo=mlr1"], "Did you mean swiglu"),
        (["--mlr1-kernels", "swiglu=refrence"], "Did you mean reference"),
        (["--mlr1-kernels", "swiglu"], "OP=NAME"),
        (["--mlr1-kernels", "swiglu=te,swiglu=mlr1"], "names swiglu twice, with te and with mlr1"),
        (["--mixture-switch", "phase2"], "takes SAMPLE=NAME pairs"),
        (["--mixture-switch", "0=phase2"], "at least 1"),
        (["--mixture-switch", "5="], "takes SAMPLE=NAME pairs"),
        (["--mixture-switch", "5=a,5=b"], "has 5 after 5; the samples must rise"),
        (["--mlr1-dataset", "nemo"], "--mlr1-dataset: invalid choice"),
        (["--peak-tflops", "fast"], "--peak-tflops: invalid float value"),
        (["--peak-tflops", "0"], "must be a positive number"),
        (["--peak-tflops", "nan"], "must be a positive number"),
        (["--model"], "--model: expected one argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_meant_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_words(words)


def test_a_word_that_resembles_nothing_gets_the_list_alone() -> None:
    with pytest.raises(ConfigError, match=r"There is no fruit 'xyz'\. Known: apple, pear\.$"):
        choose("xyz", ["apple", "pear"], "fruit")


def test_a_long_list_is_left_out_of_the_message() -> None:
    with pytest.raises(ConfigError, match=r"There is no number '99'\. Did you mean 9\?$"):
        choose("99", [str(n) for n in range(10, 40) if n != 99] + ["9"], "number")
