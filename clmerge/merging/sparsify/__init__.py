"""Sparsifiers, which thin a task vector before a rule, and the rules named after them."""
