"""`tools/convert_checkpoint.py` says what it made, and in one line why it made nothing."""

import json
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import Llama4ForCausalLM, Llama4TextConfig

PROGRAM = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
CONFIG = Path(__file__).parents[1] / "checkpoint" / "mobilellm_r1_140m.json"


@pytest.fixture(scope="module")
def main() -> Callable[[list[str]], None]:
    program: Callable[[list[str]], None] = runpy.run_path(str(PROGRAM))["main"]
    return program


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a small model with transformers."""
    fields = json.loads(CONFIG.read_text("utf-8"))["config"] | {
        "num_hidden_layers": 1,
        "hidden_size": 24,
        "intermediate_size_mlp": 32,
        "vocab_size": 50,
        "layer_types": ["full_attention"],
        "no_rope_layers": [1],
    }
    folder = tmp_path_factory.mktemp("program")
    Llama4ForCausalLM(Llama4TextConfig(**fields)).save_pretrained(folder / "hf")
    return folder


def test_there_and_back(
    main: Callable[[list[str]], None],
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    there, back = str(folder / "megatron"), str(folder / "back")
    main(["hf-to-megatron", "--load", str(folder / "hf"), "--save", there, "--verify"])
    printed = capsys.readouterr().out
    assert f"{there}: " in printed
    assert "verified: largest logit difference" in printed
    # The engine says of every model it builds that it will be replaced.
    assert not [row for row in caplog.records if row.name.startswith("megatron.core")]
    main(["megatron-to-hf", "--load", there, "--save", back, "--dtype", "bf16"])
    assert "bfloat16" in capsys.readouterr().out
    assert json.loads((folder / "back/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_an_error_is_its_message_alone(folder: Path) -> None:
    words = ["megatron-to-hf", "--load", str(folder / "hf"), "--save", str(folder / "none")]
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert "has no latest_checkpointed_iteration.txt" in lines[-1]
    # The line before it is CPU mode's own; on a machine with CUDA there is none.
    assert len(lines) <= 2
    assert not (folder / "none").exists()


def test_a_signal_ends_it_without_a_traceback_and_leaves_nothing(folder: Path) -> None:
    words = ["hf-to-megatron", "--load", str(folder / "hf"), "--save", str(folder / "stopped")]
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM), *words, "--verify"], stderr=subprocess.PIPE, text=True
    )
    while not list(folder.glob(".stopped*")):
        assert program.poll() is None, "it ended before it was stopped"
        time.sleep(0.01)
    program.send_signal(signal.SIGTERM)
    _, told = program.communicate(timeout=120)
    assert program.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in told
    assert not [path for path in folder.iterdir() if "stopped" in path.name]


@pytest.mark.parametrize("size", ["nan", "inf", "0", "-1"])
def test_a_weight_file_of_no_size_is_refused(
    size: str, main: Callable[[list[str]], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["megatron-to-hf", "--load", "a", "--save", "b", f"--max-shard-gb={size}"])
    assert ended.value.code == 2
    assert f"--max-shard-gb is {size}; it must be a number above 0" in capsys.readouterr().err
