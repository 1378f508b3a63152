"""What a run leaves: its folder, its accuracies and their figures."""
