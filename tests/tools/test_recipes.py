"""`tools/recipes.py` lists what there is and prints words that a run can take."""

import re
import runpy
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_mlr1.recipes import expand
from megatron_mlr1.recipes.sheet import names

PROGRAM = Path(__file__).parents[2] / "tools" / "recipes.py"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    program: Callable[[list[str]], None] = runpy.run_path(str(PROGRAM))["main"]
    return program


def test_list_names_everything(
    main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["list"])
    printed = re.findall(r"^  (\S+)  ", capsys.readouterr().out, flags=re.MULTILINE)
    assert sorted(printed) == sorted(
        [*names("models"), *names("stages"), *names("mixtures")],
    )
    assert printed.index("pretrain_phase2") < printed.index("midtrain_phase1")


def test_show_prints_each_flag_with_its_source_and_the_words_on_one_line(
    main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["show", "950m", "pretrain_phase1", "--world-size", "512"])
    printed = capsys.readouterr().out
    assert re.search(r"^  --num-layers +22 +paper v1 Table 1$", printed, flags=re.MULTILINE)
    assert re.search(r"^  --micro-batch-size +4 +the largest up to 16", printed, flags=re.MULTILINE)
    assert re.search(r"^  fineweb_edu +0.6375 +paper v1 Table 3", printed, flags=re.MULTILINE)
    plan = expand(["--model", "950m", "--stage", "pretrain_phase1"], 512)
    assert tuple(shlex.split(printed.splitlines()[-1])) == plan.words


def test_show_prints_the_words_alone_with_the_users_laid_over(
    main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["show", "tiny", "sft_general", "--format", "words", "--lr", "1e-3"])
    words = shlex.split(capsys.readouterr().out)
    assert words[-2:] == ["--lr", "1e-3"]
    assert words.count("--lr") == 1


def test_flags_that_no_recipe_has_are_said_to_be_unchecked(
    main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    main(["show", "tiny", "pretrain_phase1", "--lr", "1e-3", "--tensor-model-paralel-size", "2"])
    told = capsys.readouterr().err
    assert told.startswith("not checked: --tensor-model-paralel-size; ")
    assert "--lr" not in told


def test_a_wrong_name_ends_with_the_message_alone(
    main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["show", "950", "pretrain_phase1"])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("There is no model '950'. Did you mean 950m?")
    assert "Traceback" not in printed.err


@pytest.mark.parametrize(
    "words", [["list", "950m"], ["list", "--lr", "1"], ["show", "950m", "pretrain_phase1", "1"]]
)
def test_words_that_nobody_reads_are_refused(
    words: list[str], main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "unrecognized arguments" in capsys.readouterr().err
