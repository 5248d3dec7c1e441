"""Reports on runs from the files of their workdirs; this folder imports no model and no jax."""
