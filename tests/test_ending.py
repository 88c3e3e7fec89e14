"""What a program's user and its caller learn from its end."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from megatron_mlr1.ending import clean_exit
from megatron_mlr1.errors import DataError, MachineError


@pytest.mark.parametrize("kind", [DataError, MachineError])
def test_an_error_of_the_users_is_its_message_and_its_exit_status(kind, capsys):
    with pytest.raises(SystemExit) as ended, clean_exit():
        raise kind("The file is empty. Give another.")
    assert ended.value.code == kind.exit_code != 0
    assert capsys.readouterr().err == "The file is empty. Give another.\n"


def test_a_fault_of_ours_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), clean_exit():
        raise ZeroDivisionError


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_the_work_clean_up_and_gives_its_status(number):
    cleaned = []

    @contextmanager
    def cleaning():
        try:
            yield
        finally:
            cleaned.append(True)

    with pytest.raises(SystemExit) as ended, clean_exit(), cleaning():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert cleaned


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("kind", [TypeError, DataError])
def test_a_signal_that_became_another_error_gives_its_status_and_no_word(number, kind, capsys):
    @contextmanager
    def turning():
        try:
            yield
        except BaseException:
            raise kind("no such file") from None

    with pytest.raises(SystemExit) as ended, clean_exit(), turning():
        os.kill(os.getpid(), number)
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err == ""


def test_the_callers_own_handling_of_sigterm_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with clean_exit():
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


PRINT = """
from megatron_mlr1.ending import clean_exit
with clean_exit():
    for _ in range({times}):
        print("a line" * 100)
"""


@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_ends_it_as_sigpipe_does_and_in_silence(times, unbuffered):
    read, write = os.pipe()
    os.close(read)
    try:
        command = [sys.executable, "-c", PRINT.format(times=times)]
        environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
        done = subprocess.run(
            command, stdout=write, stderr=subprocess.PIPE, env=environment, timeout=60
        )
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a full disk")
def test_output_that_cannot_be_kept_is_an_error_in_one_line():
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "-c", PRINT.format(times=1)]
        environment = os.environ | {"PYTHONUNBUFFERED": ""}
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, env=environment, text=True, timeout=60
        )
    assert done.returncode == 2
    assert done.stderr == (
        "What is printed cannot be written: No space left on device. Send it elsewhere.\n"
    )


def test_a_closed_output_is_nothing_to_end_for():
    command = [sys.executable, "-c", PRINT.format(times=1)]
    done = subprocess.run(
        command, preexec_fn=lambda: os.close(1), stderr=subprocess.PIPE, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, b"")
