"""``edgellm bench``, ``evaluate`` and ``report``: how fast an engine is, how good its tokens are, what a machine is."""
