"""Rules that weigh entries or matrices by what the data of the tasks say."""
