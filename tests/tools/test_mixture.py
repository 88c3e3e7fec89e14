"""`tools/mixture.py` shows, lists and draws what a mixture means for a run."""

import csv
import io
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.support.corpora import write_corpus

PROGRAM = Path(__file__).parents[2] / "tools" / "mixture.py"
STAGE = ["--model", "950m", "--stage", "pretrain_phase1"]
Main = Callable[[list[str]], None]


@pytest.fixture(scope="module")
def main() -> Main:
    program: Main = runpy.run_path(str(PROGRAM))["main"]
    return program


def test_show_prints_the_table_and_warns_beside_it(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["show", "pretrain_phase1", *STAGE])
    printed = capsys.readouterr()
    assert printed.out.startswith("pretrain_phase1 (samples 0 to 1,023,999,999)")
    assert "openwebmath" in printed.out
    assert "Sizes of the corpora: paper v1 Table 3" in printed.err
    assert "warning: openwebmath is read 11.5 times, more than 4" in printed.err


def test_the_number_of_epochs_that_is_too_many_can_be_chosen(
    main: Main, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["show", "pretrain_phase1", *STAGE, "--max-epochs", "30"])
    assert "warning" not in capsys.readouterr().err


def test_sizes_below_the_data_root_are_taken(
    main: Main, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_corpus(tmp_path / "wiki_text_document", [50] * 4, [1] * 4)
    (tmp_path / "mine.yaml").write_text("corpora: {wiki: {weight: 2}}")
    given = ["--data-root", str(tmp_path), "--seq-length", "10", "--train-samples", "100"]
    main(["show", f"{tmp_path}/mine.yaml", *given])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[3].split() == [
        *("wiki", "100.00%", "1", "200", "100", "1.0k", "5.00", "80.0%")
    ]
    assert printed.err.startswith("warning: wiki is read 5.0 times")


def test_tokens_are_numbers_for_programs(main: Main, capsys: pytest.CaptureFixture[str]) -> None:
    switch = ["--mixture-switch", "1000=pretrain_phase2"]
    size = ["--seq-length", "2048", "--train-samples", "2000"]
    main(["tokens", "pretrain_phase1", *switch, *size])
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    main(["tokens", "pretrain_phase1", *switch, *size, "--format", "json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["corpus"] for row in rows] == [it["corpus"] for it in found]
    assert len(rows) == 14
    for row, it in zip(rows, found, strict=True):
        assert [float(weight) for weight in row["weights"].split()] == it["weights"]
        assert int(row["num_samples"]) == it["num_samples"]
        assert int(row["num_tokens"]) == it["num_tokens"]
        assert float(row["epochs"]) == it["epochs"]
    assert sum(it["num_samples"] for it in found) == 2000


def test_plot_writes_a_picture(main: Main, tmp_path: Path) -> None:
    main(["plot", "pretrain_phase1", *STAGE, "--output", str(tmp_path / "m.png")])
    assert Image.open(tmp_path / "m.png").size[0] == 1100
    assert [path.name for path in tmp_path.iterdir()] == ["m.png"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "pretrain_phase9", *STAGE], "Did you mean pretrain_phase"),
        (["show", "pretrain_phase1"], "How much is read is not known"),
        (["show", "pretrain_phase1", "--model", "950m"], "give both, or neither"),
        (["show", "pretrain_phase1", *STAGE, "--data-root", "/nowhere"], "7 cannot be read"),
        (
            ["plot", "pretrain_phase1", *STAGE, "--output", "/nowhere/m.png"],
            "nothing can be written",
        ),
        (
            ["plot", "pretrain_phase1", *STAGE, "--output", "/dev/null/m.png"],
            "nothing can be written",
        ),
    ],
)
def test_a_wrong_word_ends_it_with_the_message_alone(
    main: Main, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err


def test_it_imports_neither_torch_nor_the_engine() -> None:
    program = (
        "import runpy, sys\nsys.argv[:] = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(sorted({'torch', 'megatron', 'transformers'} & set(sys.modules)))"
    )
    words = [str(PROGRAM), "show", "pretrain_phase1", *STAGE]
    done = subprocess.run(
        [sys.executable, "-c", program, *words], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--max-epochs", "nan"], "--max-epochs is nan"),
        (["--max-epochs", "0"], "--max-epochs is 0"),
        (["--train-samples", "9" * 40], "both must be 1 to"),
        (["--output", "."], "--output is '.', a folder"),
    ],
)
def test_what_cannot_be_drawn_is_refused_and_nothing_is_left(
    words: list[str],
    message: str,
    main: Main,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main(["plot", "pretrain_phase1", *STAGE, "--output", "x.png", *words])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
