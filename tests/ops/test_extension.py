"""The library of compiled rows is found, loaded and refused."""

import pytest

from megatron_mlr1.errors import MachineError
from megatron_mlr1.ops.extension import find_extension, load_extension


def test_a_package_without_a_library_has_none(tmp_path):
    assert find_extension(tmp_path) is None


def test_a_library_that_does_not_load_is_refused_with_what_to_do(tmp_path):
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    library = find_extension(tmp_path)
    assert library is not None
    with pytest.raises(MachineError, match="make extension"):
        load_extension(library)
