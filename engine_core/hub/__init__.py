"""Public models: a table of those that are known to run, and the way of one from a hub to this machine."""
