"""What a program's user and its caller learn from its end."""

import os
import signal
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
