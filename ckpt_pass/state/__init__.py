"""What a model and its arguments lead to: found, and left as it was."""
