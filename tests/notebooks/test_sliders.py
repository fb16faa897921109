"""The sliders of notebook 05, moved as a front end would move them."""

import nbclient
import nbformat
import pytest
from notebook_kernel import code_of

WHAT_THEY_NEED = ("cell-01", "cell-05", "cell-08", "cell-09", "cell-10", "cell-14")
SLIDERS = ("hands-functions", "hands-draw", "hands-sliders")
# The picture comes back from the front end after the cell that moved the slider.
MOVES = (
    "sliders['reply 1'].value = 0.9",
    "(first,) = [output['data']['image/png'] for output in drawn.outputs]",
    "sliders['reply 1'].value = 0.1",
    "(second,) = [output['data']['image/png'] for output in drawn.outputs]",
    "print(first != second)",
)


@pytest.mark.slow
def test_moving_a_slider_draws_the_group_again(monkeypatch):
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel chooses its own
    cells = code_of("05")
    sources = [*(cells[name] for name in (*WHAT_THEY_NEED, *SLIDERS)), *MOVES]
    made = [nbformat.v4.new_code_cell(source) for source in sources]
    client = nbclient.NotebookClient(nbformat.v4.new_notebook(cells=made), timeout=300)
    notebook = client.execute()
    said = "".join(o.text for o in notebook.cells[-1].outputs if o.name == "stdout")
    assert said == "True\n"
