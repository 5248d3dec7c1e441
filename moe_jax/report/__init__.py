"""Reports on runs from the files of their workdirs; this folder imports no model and no jax."""

from moe_jax.report.page import Report, compare, compare_runs
from moe_jax.report.single import summary

__all__ = ["Report", "compare", "compare_runs", "summary"]
