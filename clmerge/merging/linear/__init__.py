"""Linear rules: coefficients per task, whatever the entries are."""
