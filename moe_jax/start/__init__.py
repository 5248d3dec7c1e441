"""From argv to a started jax: command line, process start, processes that watch each other."""
