"""Rules that elect signs, or let the largest entry win."""
