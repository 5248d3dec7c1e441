"""Compiles a run's own programs for devices that are not here, and says what they will cost."""
