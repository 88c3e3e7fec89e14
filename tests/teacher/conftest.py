"""A small teacher for the tests that need a real one; made once for all of them."""

import pytest

from tests.support.teachers import make_teacher_folder


@pytest.fixture
def one_thread():
    """Let torch compute in one thread, as replicas do; their number is part of the fingerprint."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory):
    return make_teacher_folder(tmp_path_factory.mktemp("teacher") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_teacher(teacher_folder):
    """Two layers of width 64 over 256 ids, in fp32 on the CPU."""
    import torch

    from megatron_mlr1.teacher.model import load_teacher

    return load_teacher(teacher_folder, torch.device("cpu"), "float32")
