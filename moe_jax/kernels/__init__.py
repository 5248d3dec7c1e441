"""How a product, an attention or a set of experts is computed on this device."""
