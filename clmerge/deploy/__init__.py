"""From accumulators to what answers images."""
