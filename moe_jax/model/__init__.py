"""The decoder: attention, feed-forward, layers, and what they cost."""
