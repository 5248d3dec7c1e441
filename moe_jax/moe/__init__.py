"""The Mixture-of-Experts layer: layer, routers, dispatch, exchange, counts."""
