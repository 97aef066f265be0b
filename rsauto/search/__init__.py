"""The search: which trials to run, in what order, and when to stop."""
