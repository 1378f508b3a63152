"""Evaluation of models on all tasks in one pass, and diagnostics that explain the results."""
