"""Benchmarks: `python -m moe_jax.bench layer|train|all`. No other module imports them."""
