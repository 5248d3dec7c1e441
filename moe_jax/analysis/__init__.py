"""What can be learnt from a finished run."""
