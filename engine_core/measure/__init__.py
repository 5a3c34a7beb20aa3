"""``edgellm bench`` and ``edgellm evaluate``: how fast an engine is and how good its tokens are."""
