"""Strategies of a search: they ask for points, are told accuracies, and ask again; and a rule that searches."""
