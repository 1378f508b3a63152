"""Rules that weigh entries or matrices by statistics of the tasks, such as Fisher information and Gram matrices."""
