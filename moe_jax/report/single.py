"""What one run looks like: the text summary that eval.py prints, and the plots."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moe_jax.errors import DamagedError
from moe_jax.report import charts, reading, runs
from moe_jax.storage import files
from moe_jax.storage import workdir as workdir_lib


def summary(workdir: str, result: dict[str, Any]) -> str:
  """The text that eval.py prints; draws the plots."""
  path = workdir_lib.open_path(workdir)
  bits, gzip_bits = result["bits_per_byte"], result["gzip_bits_per_byte"]
  verdict, uncertainty = "below" if bits < gzip_bits else "above", ""
  if "bits_per_byte_error" in result:
    over = f"(standard error over {result['documents']:,} documents)"
    uncertainty = f" ± {result['bits_per_byte_error']:.4f} {over}"
  try:
    measured, plots = reading.read_lines(path / workdir_lib.METRICS, path, {}), ""
  except DamagedError as error:  # which the evaluation does not need
    measured, plots = [], f"none: {error}"
  rates = runs.series(measured, "train/tokens_per_s")[1]
  lines = [
    f"parameters         {result['parameters'] / 1e6:,.2f}M total, "
    f"{result['active_parameters'] / 1e6:,.2f}M active per token",
    f"training speed     {np.median(rates) if len(rates) else 0:,.0f} tokens/s (median)",
    f"step {result['step']}, {result['split']} set of {result['data']}: "
    f"{result['tokens']:,} tokens, {result['bytes']:,} bytes",
    f"loss               {result['loss']:.4f} nats per token",
    f"perplexity         {result['perplexity']:.3f}",
    f"bits per byte      {bits:.4f}{uncertainty}, {verdict} gzip -9 on the same text: "
    f"{gzip_bits:.4f}",
  ]
  if "load_balance" in result:
    lines.append(f"load balance loss  {result['load_balance']:.4f} (1.0 is balanced)")
  if not plots:
    drawn = {"loss.png": _loss(path.name, measured, result)}
    if "load_ZE" in result:
      drawn |= {"load.png": _load(result), "balance.png": _balance(path.name, measured, result)}
    for name, figure in drawn.items():
      files.write(path / name, charts.saved(figure, "png"))
    plots = ", ".join(str(path / name) for name in drawn)
  lines += [routing_table(result), f"plots              {plots}"]
  return "\n".join(lines)


def routing_table(result: dict[str, Any]) -> str:
  """Per layer: the share of assignments each expert gets, drops, MaxVio, entropy, dead experts."""
  if "load_ZE" not in result:
    return "dense model: no experts to report"
  experts = len(result["load_ZE"][0])
  count = min(experts, 16)
  cut = "" if count == experts else f"; the first {count} of {experts} experts"
  lines = [
    f"expert load, % of a layer's assignments; balanced is {100 / experts:.1f}{cut}",
    "layer " + "".join(f"{f'e{i}':>6}" for i in range(count)) + "   dropped  MaxVio  entropy  dead",
  ]
  for z, layer in enumerate(result["layers"]):
    loads = "".join(f"{100 * share:6.1f}" for share in result["load_ZE"][z][:count])
    lines.append(
      f"{layer:<6}{loads}   {100 * result['drop_fraction_Z'][z]:6.2f}%  "
      f"{result['max_vio_Z'][z]:6.2f}  {result['router_entropy_Z'][z]:7.2f}  "
      f"{result['dead_experts_Z'][z]:4d}"
    )
  return "\n".join(lines)


@charts.styled
def _loss(name: str, lines: list[dict[str, Any]], result: dict[str, Any]) -> Figure:
  """Draws the losses in bits per byte: bits per token times the tokens per byte of the text."""
  figure = Figure((7, 4), layout="constrained")
  axes = figure.subplots()
  scale = result["tokens"] / result["bytes"] / np.log(2)
  bits, gzip_bits = result["bits_per_byte"], result["gzip_bits_per_byte"]
  steps, losses = runs.series(lines, "train/loss")
  axes.plot(steps, scale * losses, color="#9ecae1", lw=1, label="training batch")
  validation = runs.series(lines, "validation/bits_per_byte")
  rows = "validation rows, spread over the split"
  axes.plot(*validation, "o-", color="#08519c", ms=4, label=rows)
  for level in runs.series(lines, "validation/gzip_bits_per_byte")[1][-1:]:
    axes.axhline(level, color="#666666", ls="--", lw=1, label="gzip -9 of the same rows")
  said = f"evaluation of the {result['split']} set: {bits:.3f} (gzip -9: {gzip_bits:.3f})"
  step, error = result["step"], result.get("bits_per_byte_error")
  axes.errorbar(step, bits, error, fmt="D", color="#d94801", ms=6, capsize=3, label=said)
  # The first steps of a new model, at the entropy of a uniform guess, would flatten the rest.
  axes.set_ylim(top=min(axes.get_ylim()[1], 2 * max(gzip_bits, bits)))
  axes.set(xlabel="step", ylabel="bits per byte of text", title=f"Loss of {charts.label(name)}")
  axes.legend()
  return figure


@charts.styled
def _load(result: dict[str, Any]) -> Figure:
  relative_ZE = np.asarray(result["load_ZE"]) * len(result["load_ZE"][0])
  layers, experts = relative_ZE.shape
  figure = Figure((min(2.5 + 0.7 * experts, 16), 1.6 + 0.5 * layers), layout="constrained")
  axes = figure.subplots()
  axes.grid(visible=False)
  image = axes.imshow(relative_ZE, vmin=0, vmax=2)
  if experts <= 16:
    axes.set_xticks(range(experts))
    for (z, e), value in np.ndenumerate(relative_ZE):
      light = abs(value - 1) > 0.6
      axes.text(e, z, f"{value:.2f}", ha="center", va="center", color="w" if light else "k")
  title = f"Expert load on the {result['split']} set, 1 = fair share"
  axes.set(xlabel="expert", ylabel="layer", title=title)
  axes.set_yticks(range(layers), result["layers"])
  figure.colorbar(image, ax=axes, extend="max", label="load / fair share")
  return figure


@charts.styled
def _balance(name: str, lines: list[dict[str, Any]], result: dict[str, Any]) -> Figure:
  figure = Figure((7, 5.5), layout="constrained")
  top, bottom = figure.subplots(2, 1, sharex=True)
  layers = result["layers"]
  for axes, metric, scale, unit in (
    (top, "train/max_vio_Z", 1, "MaxVio (0 is balanced)"),
    (bottom, "train/drop_fraction_Z", 100, "assignments dropped, %"),
  ):
    steps, value_SZ = runs.series(lines, metric)
    for z, layer in enumerate(layers if len(steps) else []):
      colour = matplotlib.colormaps["viridis"](z / max(len(layers) - 1, 1))
      axes.plot(steps, scale * value_SZ[:, z], color=colour, lw=1, label=f"layer {layer}")
    axes.set_ylabel(unit)
    axes.set_ylim(bottom=0)
  top.set_title(f"Balance of the experts in training, {charts.label(name)}")
  if len(layers) <= 12:
    top.legend(ncols=4)
  bottom.set_xlabel("step")
  return figure
