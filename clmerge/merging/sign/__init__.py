"""Rules that elect signs or keep the entry of largest magnitude."""
