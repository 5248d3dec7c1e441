"""Shows the experts of single runs: loads over time, and a text with the experts of its tokens."""

import io
import warnings
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from moe_jax.report.blocks import printable
from moe_jax.report.runs import Run, Study, series

_COLUMNS = 100  # the most columns of a heat map; fewer if the page would be too large
_CELLS = 1_000_000  # the most cells of all heat maps of a page
_LAYERS = 6  # the most layers of a picture; the page shows every layer


def heat(run: Run, columns: int) -> dict[str, Any]:
  """Returns {steps: the last of each bin, load_ZES: mean load / fair share}; {} for a dense run."""
  steps, loads = series(run.train, "load_ZE")
  if not steps:
    return {}
  bins = np.array_split(np.arange(len(steps)), min(len(steps), columns))
  load_SZE = np.array([np.mean([loads[i] for i in part], axis=0) for part in bins])
  load_SZE = np.clip(np.nan_to_num(load_SZE), 0, 1)  # shares, whatever a damaged file says
  load_ZES = load_SZE.transpose(1, 2, 0) * load_SZE.shape[2]
  return {"steps": [steps[part[-1]] for part in bins], "load_ZES": load_ZES}


def data(study: Study) -> list[dict[str, Any]]:
  """Returns the data of the page's script for every MoE run that has logged loads or routing."""
  shapes = [np.shape(series(run.train[-1:], "load_ZE")[1]) for _, run in study.runs]
  cells = sum(int(np.prod(shape)) for shape in shapes if shape)
  columns = int(np.clip(_CELLS // max(cells, 1), 20, _COLUMNS))
  entries = []
  for arm, run in study.runs:
    loads = heat(run, columns)
    if not loads and not run.routing:
      continue
    if loads:
      loads["load_ZES"] = np.rint(100 * loads["load_ZES"]).astype(int).tolist()
    routing = run.routing
    entries.append(
      {
        "label": f"{arm.name}, seed {run.seed}",
        "layers": run.layers(),
        "heat": loads,
        "text": routing.get("text") or {},
        "domains": routing.get("domains") or [],
        "domain_load_ZGE": routing.get("domain_load_ZGE") or [],
        "top_tokens_ZE": routing.get("top_tokens_ZE") or [],
      }
    )
  return entries


def picture(study: Study) -> bytes:
  """Draws a PNG with a row for each MoE arm (its first run) and a column for each layer.

  Returns the PNG, or b"" if there is no MoE arm to draw.
  """
  rows = []
  for arm in study.arms:
    pairs = ((run, heat(run, _COLUMNS)) for run in arm.runs)
    first = next(((run, loads) for run, loads in pairs if loads), None)
    if first:
      rows.append((arm, *first))
  if not rows:
    return b""
  columns = [
    np.unique(np.linspace(0, len(loads["load_ZES"]) - 1, _LAYERS).astype(int))
    for _, _, loads in rows
  ]
  width = max(map(len, columns))
  figure, axes = plt.subplots(
    len(rows), width, squeeze=False, figsize=(1.6 + 2.3 * width, 0.6 + 1.6 * len(rows)),
    layout="constrained", sharex="row",
  )  # fmt: skip
  for (arm, run, loads), layers, line in zip(rows, columns, axes, strict=True):
    for z, place in zip(layers, line, strict=False):
      image = place.imshow(
        loads["load_ZES"][z], cmap="RdBu_r", vmin=0, vmax=2, aspect="auto",
        interpolation="nearest", extent=_extent(loads),
      )  # fmt: skip
      place.set_title(f"layer {run.layers()[z]}", fontsize="small")
      place.tick_params(labelsize="x-small")
    line[0].set_ylabel(f"{printable(arm.name)}\nexpert", fontsize="small", parse_math=False)
    for place in line[len(layers) :]:
      place.set_axis_off()
  for place in axes[-1]:
    place.set_xlabel("step", fontsize="small")
  figure.colorbar(image, ax=axes, extend="max", label="load / fair share")
  return png(figure, 110)


def png(figure: plt.Figure, dpi: int) -> bytes:
  """Returns a figure as a PNG, and closes it."""
  buffer = io.BytesIO()
  with warnings.catch_warnings():
    # A letter of a name that the font does not have is drawn as a box.
    warnings.filterwarnings("ignore", "Glyph", UserWarning)
    figure.savefig(buffer, dpi=dpi, format="png")
  plt.close(figure)
  return buffer.getvalue()


def _extent(loads: dict[str, Any]) -> tuple[float, float, float, float]:
  """Returns the extent that puts expert 0 at the top and its number in the middle of its row."""
  experts = loads["load_ZES"].shape[1]
  return 0, max(loads["steps"][-1], 1), experts - 0.5, -0.5
