"""Whole runs: fit a stream, and compare what it left."""
