"""From argv to a started jax: the command line, the settings of a process, several processes."""
