"""Statistics of a task's images for rules and regularizers."""
