"""recipes/quickstart.ipynb runs from top to bottom."""

import nbclient
import nbformat
from helpers import ON_CPU, ROOT, TIMEOUT, read_summary


def test_the_quickstart_notebook_runs(tmp_path, monkeypatch):
    notebook = nbformat.read(ROOT / "recipes" / "quickstart.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    setup = notebook.cells[1]
    for line, shorter in (("EPOCHS = 10", "EPOCHS = 2"), ('OUTPUT = "output/notebook"', f'OUTPUT = "{tmp_path}"')):
        assert setup.source.count(line) == 1
        setup.source = setup.source.replace(line, shorter)
    for name, value in ON_CPU.items():
        monkeypatch.setenv(name, value)
    resources = {"metadata": {"path": str(ROOT / "recipes")}}
    nbclient.NotebookClient(notebook, timeout=2 * TIMEOUT, kernel_name="python3", resources=resources).execute()

    assert [read_summary(tmp_path / name)["status"] for name in ("teacher", "alone", "taught")] == ["finished"] * 3
    taught = read_summary(tmp_path / "taught")
    assert taught["teacher"]["checkpoint"] == str(tmp_path / "teacher" / "model")
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    assert "distillation: lambda 3" in printed and "error: " not in printed
    (picture,) = [out for out in notebook.cells[-2].outputs if "image/png" in out.get("data", {})]
    assert len(picture["data"]["image/png"]) > 10_000
