"""Plots of the benchmarks' results."""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from benchmarks.results import progress

_COLOURS = {
  "ffn": "#666666", "gather": "#08519c", "grouped": "#6baed6", "einsum": "#fdae6b",
  "dense": "#fdd0a2", "bare": "#c6dbef",
}  # fmt: skip
_PHASES = ("router", "dispatch", "experts", "combine", "statistics")


def _save(figure, out: pathlib.Path, name: str) -> None:
  figure.savefig(out / name, dpi=120)
  plt.close(figure)
  progress(f"wrote {out / name}")


def layer(out: pathlib.Path, result: dict[str, Any]) -> None:
  """Draws layer.png: times of forward and backward over the dense FFN's, and of the phases.

  A tick on a dispatcher's bar is what its experts take alone. The oracles are in the table only.
  """
  alone = {"gather": "slots", "grouped": "blocks"}
  rows = [r for r in result["rows"] if r["dispatch"] in alone]
  splits = result["phases"]
  figure, (top, bottom) = plt.subplots(
    2,
    1,
    figsize=(9, 1.5 + 0.24 * (len(rows) + 2 * len(splits))),
    layout="constrained",
    height_ratios=(max(len(rows), 1), max(2 * len(splits), 1)),
  )
  at = np.arange(len(rows))
  top.barh(at, [r["step_vs_ffn"] for r in rows], color=[_COLOURS[r["dispatch"]] for r in rows])
  bounds = {
    (r["setting"], r["dispatch"], r["num_experts"]): r["step_vs_ffn"] for r in result["rows"]
  }
  ticks = [bounds[r["setting"], alone[r["dispatch"]], r["num_experts"]] for r in rows]
  top.plot(ticks, at, "|", color="k", ms=9, mew=2, ls="none", label="its experts alone")
  top.set_yticks(at, [f"{r['setting']} {r['candidate']}" for r in rows], fontsize=7)
  for limit, dispatch in ((1.10, "gather"), (1.20, "grouped")):
    top.axvline(limit, color=_COLOURS[dispatch], ls="--", lw=1, label=f"target of {dispatch}")
  top.axvline(1, color="#666666", lw=1, label="dense FFN")
  top.set(xlabel="forward and backward / dense FFN of equal active FLOPs")
  above = dict(
    frameon=False, fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=5
  )
  top.legend(**above)
  top.invert_yaxis()
  bars = [(s, kind) for s in splits for kind in ("forward", "step")]
  start = np.zeros(len(bars))
  for number, phase in enumerate(_PHASES):
    share = 100 * np.array([s[kind][phase] for s, kind in bars])
    bottom.barh(range(len(bars)), share, left=start, label=phase, color=plt.cm.viridis(number / 4))
    start = start + share
  labels = [f"{s['setting']} {s['candidate']} {kind}" for s, kind in bars]
  bottom.set_yticks(range(len(bars)), labels, fontsize=7)
  bottom.axvline(100, color="k", lw=1)
  bottom.set(xlabel="pieces timed alone, % of the whole layer")
  if bars:
    bottom.legend(**above)
    bottom.invert_yaxis()
  _save(figure, out, "layer.png")


def train(out: pathlib.Path, result: dict[str, Any]) -> None:
  """Draws train.png: tokens per second of every model."""
  rows = sorted(result["rows"], key=lambda r: r["tokens_per_s"])
  figure, axes = plt.subplots(figsize=(8, 1.2 + 0.35 * len(rows)), layout="constrained")
  speed = [r["tokens_per_s"] for r in rows]
  colours = ["#cb181d" if "peer" in r["kind"] else _COLOURS[r["kind"]] for r in rows]
  axes.barh([r["name"] for r in rows], speed, color=colours)
  for number, value in enumerate(speed):
    axes.text(value, number, f" {value:,.0f}", va="center", fontsize=8)
  unit = "CPU-second, one thread" if result["threads"] == 1 else "second"
  axes.set(xlabel=f"tokens per {unit}", title="Training step")
  axes.margins(x=0.12)
  _save(figure, out, "train.png")


def inference(out: pathlib.Path, result: dict[str, Any]) -> None:
  """Draws inference.png: speed of decoding by batch size, and the MoE's speed over the others'.

  Both are measured (solid) and predicted by the roofline (dotted).
  """
  colours = dict(zip(result["models"], ("#08519c", "#666666", "#cb181d"), strict=True))
  figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
  seconds, roofline = {}, {}
  for name, colour in colours.items():
    rows = [r for r in result["decode"] if r["model"] == name]
    batch = np.array([r["batch"] for r in rows])
    seconds[name] = np.array([r["seconds"] for r in rows])
    roofline[name] = np.array([r["roofline_s"] for r in rows])
    left.plot(batch, batch / seconds[name], "o-", color=colour, label=name)
    left.plot(batch, batch / roofline[name], ":", color=colour)
  moe, *twins = colours
  for name in twins:
    right.plot(batch, seconds[name] / seconds[moe], "o-", color=colours[name], label=name)
    right.plot(batch, roofline[name] / roofline[moe], ":", color=colours[name])
  right.axhline(1, color="k", lw=1)
  for axes in (left, right):
    axes.set_xscale("log", base=2)
    axes.set_xticks(batch, batch)
    axes.set(xlabel="rows decoded together")
    axes.legend(frameon=False, title="dotted: roofline")
  left.set(ylabel="tokens per second", yscale="log")
  right.set(ylabel="speed of the MoE / of the dense model")
  sizes = result["models"][moe]
  total, active = (f"{sizes[which] / 1e6:.0f}M" for which in ("parameters", "active"))
  figure.suptitle(f"Decoding: {total} parameters, {active} active, {sizes['dtype']}", fontsize=11)
  _save(figure, out, "inference.png")


def compiled(out: pathlib.Path, result: dict[str, Any]) -> None:
  """Draws compile.png: cycles and memory of each step, ours beside the peer's."""
  rows = [r for r in result["rows"] if "error" not in r]
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(11, 1.4 + 0.32 * len(rows)), layout="constrained", sharey=True
  )
  at = np.arange(len(rows))
  names = [f"{r['model']} {r['chip']} {r['path']}, {r['side']}" for r in rows]
  colours = ["#08519c" if r["side"] == "ours" else "#cb181d" for r in rows]
  left.barh(at, [r["all_cycles"] / 1e9 for r in rows], color=colours, alpha=0.5)
  matmuls = [(r["matmul_cycles"] + r["grouped_cycles"]) / 1e9 for r in rows]
  left.barh(at, matmuls, color=colours)
  left.set_yticks(at, names, fontsize=7)
  left.set(xlabel="estimated cycles of a step, 1e9 (dark: operations with a matmul)")
  arguments = np.array([r["arguments"] / 2**30 for r in rows])
  right.barh(at, arguments, color=colours)
  right.barh(at, [r["temporaries"] / 2**30 for r in rows], left=arguments, color=colours, alpha=0.5)
  right.set(xlabel="memory of a device, GiB (dark: arguments)")
  left.invert_yaxis()
  _save(figure, out, "compile.png")
