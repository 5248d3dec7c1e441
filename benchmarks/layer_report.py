"""The layer benchmark's tables and targets."""

from typing import Any

from benchmarks import results

_LIMITS = {"gather": 1.10, "grouped": 1.20}  # time with 8 experts / dense FFN's, forward + backward
# {K: time with 64 experts / time with 8}, at equal active experts.
_GROWTH = {2: 1.3, 8: 1.15}
_MOVING = 0.10  # time of router, dispatch and combine / the layer's time
_MATMUL = 0.70  # FLOP/s / those of a dense matmul, on an accelerator


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
  """Compares the measured times with the targets above."""
  verdicts = []
  for row in result["rows"]:
    name = f"{row['setting']} {row['candidate']}"
    if row["dtype"] == "bfloat16":
      if row["dispatch"] == "grouped":
        share = row["step_of_matmul"]
        verdicts.append(results.target(f"{name} / matmul rate", share, _MATMUL, at_least=True))
    elif row["dispatch"] in _LIMITS and row["num_experts"] == 8:
      limit = _LIMITS[row["dispatch"]]
      verdicts.append(results.target(f"{name} / dense FFN", row["step_vs_ffn"], limit))
  for setting, growth in growths(result["rows"]).items():
    top_k = next(r["top_k"] for r in result["rows"] if r["setting"] == setting)
    for dispatch in _LIMITS.keys() & growth.keys():
      if top_k in _GROWTH:
        what = f"{setting} {dispatch} E=64 / E=8"
        verdicts.append(results.target(what, growth[dispatch], _GROWTH[top_k]))
  for split in result["phases"]:
    what = f"{split['setting']} {split['candidate']} router+dispatch+combine / layer"
    verdicts.append(results.target(what, split["step"]["moving"], _MOVING))
  return verdicts


def growths(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
  """Returns {setting: {dispatcher, slots or blocks: time with 64 experts / time with 8}}."""
  times = {(r["setting"], r["dispatch"], r["num_experts"]): r["step_vs_ffn"] for r in rows}
  found: dict[str, dict[str, float]] = {}
  for (setting, dispatch, experts), time in times.items():
    few = times.get((setting, dispatch, 8))
    if experts == 64 and few:
      found.setdefault(setting, {})[dispatch] = time / few
  return found


def text(result: dict[str, Any]) -> str:
  """Formats tables of all rows, of the phases, and of the targets."""
  return "\n\n".join(
    [
      _rows(result["rows"]),
      _growths(result["rows"]),
      _phases(result["phases"]),
      results.target_table(result["targets"]),
    ]
  )


def _rows(rows) -> str:
  lines = [
    [
      f"{row['setting']} {row['candidate']}",
      f"{1e3 * row['forward_s']:.2f}",
      f"{row['forward_vs_ffn']:.2f}",
      f"{1e3 * row['step_s']:.2f}",
      f"{row['step_vs_ffn']:.2f}",
      f"{row['step_of_matmul']:.2f}",
      f"{100 * row['drop_fraction']:.1f}%",
      f"{row['max_vio']:.2f}",
    ]
    for row in rows
  ]
  header = ["layer (step: forward and backward)", "forward ms", "/ FFN", "step ms", "/ FFN",
            "of matmul", "dropped", "MaxVio"]  # fmt: skip
  return results.table(header, lines)


def _growths(rows) -> str:
  kinds = ["gather", "slots", "grouped", "blocks"]
  lines = [
    [setting, *(f"{growth[kind]:.2f}" if kind in growth else "-" for kind in kinds)]
    for setting, growth in growths(rows).items()
  ]
  header = ["E=64 / E=8, step", "gather", "its experts alone", "grouped", "its experts alone"]
  return results.table(header, lines)


def _phases(splits) -> str:
  names = ["router", "dispatch", "experts", "combine", "statistics", "sum"]
  lines = []
  for split in splits:
    for kind in ("forward", "step"):
      shares = [f"{100 * split[kind][name]:.1f}" for name in names]
      lines.append([f"{split['setting']} {split['candidate']} {kind}", *shares])
  return results.table(["% of the layer, pieces timed alone", *names], lines)
