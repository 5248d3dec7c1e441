"""The inference benchmark's tables and targets."""

from typing import Any

from benchmarks import results
from benchmarks.inference import MOE, TWINS

_ACTIVE_SPEED = 0.85  # speed / that of the dense model of the active size, at batch 1
_TOTAL_SPEED = 0.85  # speed / (total/active times that of the dense model of the total size)
_BANDWIDTH = 0.7  # bytes/s / those of a plain read of the memory
_FORMULA = 0.2  # relative error of the formula at batches 2 to 16


def targets(result: dict[str, Any]) -> list[dict[str, Any]]:
  """Compares batch 1 with both dense models and the memory, larger batches with the formula."""
  active, total = TWINS
  sizes = result["models"][MOE]
  at = {(r["model"], r["batch"]): r for r in result["decode"]}
  first = min(batch for _, batch in at)
  moe = at[MOE, first]
  larger = sizes["parameters"] / sizes["active"]
  verdicts = [
    results.target(
      f"batch {first}: MoE speed / {active}",
      1 / at[active, first]["speed_vs_moe"],
      _ACTIVE_SPEED,
      at_least=True,
    ),
    results.target(
      f"batch {first}: MoE speed / {total}",
      1 / at[total, first]["speed_vs_moe"],
      _TOTAL_SPEED * larger,
      at_least=True,
    ),
    results.target(
      f"batch {first}: bytes/s of the step / of a plain read",
      moe["of_plain_read"],
      _BANDWIDTH,
      at_least=True,
    ),
  ]
  for batch in sorted({batch for _, batch in at} & {2, 4, 8, 16}):
    row, large = at[MOE, batch], at[total, batch]
    predicted = large["roofline_s"] / row["roofline_s"]
    error = abs(1 / large["speed_vs_moe"] / predicted - 1)
    what = f"batch {batch}: MoE speed / {total}, off the expected-experts formula"
    verdicts.append(results.target(what, error, _FORMULA))
    if batch <= 8:
      error = abs(row["seconds"] / moe["seconds"] / (row["roofline_s"] / moe["roofline_s"]) - 1)
      what = f"batch {batch}: time over batch {first}'s, off the expected-experts formula"
      verdicts.append(results.target(what, error, _FORMULA))
  return verdicts


def text(result: dict[str, Any]) -> str:
  """Formats tables of decoding, of prefill, and of the targets."""
  header = ["decode, batch", "model", "ms/step", "tokens/s", "MoE's speed / its", "experts read",
            "expected", "GB/s", "/ plain read", "roofline ms"]  # fmt: skip
  lines = [
    [
      str(r["batch"]),
      r["model"],
      f"{1e3 * r['seconds']:.2f}",
      f"{r['tokens_per_s']:,.1f}",
      f"{1 / r['speed_vs_moe']:.2f}",
      f"{r['experts_read']:.1f}" if r["experts_read"] else "-",
      f"{r['experts_expected']:.1f}" if r["experts_expected"] else "-",
      f"{r['bytes_per_s'] / 1e9:.1f}",
      f"{r['of_plain_read']:.2f}",
      f"{1e3 * r['roofline_s']:.2f}",
    ]
    for r in result["decode"]
  ]
  prefill = [
    [str(r["tokens"]), r["model"], f"{1e3 * r['seconds']:.1f}", f"{r['tokens_per_s']:,.0f}"]
    for r in result["prefill"]
  ]
  return "\n\n".join(
    [
      results.table(header, lines),
      results.table(["prefill", "model", "ms", "tokens/s"], prefill),
      results.target_table(result["targets"]),
    ]
  )
