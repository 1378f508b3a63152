"""Runs: train a stream with mergers, resume it, and load its results."""
