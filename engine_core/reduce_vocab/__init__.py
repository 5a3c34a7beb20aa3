"""``edgellm reduce-vocab``: choose the tokens that an LM head keeps and write the vocabulary map."""
