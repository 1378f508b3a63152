"""What models answer, on all tasks in one pass, and why."""
