"""The picture shows a bar for each corpus, as long as its share and as its epochs."""

from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from megatron_mlr1.data.mixture_picture import (
    BAR,
    EPOCHS,
    HEAD,
    ROW,
    SHARES,
    TOO_OFTEN,
    draw_readings,
)
from megatron_mlr1.data.mixture_report import Reading


def reading(share, epochs):
    return Reading(
        corpus="any",
        weights=(share,),
        num_files=1,
        num_tokens=1,
        num_samples=1,
        share=share,
        drawn_tokens=1,
        epochs=epochs,
        repeated=None,
    )


def drawn(readings, most_epochs=4.0):
    file = BytesIO()
    draw_readings(readings, "heading", most_epochs, file)
    return np.asarray(Image.open(file).convert("RGB"))


def bar(pixels, row, left, color):
    """Columns of a corpus's bar that have its color, from its left end on."""
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    line = pixels[HEAD + ROW * row + 2, int(left) :]
    return int((line == rgb).all(axis=1).sum())


def test_bars_are_as_long_as_the_shares():
    pixels = drawn([reading(0.5, None), reading(0.25, None), reading(0.0, None)])
    lengths = [bar(pixels, row, SHARES[0], BAR) for row in range(3)]
    assert lengths[0] == pytest.approx(SHARES[1] - SHARES[0], abs=2)
    assert lengths[1] == pytest.approx(lengths[0] / 2, abs=2)
    assert lengths[2] <= 2


def test_corpora_that_are_read_too_often_have_another_color():
    pixels = drawn([reading(0.5, 0.1), reading(0.3, 3.9), reading(0.2, 39.0)])
    lengths = [bar(pixels, row, EPOCHS[0], BAR) for row in range(3)]
    assert 0 < lengths[0] < lengths[1]
    assert lengths[2] == 0
    assert bar(pixels, 2, EPOCHS[0], TOO_OFTEN) > lengths[1]
    assert bar(drawn([reading(1.0, 39.0)], 50.0), 0, EPOCHS[0], TOO_OFTEN) == 0


def test_unknown_sizes_have_no_bar_of_epochs():
    pixels = drawn([reading(1.0, None)])
    assert bar(pixels, 0, EPOCHS[0], BAR) == bar(pixels, 0, EPOCHS[0], TOO_OFTEN) == 0
