"""A bar in a real kernel: hundreds of updates, one output."""

import nbformat
from nbclient import NotebookClient

CELL = """
from vla_bench.progress import moving_bar
with moving_bar(total=7, desc="night") as bar:
    bar.mininterval = 0
    for _ in range(7):
        bar.update()
"""


def test_an_executed_notebook_holds_the_last_line_alone():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    NotebookClient(notebook, timeout=60).execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data" and "7/7" in output.data["text/plain"]
    assert "night: 100%" in output.data["text/plain"] and "HBox" not in str(output)


def test_elsewhere_the_bar_is_on_the_error_stream(capsys):
    from vla_bench.progress import moving_bar

    with moving_bar(total=2) as bar:
        bar.update(2)
    told = capsys.readouterr()
    assert "2/2" in told.err and not told.out
