"""Reports on runs from the files of their workdirs; this folder imports no model and no jax."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from moe_jax.report.page import Report, compare, compare_runs
  from moe_jax.report.single import summary
else:

  def __getattr__(name: str) -> Any:  # matplotlib takes a second, which --watch does not need
    if name not in __all__:
      raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from moe_jax.report import page, single

    return getattr(single if name == "summary" else page, name)


__all__ = ["Report", "compare", "compare_runs", "summary"]
