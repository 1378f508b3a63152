"""Rules that look at singular vectors."""
