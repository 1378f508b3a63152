"""Rules that learn coefficients on adaptation images."""
