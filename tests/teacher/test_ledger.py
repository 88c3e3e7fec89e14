import json

import numpy as np
import pytest

from megatron_mlr1.errors import DataError, MachineError
from megatron_mlr1.teacher.agreement import Branch
from megatron_mlr1.teacher.ledger import LEDGER, Digest, Entry, Ledger, combine, read


def entry(iteration, branch=Branch.KD):
    return Entry(iteration=iteration, tokens="aa", targets=f"{iteration:x}", branch=branch)


def test_every_step_is_there_when_the_process_is_killed(tmp_path):
    ledger = Ledger(tmp_path, last_iteration=0)
    for iteration in range(1, 4):
        ledger.add(entry(iteration))
        assert read(tmp_path)[-1] == entry(iteration)  # without closing the file


def test_a_run_that_resumes_forgets_what_it_does_again(tmp_path):
    ledger = Ledger(tmp_path, last_iteration=0)
    for iteration in range(1, 8):
        ledger.add(entry(iteration, Branch.CE_ONLY if iteration % 3 == 0 else Branch.KD))
    assert ledger.num_ce_only == 2
    ledger.close()
    again = Ledger(tmp_path, last_iteration=4)
    assert again.num_ce_only == 1
    again.add(entry(5))
    again.close()
    assert [one.iteration for one in read(tmp_path)] == [1, 2, 3, 4, 5]


def test_half_a_line_of_a_killed_process_is_left_out(tmp_path):
    ledger = Ledger(tmp_path, last_iteration=0)
    ledger.add(entry(1))
    ledger.close()
    path = tmp_path / LEDGER
    path.write_text(path.read_text() + json.dumps({"iteration": 2})[:9])
    assert read(tmp_path) == [entry(1)]


def test_a_line_that_is_none_is_named(tmp_path):
    (tmp_path / LEDGER).write_text('{"iteration": 1, "branch": "sleep"}\n')
    with pytest.raises(DataError, match="line 1"):
        Ledger(tmp_path, last_iteration=5)


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(MachineError, match="ledger"):
        Ledger(tmp_path / "file" / "folder", last_iteration=0)


def test_a_digest_knows_bits_shapes_types_and_order():
    arrays = [np.arange(6, dtype="<i4"), np.arange(6, dtype="<f4").reshape(2, 3)]

    def digest(*arrays):
        one = Digest()
        one.add(arrays)
        return one.value()

    same = Digest()
    for array in arrays:
        same.add([array.copy()])
    assert digest(*arrays) == same.value()
    one, other = arrays
    others = [[other, one], [one, other.reshape(3, 2)], [one.view("<f4"), other]]
    assert digest(*arrays) not in [digest(*other) for other in others]


def test_ranks_combine_in_their_order():
    assert combine([b"a" * 16, b"b" * 16]) != combine([b"b" * 16, b"a" * 16])
    assert len(combine([b"a" * 16])) == 32
