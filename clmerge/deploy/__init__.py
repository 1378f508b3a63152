"""From accumulators to predictors for images."""
