"""What is measured on a task's images for rules and regularizers."""
