"""What an engine says when it cannot answer goes from process to process."""

import pickle

from megatron_mlr1.teacher.engine import RequestError
from megatron_mlr1.teacher.wire import Code


def test_a_refusal_keeps_its_code_and_its_words_in_another_process():
    code = next(iter(Code))
    error = pickle.loads(pickle.dumps(RequestError(code, "too long")))
    assert (type(error), error.code, str(error)) == (RequestError, code, "too long")
