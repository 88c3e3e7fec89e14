"""One process's error is every process's."""

from typing import Any

from megatron_mlr1.errors import DataError
from tests.support.world import run_in_world


def body() -> dict[str, Any]:
    import torch.distributed

    from megatron_mlr1.engine.agreement import SHARED, agreed

    rank = torch.distributed.get_rank()

    def fails_on_rank_one() -> int:
        if rank == 1:
            raise DataError("wiki.bin is cut short")
        return rank

    try:
        agreed(fails_on_rank_one)
    except DataError as error:
        return {"good": agreed(lambda: 10 + rank), "bad": str(error), "notes": error.__notes__}
    return {"good": None, "bad": None, "notes": [SHARED]}


def test_an_error_of_one_process_is_raised_on_all_and_marked_as_shared(tmp_path):
    from megatron_mlr1.engine.agreement import SHARED

    answers = run_in_world(2, body, tmp_path)
    assert [answer["good"] for answer in answers] == [10, 11]
    assert [answer["bad"] for answer in answers] == ["wiki.bin is cut short"] * 2
    assert [answer["notes"] for answer in answers] == [[SHARED]] * 2


def decides() -> tuple[Any, str]:
    import torch.distributed

    from megatron_mlr1.engine.agreement import decided_by_first

    rank = torch.distributed.get_rank()

    def fails() -> int:
        raise DataError(f"seen by {rank}")

    try:
        decided_by_first(fails)
    except DataError as error:
        return decided_by_first(lambda: {"answer of": rank}), str(error)
    return None, ""


def test_the_first_process_decides_for_all(tmp_path):
    assert run_in_world(2, decides, tmp_path) == [({"answer of": 0}, "seen by 0")] * 2
