"""The kernels of cross-entropy's rows, run on a CPU, against the definitions in float64.

Blocks have 64 threads here. 2,320 columns are two and a part of what a block takes at a time, 1,003
have no vectors, and of 5 columns most threads and some blocks of a cluster get nothing.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_mlr1.ops.cross_entropy_rows import (
    cross_entropy_gradient_reference,
    cross_entropy_partials_reference,
    cross_entropy_reference,
)
from megatron_mlr1.ops.head_chunks import rows_in

TYPES = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
ROUNDING = {torch.float64: 2**-46, torch.float32: 2**-17, torch.float16: 2**-10}
ROUNDING[torch.bfloat16] = 2**-8
SHAPES = [(2320, 1), (2320, 4), (1003, 1), (1003, 3), (5, 4), (1, 1)]
Z_LOSS = 1e-2


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Logits of seven tokens, of which one has no label here, and two have no weight."""

    logits: Tensor
    label: Tensor
    weight: Tensor

    def wide(self) -> "Rows":
        """The same in float64, for the judge."""
        logits, weight = self.logits.double().clone(), self.weight.double()
        return Rows(logits=logits, label=self.label, weight=weight)


def rows_of(columns, dtype, *, largest=12.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = (largest / 3 * torch.randn(7, columns, generator=generator)).to(dtype)
    logits[0] = logits[0, 0] if columns else logits[0]  # all are equal
    if columns > 1:
        logits[1, 1::2] = -torch.inf
    label = torch.randint(max(columns, 1), (7,), generator=generator)
    label[2:4] = torch.tensor([columns - 1, -1])
    label[1] = 0
    weight = torch.rand(7, generator=generator) + 0.1
    weight[4:6] = 0
    statistics = torch.float64 if dtype == torch.float64 else torch.float32
    return Rows(logits=logits, label=label, weight=weight.to(statistics))


def placed(kernels, rows):
    """The same, where kernels may not reach beyond."""
    return Rows(
        logits=kernels.place(rows.logits, alignment=16),
        label=kernels.place(rows.label),
        weight=kernels.place(rows.weight),
    )


def assert_close(actual, expected, dtype):
    tolerance = ROUNDING[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=tolerance, atol=min(tolerance, 2**-20)
    )


def run_both(kernels, rows, narrow, *, held, cluster, order=0):
    """lse and the label's logit, and the gradient in the place of the logits."""
    out = kernels.place(torch.full((2, 7), torch.nan, dtype=rows.weight.dtype))
    shape = rows.logits.shape
    types = rows.logits.dtype, narrow
    kernels.run(
        *("both", rows.logits, rows.label, rows.weight, Z_LOSS, out),
        *(*shape, *types, held, cluster),
        order=order,
    )
    return out


@pytest.mark.parametrize(("columns", "cluster"), SHAPES)
@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
def test_partials_match_the_definition(emulated, dtype, columns, cluster):
    kernels = emulated("cross_entropy_rows")
    rows = placed(kernels, rows_of(columns, dtype))
    out = kernels.place(torch.full((3, 7), torch.nan, dtype=rows.weight.dtype))
    kernels.run(
        "partials", rows.logits, rows.label, out, *rows.logits.shape, dtype, cluster, order=2
    )
    expected = cross_entropy_partials_reference(rows.logits.double(), rows.label)
    assert_close(out, expected, out.dtype)


@pytest.mark.parametrize(("columns", "cluster"), SHAPES)
@pytest.mark.parametrize(("dtype", "narrow"), TYPES, ids=str)
def test_gradients_match_the_definition(emulated, dtype, narrow, columns, cluster):
    kernels = emulated("cross_entropy_rows")
    rows = placed(kernels, rows_of(columns, dtype))
    wide = rows.wide()
    lse = kernels.place(wide.logits.logsumexp(1).to(rows.weight.dtype))
    pull = kernels.place(rows.weight * 1.25)
    cross_entropy_gradient_reference(
        wide.logits, wide.label, lse.double(), pull.double(), wide.weight, torch.float64
    )
    weights = lse, pull, rows.weight
    kernels.run(
        *("gradient", rows.logits, rows.label, *weights),
        *(*rows.logits.shape, dtype, narrow, cluster),
        order=1,
    )
    assert_close(rows_in(rows.logits, narrow), wide.logits, narrow)


@pytest.mark.parametrize("held", [True, False], ids=["held", "read twice"])
@pytest.mark.parametrize(("columns", "cluster"), SHAPES)
@pytest.mark.parametrize(("dtype", "narrow"), TYPES, ids=str)
def test_one_pass_matches_the_definition(emulated, dtype, narrow, columns, cluster, held):
    kernels = emulated("cross_entropy_rows")
    rows = placed(kernels, rows_of(columns, dtype))
    wide = rows.wide()
    args = wide.logits, wide.label, wide.weight, Z_LOSS, torch.float64
    expected = cross_entropy_reference(*args)
    out = run_both(kernels, rows, narrow, held=held, cluster=cluster, order=3)
    assert_close(out, expected, out.dtype)
    gradient = rows_in(rows.logits, narrow)
    assert_close(gradient, wide.logits, narrow)
    assert not gradient[4:6].any()


@pytest.mark.parametrize("held", [True, False], ids=["held", "read twice"])
@pytest.mark.parametrize(("columns", "cluster"), [(2320, 1), (2320, 4), (1003, 3)])
def test_the_order_of_threads_changes_no_bit(emulated, columns, cluster, held):
    kernels = emulated("cross_entropy_rows")
    rows = rows_of(columns, torch.float32)
    results = []
    for order in range(6):
        here = placed(kernels, rows)
        out = run_both(kernels, here, torch.bfloat16, held=held, cluster=cluster, order=order)
        results.append((out.clone(), rows_in(here.logits, torch.bfloat16).clone()))
    for out, gradient in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("held", [True, False], ids=["held", "read twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits_are_as_exact_as_small_ones(emulated, dtype, held):
    kernels = emulated("cross_entropy_rows")
    rows = placed(kernels, rows_of(2320, dtype, largest=1e4))
    rows.logits[6] = 1e4 + torch.linspace(-8, 8, 2320)
    wide = rows.wide()
    args = wide.logits, wide.label, wide.weight, Z_LOSS, torch.float64
    expected = cross_entropy_reference(*args)
    out = run_both(kernels, rows, dtype, held=held, cluster=2)
    torch.testing.assert_close(out.double(), expected, rtol=2**-22, atol=2**-20)
    assert_close(rows.logits, wide.logits, dtype)


def test_rows_without_weight_get_zeros_whatever_their_logits_are(emulated):
    kernels = emulated("cross_entropy_rows")
    rows = placed(kernels, rows_of(1003, torch.float32))
    rows.weight.zero_()
    rows.logits[3:5] = torch.nan
    for held in (True, False):
        here = placed(kernels, rows)
        run_both(kernels, here, torch.float32, held=held, cluster=2)
        assert not here.logits.any()
    # The gradient alone need not even read them.
    lse = kernels.place(torch.full((7,), torch.nan))
    weights = lse, rows.weight, rows.weight
    shape = *rows.logits.shape, torch.float32, torch.bfloat16, 2
    kernels.run("gradient", rows.logits, rows.label, *weights, *shape)
    assert not rows_in(rows.logits, torch.bfloat16).any()


def test_not_a_number_stays_visible(emulated):
    kernels = emulated("cross_entropy_rows")
    rows = placed(kernels, rows_of(1003, torch.float32))
    rows.logits[0, 700] = torch.nan
    rows.logits[2, 3] = torch.inf
    out = run_both(kernels, rows, torch.bfloat16, held=True, cluster=2)
    assert out[0].isnan().tolist() == [True, False, True, False, False, False, False]
    gradient = rows_in(rows.logits, torch.bfloat16)
    assert gradient[0].isnan().all()
    assert gradient[2].isnan().all()
    assert gradient[[1, 3, 4, 5, 6]].isfinite().all()


def test_rows_may_begin_anywhere_in_memory(emulated):
    kernels = emulated("cross_entropy_rows")
    rows = rows_of(2320, torch.bfloat16)
    memory = kernels.place(torch.zeros(7 * 2320 + 1, dtype=torch.bfloat16), alignment=16)
    logits = memory[1:].view(7, 2320).copy_(rows.logits)
    here = Rows(logits=logits, label=rows.label, weight=rows.weight)
    wide = rows.wide()
    cross_entropy_reference(wide.logits, wide.label, wide.weight, Z_LOSS, torch.float64)
    run_both(kernels, here, torch.bfloat16, held=True, cluster=4)
    assert_close(logits, wide.logits, torch.bfloat16)


def test_a_shard_without_ids_knows_nothing(emulated):
    kernels = emulated("cross_entropy_rows")
    logits, label = torch.empty(7, 0), torch.full((7,), -1)
    out = kernels.place(torch.full((3, 7), torch.nan))
    kernels.run("partials", logits, label, out, 7, 0, torch.float32, 1)
    assert torch.equal(out, cross_entropy_partials_reference(logits, label))
