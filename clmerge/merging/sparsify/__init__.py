"""Sparsifiers, which prune or quantise a task vector before a rule, and the rules named after them."""
