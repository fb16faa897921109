"""How a picture becomes tokens, drawn."""

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from univg_nb.figures import diagrams


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.axes[0].texts]


def test_blocks_are_numbered_as_tokens_follow_each_other():
    figure = diagrams.draw_patches(Image.new("RGB", (48, 32)), patch=8, merge=2)
    assert texts(figure) == ["1", "2", "3", "4", "5", "6"]
    places = [text.get_position() for text in figure.axes[0].texts]
    assert places[:2] == [(8, 8), (24, 8)] and places[3] == (8, 24)


def test_many_tokens_have_no_numbers():
    figure = diagrams.draw_patches(Image.new("RGB", (144, 16)), patch=8, merge=2)
    assert texts(figure) == []


def test_a_picture_that_was_not_resized_is_refused():
    with pytest.raises(ValueError, match=r"\(50, 32\).*blocks of 16.*fit_size"):
        diagrams.draw_patches(Image.new("RGB", (50, 32)), patch=8, merge=2)


def test_a_position_grid_holds_the_three_numbers_of_every_token():
    positions = torch.tensor([[7, 7], [7, 8], [7, 7]])  # one column, two rows
    figure = diagrams.draw_position_grid(positions, columns=1)
    assert texts(figure) == ["7", "7", "7", "7", "8", "7"]


def test_positions_are_plotted_with_the_picture_shaded():
    positions = torch.tensor([[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]])
    figure = diagrams.plot_positions(positions, torch.tensor([0, 1, 1, 0]) > 0)
    axes = figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == positions.tolist()
    assert len(axes.patches) == 2


def test_the_teaser_names_the_published_averages_beside_its_titles():
    columns = {"model": "base", "column": "AVG", "acc": 20.0, "lo": 18.0, "hi": 22.0}
    results = pd.DataFrame([columns])
    figure = diagrams.draw_teaser([], results, {"LISA": results})
    panels = figure.subfigs[1].axes
    assert [ax.get_title() for ax in panels] == ["MIG", "LISA"]
    assert {ax.get_xlim() for ax in panels} == {(0, 100)}
    captions = [ax.texts[-1].get_text() for ax in panels]
    assert "UniVG-R1 72.6" in captions[0] and "UniVG-R1 58.6" in captions[1]
