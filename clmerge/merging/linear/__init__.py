"""Linear rules: combinations of task vectors with coefficients per task, tensor or entry."""
