"""Switch/Mixtral-style Mixture-of-Experts language models in JAX, with expert parallelism."""
