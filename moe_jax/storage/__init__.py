"""The files of a run: whole-file writes, object stores, the lock, workdir and checkpoints."""
