"""A picture of what a run reads: shares and epochs of its corpora."""

from collections.abc import Sequence
from math import log10
from typing import TYPE_CHECKING, BinaryIO

from megatron_mlr1.data.mixture_report import Reading

if TYPE_CHECKING:
    from PIL import ImageDraw

WIDTH, ROW, HEAD, FOOT = 1100, 26, 84, 30
"""Of the picture, in pixels: the whole, one corpus, and what stands above and below all."""
SHARES, EPOCHS = (230, 560), (690, 1020)
"""Left and right end of the two rows of bars; what is written of a bar stands to its right."""
BAR, TOO_OFTEN, LINE = "#2a6fbb", "#e08a1e", "#bbbbbb"


def draw_readings(
    readings: Sequence[Reading], heading: str, most_epochs: float, file: BinaryIO
) -> None:
    """Draw the share of each corpus and how often it is read, as a PNG.

    Epochs are on a logarithmic scale, with a line at one and one at `most_epochs`; corpora beyond
    that have another colour.

    Raises:
        OSError: the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    height = HEAD + ROW * len(readings) + FOOT
    picture = Image.new("RGB", (WIDTH, height), "white")
    pen = ImageDraw.Draw(picture)
    large, small = ImageFont.load_default(16), ImageFont.load_default(13)
    pen.text((20, 14), heading, "black", large)
    pen.text((SHARES[0], 54), "share of the samples", "black", small)
    pen.text((EPOCHS[0], 54), "epochs (logarithmic)", "black", small)
    most_share = max(it.share for it in readings)
    known = [it.epochs for it in readings if it.epochs]
    scale = _Scale(min([*known, 0.1]), max([*known, most_epochs]))
    for epochs in (1.0, most_epochs):
        x = scale.place(epochs)
        pen.line((x, HEAD - 8, x, height - FOOT), LINE)
        pen.text((x, height - FOOT + 4), f"{epochs:g}", "black", small, "mt")
    for number, it in enumerate(readings):
        y = HEAD + ROW * number
        pen.text((SHARES[0] - 10, y + 9), it.corpus[:28], "black", small, "rm")
        end = SHARES[0] + (SHARES[1] - SHARES[0]) * it.share / most_share
        _bar(pen, (SHARES[0], end, y), f"{it.share:.2%}", BAR)
        if it.epochs:
            color = TOO_OFTEN if it.epochs > most_epochs else BAR
            _bar(pen, (EPOCHS[0], scale.place(it.epochs), y), f"{it.epochs:.2f}", color)
    picture.save(file, "PNG")


class _Scale:
    """Epochs to places, from the left end of the bars at a little below the least."""

    def __init__(self, least: float, most: float) -> None:
        self._begin, self._end = log10(least) - 0.1, log10(most)

    def place(self, epochs: float) -> float:
        part = (log10(epochs) - self._begin) / (self._end - self._begin)
        return EPOCHS[0] + (EPOCHS[1] - EPOCHS[0]) * part


def _bar(
    pen: "ImageDraw.ImageDraw", place: tuple[float, float, float], text: str, color: str
) -> None:
    from PIL import ImageFont

    left, right, y = place
    pen.rectangle((left, y, max(right, left + 1), y + ROW - 8), color)
    pen.text((right + 6, y + 9), text, "black", ImageFont.load_default(13), "lm")
