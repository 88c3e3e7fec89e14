"""FP8 on a GPU trains as fp32 does, from the same checkpoint; `tests/engine/test_fp8.py` is its
sibling without one."""

import pytest

from tests.end_to_end.conftest import LAST, record

pytestmark = [pytest.mark.gpu, pytest.mark.te]

FP8 = ("--bf16", "--fp8-format", "hybrid", "--fp8-recipe")
RECIPES = {
    "delayed": ("delayed",),
    "delayed-1024": (
        *("delayed", "--fp8-amax-history-len", "1024"),
        *("--fp8-amax-compute-algo", "max"),
    ),
    "tensorwise": ("tensorwise",),
    "ends-bf16": ("tensorwise", "--first-last-layers-bf16"),
    "parameters": ("tensorwise", "--fp8-param-gather"),
    "blockwise": ("blockwise",),
}


def needed(name, capability, cuda):
    """Why a recipe is left out on this device, or None."""
    if name == "blockwise" and (capability < (9, 0) or cuda < (12, 9)):
        return f"blockwise needs compute capability 9.0 and CUDA 12.9, found {capability}, {cuda}"
    return None


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_trains_like_fp32(name, train, single, from_step_five):
    import torch

    cuda = tuple(map(int, torch.version.cuda.split(".")[:2]))
    reason = needed(name, torch.cuda.get_device_capability(), cuda)
    if reason:
        pytest.skip(reason)
    save = from_step_five(name)
    done = train(save, *FP8, *RECIPES[name], "--no-load-optim", gpu=True)
    assert done.code == 0, done.output[-3000:]
    # 25 steps from step 5: FP8 keeps two to three binary digits of each factor.
    assert record(save)[LAST]["lm loss"] == pytest.approx(record(single)[LAST]["lm loss"], rel=0.03)


def test_a_run_in_fp8_goes_on_from_its_own_checkpoint(train, from_step_five):
    save = from_step_five("resumed")
    words = (*FP8, "tensorwise", "--no-load-optim")
    stopped = train(save, *words, "--save-interval", "15", "--exit-interval", "15", gpu=True)
    assert stopped.code == 0, stopped.output[-3000:]
    done = train(save, *FP8, "tensorwise", gpu=True)
    assert done.code == 0, done.output[-3000:]
    assert "goes on from its last checkpoint" in done.output
    assert record(save)[LAST]["lm loss"] < record(save)[6]["lm loss"]


def test_a_recipe_of_a_later_device_is_refused_with_those_that_it_has(train, from_step_five):
    import torch

    if torch.cuda.get_device_capability() >= (10, 0):
        pytest.skip("this device has mxfp8")
    done = train(from_step_five("mxfp8"), *FP8, "mxfp8", gpu=True)
    assert done.code != 0
    assert "needs compute capability 10.0" in done.output
