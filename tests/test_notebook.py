"""docs/tour.ipynb runs in a kernel and finds what it says; what it shows is fit to be stored."""

import ast
import base64
import json
import re

import numpy as np
import pytest

import moe_jax
from moe_jax.config.run import field_names
from tests.support.scripts import ONE_DEVICE
from tests.support.toys import ROOT

PAGE = ROOT / "docs/tour.ipynb"
RUNS = "runs/tour"


def cells(kind, notebook):
  return [cell for cell in notebook["cells"] if cell["cell_type"] == kind]


def stored():
  return json.loads(PAGE.read_text())


def text_of(cell):
  """What a cell prints; Jupyter may hand it over in parts."""
  streams = (o["text"] for o in cell["outputs"] if o["output_type"] == "stream")
  return "".join("".join(text) for text in streams)


def html_of(cell):
  (found,) = (o["data"]["text/html"] for o in cell["outputs"] if "text/html" in o.get("data", {}))
  return "".join(found)


def test_its_outputs_are_those_of_one_execution_and_small():
  code = cells("code", stored())
  assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
  assert not [o for cell in code for o in cell["outputs"] if o["output_type"] == "error"]
  outputs = (o.get("data", {}) for cell in code for o in cell["outputs"])
  pictures = [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]
  assert len(pictures) == 3 and max(map(len, pictures)) < 60_000
  assert PAGE.stat().st_size < 300_000
  text = re.sub(r'"image/png": "[^"]+"', "", PAGE.read_text())
  # Paths and hosts of a machine, and addresses of objects.
  assert not re.search(r"(?<![\w.<:])/(?:[a-z]+/)+|0x[0-9a-f]{6,}|https?://", text)


def test_what_it_names_exists():
  notebook = stored()
  code = "\n".join("".join(cell["source"]) for cell in cells("code", notebook))
  fields = re.findall(r'"([a-z]+\.[a-z_.]+)=', code)
  assert len(fields) == 5 and set(fields) <= set(field_names())
  names = {n.attr for n in ast.walk(ast.parse(code)) if _is_of(n, "moe_jax")} - {"__file__"}
  assert names == {"load"} and callable(moe_jax.load)
  text = "\n".join("".join(cell["source"]) for cell in notebook["cells"])
  links = re.findall(r"\]\(([^)]+)\)", text)
  assert len(links) >= 5 and all((PAGE.parent / link).is_file() for link in links)
  assert all((ROOT / path).exists() for path in re.findall(r"configs/\w+\.py", text))


def _is_of(node, name):
  return isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == name


@pytest.mark.slow
def test_it_runs_in_a_kernel(tmp_path, monkeypatch):
  nbclient = pytest.importorskip("nbclient")
  nbformat = pytest.importorskip("nbformat")
  for name in ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "JUPYTER_DATA_DIR"):
    monkeypatch.setenv(name, str(tmp_path / name))
  notebook = nbformat.reads(PAGE.read_text().replace(RUNS, str(tmp_path / "tour")), 4)
  resources = {"metadata": {"path": str(tmp_path)}}
  client = nbclient.NotebookClient(notebook, timeout=500, resources=resources)
  client.execute(env=ONE_DEVICE | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"})
  code = cells("code", notebook)

  # What it showed of a text is what the run says, from here.
  model = moe_jax.load(tmp_path / "tour/balanced")
  (coloured,) = (cell for cell in code if "HTML(" in cell["source"])
  text = re.search(r'TEXT = """(.*?)"""', coloured["source"], re.S)[1]
  routing, shown = model.routing(text, 1.25), html_of(coloured)
  assert shown.count("<span") == 2 * len(routing.tokens) == 2 * (len(text) + 1)
  dropped_ZT = routing.dropped_ZTK[:, :, 0]
  assert shown.count("line-through") == dropped_ZT.sum() > 0
  colours = re.findall(r"background:(#\w+)", shown)
  of_expert = dict(zip(routing.expert_ZTK[:, :, 0].flat, colours, strict=True))
  assert len(set(of_expert.values())) == len(of_expert) > 2
  assert [of_expert[e] for e in routing.expert_ZTK[:, :, 0].flat] == colours
  numbers = text_of(code[code.index(coloured) + 1])
  assert str(routing.dropped_ZTK.sum(axis=1).tolist()) in numbers and ": 0 dropped" in numbers

  # The comparison has the numbers of the files, and shows what the text below it says.
  found = re.findall(
    r"(\w+) +validation loss ([\d.]+), dropped ([\d.]+)%, shares ([\d.]+) to", text_of(code[-1])
  )
  losses, dropped, least = np.array([numbers for _, *numbers in found], float).T
  assert [name for name, *_ in found] == ["balanced", "unbalanced"]
  for name, loss in zip(("balanced", "unbalanced"), losses, strict=True):
    lines = (tmp_path / "tour" / name / "metrics.jsonl").read_text().splitlines()
    last = [v for v in map(json.loads, lines) if "validation/loss" in v][-1]
    assert last["step"] == 100 and abs(last["validation/loss"] - loss) < 6e-4
  assert dropped[1] > 1.5 * dropped[0] and least[1] < least[0]
  assert abs(losses[1] - losses[0]) < 0.05 and losses.max() < 3
  assert all("alarm: collapse" in text_of(c) for c in code if "load_balance=0" in c["source"])
