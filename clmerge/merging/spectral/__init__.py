"""Rules that use singular value decompositions of the task matrices."""
