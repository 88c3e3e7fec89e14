"""csrc/cross_entropy_rows.cu, run whole on a CPU: what it launches, and what that computes."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from megatron_mlr1.ops.cross_entropy_rows import (
    cross_entropy_gradient_reference,
    cross_entropy_partials_reference,
    cross_entropy_reference,
)
from tests.csrc.devices import A100, DEVICES, H200, KIB, L40S, OLD_CODE, SLICE, displaced, strided
from tests.support.logit_rows import PAIRS, assert_gradient, assert_sums, of_rows, pair

VOCABULARY = 128_256
Z_LOSS = 1e-2
# Shared memory of the reductions over a row: 16 warps and 16 ranks have two numbers each.
SUMS = {torch.float64: 512}


@pytest.fixture(scope="module")
def host(host_code):
    return host_code("cross_entropy_rows")


def rows_of(rows, width, dtype):
    """Logits, labels of which the first is in another shard, weights of which the last is zero."""
    logits, _, label = pair(rows, width, dtype)
    weight = of_rows(1, rows, dtype)[0]
    weight[1:][-1:] = 0
    return logits, label, weight


def in_one_pass(host, device, given, narrow, order=0):
    """Run `cross_entropy_` on a device, compare with the definition, give the one launch."""
    logits, label, weight = given
    run = host.run(device, "cross_entropy_", logits, label, weight, Z_LOSS, narrow, order=order)
    wide = logits.double(), label, weight.double()
    expected = cross_entropy_reference(*wide, Z_LOSS, torch.float64)
    assert_sums(run.result, expected, logits.dtype)
    assert_gradient(run.arguments[0], wide[0], narrow)
    (launch,) = run.launches
    assert launch.grid == (logits.size(0) * launch.cluster, 1, 1)
    assert launch.block == (512, 1, 1)
    return launch


def shared_bytes(columns, dtype, cluster, vector):
    """What a block needs that holds its share of a row."""
    share = -(-columns // (cluster * vector)) * vector
    return SUMS.get(dtype, 256) + share * dtype.itemsize


# Blocks of the cluster that holds a row, three to a multiprocessor or else as many as it has; None
# where a block may not have as much memory, so that the row is read twice.
HELD = {
    ("H200", torch.float32): 8,
    ("H200", torch.float64): 8,
    ("H200", torch.bfloat16): 4,
    ("A100", torch.bfloat16): None,
    ("L40S", torch.float32): None,
    ("old code", torch.float32): None,
    ("slice", torch.float32): 4,
    ("slice", torch.float64): None,
}


@pytest.mark.parametrize(("device", "dtype"), HELD, ids=str)
def test_a_cluster_holds_a_row_of_the_whole_vocabulary_where_it_can(host, device, dtype):
    described = DEVICES[device]
    launch = in_one_pass(host, described, rows_of(3, VOCABULARY, dtype), dtype)
    held = HELD[device, dtype]
    if held is None:
        assert launch.cluster == (described.largest_cluster if described.code >= 90 else 1)
        assert launch.shared_bytes == SUMS.get(dtype, 256)
    else:
        assert launch.cluster == held
        vector = 16 // dtype.itemsize
        assert launch.shared_bytes == shared_bytes(VOCABULARY, dtype, held, vector)
        assert launch.shared_bytes > 48 * KIB, "the kernel had to ask for it"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "narrow"), PAIRS, ids=str)
def test_every_type_and_length_of_a_row_on_every_device(host, device, dtype, narrow):
    for number, (rows, width) in enumerate([(3, 32_063), (2, 2_320), (2, 1)]):
        given = rows_of(rows, width, dtype)
        launch = in_one_pass(host, DEVICES[device], given, narrow, order=number)
        if width != 32_063:
            assert launch.cluster == 1
            vector = 16 // dtype.itemsize if width > 1 else 1
            assert launch.shared_bytes == shared_bytes(width, dtype, 1, vector)


def test_an_odd_row_is_held_by_the_smallest_cluster_that_leaves_room_for_two_others(host):
    given = rows_of(17, 32_063, torch.float32)
    for device, cluster in ((H200, 2), (A100, 1), (SLICE, 2)):
        launch = in_one_pass(host, device, given, torch.bfloat16, order=1)
        held = shared_bytes(32_063, torch.float32, cluster, 1)
        assert (launch.cluster, launch.shared_bytes) == (cluster, held)
    # 125 KiB of a row in one block are more than this device has.
    launch = in_one_pass(host, L40S, given, torch.float32)
    assert (launch.cluster, launch.shared_bytes) == (1, 256)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_that_begin_anywhere_are_moved_one_by_one(host, dtype):
    logits, label, weight = rows_of(2, 2_320, dtype)
    in_one_pass(host, H200, (displaced(logits), label, weight), dtype, order=2)


def test_labels_and_numbers_of_rows_may_have_strides(host):
    logits, label, weight = rows_of(5, 2_320, torch.float32)
    in_one_pass(host, H200, (logits, strided(label), strided(weight)), torch.bfloat16)
    run = host.run(H200, "cross_entropy_partials", logits, strided(label))
    assert_sums(run.result, cross_entropy_partials_reference(logits, label), torch.float32)


def test_a_kernel_asks_anew_for_rows_of_another_length(host):
    for width in (VOCABULARY, 64, VOCABULARY // 2):
        in_one_pass(host, A100, rows_of(2, width, torch.bfloat16), torch.bfloat16)


def test_other_logits_than_whole_rows_are_refused(host):
    logits, label, weight = rows_of(4, 64, torch.float32)
    with pytest.raises(RuntimeError, match="contiguous"):
        host.run(H200, "cross_entropy_partials", strided(logits), label)
    words = logits.bfloat16(), label, weight, Z_LOSS, torch.float16
    with pytest.raises(RuntimeError, match="gradient of type Half"):
        host.run(H200, "cross_entropy_", *words)
    with pytest.raises(RuntimeError, match="logits of type Int"):
        host.run(H200, "cross_entropy_partials", logits.int(), label)


# Two blocks for each multiprocessor, in clusters of a power of two.
SIXTEEN = replace(H200, multiprocessors=16)
CLUSTERS = [
    *[(H200, rows, 8) for rows in (1, 17)],
    *[(SIXTEEN, rows, cluster) for rows, cluster in [(4, 8), (8, 4), (16, 2), (17, 2), (32, 1)]],
    *[(SLICE, rows, cluster) for rows, cluster in [(1, 4), (3, 4), (4, 2), (8, 1)]],
    *[(device, 1, 1) for device in (A100, OLD_CODE)],
]


@pytest.mark.parametrize(("device", "rows", "cluster"), CLUSTERS)
def test_few_rows_are_shared_by_the_blocks_of_clusters(host, device, rows, cluster):
    logits, label, weight = rows_of(rows, 1_003, torch.float32)
    run = host.run(device, "cross_entropy_partials", logits, label)
    assert [launch.cluster for launch in run.launches] == [cluster]
    partials = cross_entropy_partials_reference(logits.double(), label)
    assert_sums(run.result, partials, torch.float32)
    lse = (partials[0] + partials[1].log()).float()
    words = label, lse, weight * 1.25, weight
    run = host.run(device, "cross_entropy_gradient_", logits, *words, torch.bfloat16, order=1)
    assert [(launch.cluster, launch.shared_bytes) for launch in run.launches] == [(cluster, 0)]
    wide, statistics = logits.double(), [each.double() for each in words[1:]]
    cross_entropy_gradient_reference(wide, label, *statistics, torch.float64)
    assert_gradient(run.arguments[0], wide, torch.bfloat16)


@pytest.mark.parametrize(("rows", "pair_of_types"), [*product((1, 3), PAIRS)], ids=str)
def test_shards_of_the_vocabulary_give_partials_and_take_gradients(host, rows, pair_of_types):
    dtype, narrow = pair_of_types
    width = VOCABULARY // 2 if dtype == torch.bfloat16 else 16_031
    logits, label, weight = rows_of(rows, width, dtype)
    run = host.run(H200, "cross_entropy_partials", logits, label, order=1)
    partials = cross_entropy_partials_reference(logits.double(), label)
    assert_sums(run.result, partials, dtype)
    lse = (partials[0] + partials[1].log()).to(weight.dtype)
    statistics = lse, weight * 1.25, weight
    run = host.run(H200, "cross_entropy_gradient_", logits, label, *statistics, narrow, order=2)
    wide = logits.double()
    words = [each.double() for each in statistics]
    cross_entropy_gradient_reference(wide, label, *words, torch.float64)
    assert_gradient(run.arguments[0], wide, narrow)


@pytest.mark.parametrize("shape", [(0, 2_320), (3, 0), (0, 0)], ids=str)
def test_nothing_is_as_in_the_definition(host, shape):
    logits, label, weight = torch.empty(shape), torch.full(shape[:1], -1), torch.ones(shape[:1])
    run = host.run(H200, "cross_entropy_partials", logits, label)
    torch.testing.assert_close(run.result, cross_entropy_partials_reference(logits, label))
    assert len(run.launches) == (shape[0] > 0)
    words = label, weight, weight, weight, torch.bfloat16
    assert not host.run(H200, "cross_entropy_gradient_", logits, *words).launches
    words = label, weight, Z_LOSS, torch.float32
    run = host.run(H200, "cross_entropy_", logits, *words)
    torch.testing.assert_close(run.result, cross_entropy_reference(logits, *words))
