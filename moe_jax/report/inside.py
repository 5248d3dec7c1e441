"""Shows the experts of single runs: loads over time, and a text with the experts of its tokens."""

import json

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moe_jax.report import charts
from moe_jax.report.blocks import Chart, Excerpt, Section, Table, Text
from moe_jax.report.runs import Run, Study, series

_COLUMNS = 100  # the most columns of a heat map
_LAYERS = 6  # the most layers that are shown of a run
_NOTE = """\
Loads: a row of maps for each arm, of its first run; experts down, steps across; red is more than
the fair share. Texts: the colour is that of the best expert that took the token, whose experts and
gates appear under the pointer. Struck through: no expert took it. Underlined: an expert dropped
it."""


def inside_section(study: Study) -> Section:
  """Returns the heat maps of the loads, and of each arm a text by its experts."""
  return Section("Inside a run", [Text(_NOTE, small=True), *picture(study), *excerpts(study)])


def heat(run: Run, columns: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns the last step of each bin, and the mean load / fair share load_ZES."""
  steps, load_SZE = series(run.train, "load_ZE")
  if not len(steps):
    return steps, np.zeros((0, 0, 0))
  load_SZE = np.clip(np.nan_to_num(load_SZE), 0, 1)  # shares, whatever a damaged file says
  bins = np.array_split(np.arange(len(steps)), min(len(steps), columns))
  load_SZE = np.array([load_SZE[part].mean(axis=0) for part in bins]) * load_SZE.shape[2]
  return steps[[part[-1] for part in bins]], load_SZE.transpose(1, 2, 0)


def spread_out(layers: int) -> list[int]:
  """Returns which of a run's layers are shown: the first, the last, and some between."""
  return sorted({*np.linspace(0, layers - 1, min(_LAYERS, layers)).astype(int).tolist()})


@charts.styled
def picture(study: Study) -> list[Chart]:
  """Draws a row of heat maps for each MoE arm (its first run), a map for each layer."""
  found = ([(arm, run, *heat(run, _COLUMNS)) for run in arm.runs] for arm in study.arms)
  rows = [row for of_arm in found for row in [row for row in of_arm if len(row[2])][:1]]
  if not rows:
    return []
  height = 0.9 + 1.5 * len(rows)
  figure = Figure((12, height))
  figure.subplots_adjust(0.07, 0.3 / height, 0.995, 1 - 0.85 / height, hspace=0.6)
  grid = figure.subplots(len(rows), squeeze=False)[:, 0]
  for (arm, run, steps, load_ZES), axes in zip(rows, grid, strict=True):
    shown = spread_out(len(load_ZES))
    # One image, in which each layer's map is one wide and ends with a gap.
    gap = max(load_ZES.shape[2] // 20, 1)
    load_ZES = np.pad(load_ZES[shown], ((0, 0), (0, 0), (0, gap)), constant_values=np.nan)
    extent = (0, len(shown), load_ZES.shape[1] - 0.5, -0.5)  # expert 0 is at the top
    image = axes.imshow(np.hstack(list(load_ZES)), vmin=0, vmax=2, extent=extent)
    names = [f"layer {run.layers()[z]}, to step {steps[-1]:,.0f}" for z in shown]
    axes.set_xticks(np.arange(len(shown)) + 0.48, names)
    axes.tick_params(bottom=False)
    axes.grid(visible=False)
    axes.spines[:].set_visible(False)
    axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.set(title=charts.label(arm.name), ylabel="expert")
  scale = figure.add_axes((0.07, 1 - 0.25 / height, 0.3, 0.12 / height))
  what = "load / fair share"
  figure.colorbar(image, cax=scale, extend="max", label=what, orientation="horizontal")
  return [Chart("load", "Load of the experts over the steps", charts.saved(figure))]


def excerpts(study: Study) -> list[Excerpt]:
  """Returns the text and the experts' tokens of each arm, of the first run that has them."""
  found = []
  for arm in study.arms:
    for run in [run for run in arm.runs if run.routing][:1]:
      for z in spread_out(len(run.layers())):
        title = f"{arm.name}, seed {run.seed}, layer {run.layers()[z]}: a text by its experts"
        found.append(Excerpt(title, _tokens(run, z), _experts(run, z)))
  return found


def _tokens(run: Run, z: int) -> list[tuple[str, str, str, str]]:
  """Returns of each token of the run's text what Excerpt shows of it, in layer z."""
  if not (text := run.routing.get("text")):
    return []
  layer, before, tokens = text["layers"][z], "", []
  parts = (text["tokens"], text["domain"], layer["experts"], layer["gates"], layer["kept"])
  for letters, domain, *routed in zip(*parts, strict=True):
    choices = [*zip(*routed, strict=False)]
    said = [f"expert {e}: {g:.3f}{'' if kept else ', dropped'}" for e, g, kept in choices]
    took = [e for e, _, kept in choices if kept]
    style = f"e{took[0]}{' dropped' if len(took) < len(choices) else ''}" if took else "none"
    shown = {"": "·", "\n": "↵\n", "\t": "→\t"}.get(letters, letters)
    heading = domain if domain != before else ""
    tokens.append((heading, style, "; ".join(said) or "no expert chose it", shown))
    before = domain
  return tokens


def _experts(run: Run, z: int) -> Table:
  """Returns what each expert takes: its load by domain, and tokens that others take less often."""
  loads = run.routing.get("domain_load_ZGE")
  load_GE = np.array(loads[z], float) if loads else np.zeros((0, 0))
  domains = [*zip(run.routing.get("domains", []), load_GE, strict=False)]
  rows = []
  for e, tokens in enumerate(run.routing["top_tokens_ZE"][z]):
    shares = [f"{load_E[e] * len(load_E):.2f}" for _, load_E in domains]
    favourites = "  ".join(json.dumps(t[0], ensure_ascii=False) for t in tokens if t)
    rows.append([str(e), *shares, favourites])
  head = ["expert", *(f"{name}, x fair share" for name, _ in domains), "tokens it takes most"]
  return Table("", head, rows, left=(0, len(head) - 1))
