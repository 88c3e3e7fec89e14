"""Rows of logits as a chunk of `linear_kl` has them, and how close a compiled row must come."""

import torch

from megatron_mlr1.ops.head_chunks import rows_in
from megatron_mlr1.ops.kl_rows import kl_partials_reference
from megatron_mlr1.ops.wide_matmul import wide_dtype

PAIRS = [
    (torch.float64, torch.float64),
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
]
"""Types of logits and of the gradient that takes their place."""

# In fp32 an exponential has an error of up to 2^-22 + |x| 2^-24, and exponents reach 30.
SUMS = {torch.float64: 1e-12, torch.float32: 2e-5}
ROUNDED = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.bfloat16: 2**-8,
    torch.float16: 2**-10,
}


def pair(rows, width, dtype, seed=0):
    """Logits of student and teacher, and labels of which the first is in another shard."""
    generator = torch.Generator().manual_seed(seed)
    z, t = (3 * torch.randn(2, rows, width, generator=generator)).to(dtype)
    label = torch.randint(0, max(width, 1), (rows,), generator=generator)
    label[:1] = -1
    return z, t, label


def of_rows(count, rows, dtype, seed=1):
    """Positive numbers of each row in the type of statistics."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, rows, generator=generator).add(0.1).to(wide_dtype(dtype))


def log_sums(z, t, label, temperature):
    """[3, C] of log sum exp of z, of z / T and of t / T, in the type of statistics."""
    sums = kl_partials_reference(z.double(), t.double(), label, temperature, False)
    student, teacher, q, q_hot, _, p_hot = sums[:6]
    rows = (
        student + q.log(),
        student / temperature + q_hot.log(),
        teacher / temperature + p_hot.log(),
    )
    return torch.stack(rows).to(wide_dtype(z.dtype))


def assert_sums(actual, expected, dtype):
    """Compare statistics with those of the definition in fp64, not finite ones too."""
    assert actual.dtype == wide_dtype(dtype)
    close = {"rtol": SUMS[actual.dtype], "atol": SUMS[actual.dtype], "equal_nan": True}
    torch.testing.assert_close(actual.double(), expected.double(), **close)


def assert_gradient(logits, expected, dtype):
    """Compare what stands in the place of logits with the gradient of the definition in fp64."""
    actual = rows_in(logits, dtype)
    atol = 1e-14 if dtype == torch.float64 else 2e-6
    close = {"rtol": ROUNDED[dtype], "atol": atol, "equal_nan": True}
    torch.testing.assert_close(actual.double(), expected, **close)


def target(rows, width, named, dtype, seed=3):
    """Columns of a target's ids, some twice and some in another shard, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    column = torch.randint(-1, width, (rows, named), generator=generator)
    weight = torch.rand(rows, named, generator=generator)
    return column, weight.to(wide_dtype(dtype))
