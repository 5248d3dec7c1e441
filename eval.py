"""Evaluates a checkpoint: python eval.py --workdir=runs/tiny [--step=N] [--split=test]

Needs nothing but the workdir. Prints the held-out loss, perplexity, bits per byte beside gzip's,
and the routing report; writes eval.json and the plots.
"""

from absl import flags

from moe_jax import command_line
from moe_jax.config import UserError

_WORKDIR = flags.DEFINE_string("workdir", "", "a run of train.py")
_STEP = flags.DEFINE_integer("step", 0, "checkpoint to evaluate; 0 is the newest", lower_bound=0)
_SPLIT = flags.DEFINE_enum("split", "validation", ["train", "validation", "test"], "data split")


def main() -> None:
  if not _WORKDIR.value:
    raise UserError("--workdir is missing: name a run of train.py")
  from moe_jax import evaluate, report

  result = evaluate.run(_WORKDIR.value, _STEP.value, _SPLIT.value)
  print(report.summary(_WORKDIR.value, result))


if __name__ == "__main__":
  command_line.run(main)
