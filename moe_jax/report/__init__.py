"""What runs look like, from the files of their workdirs alone: no model and no jax is imported."""

from moe_jax.report.compare import compare, compare_runs
from moe_jax.report.single import summary

__all__ = ["compare", "compare_runs", "summary"]
