"""See: capture a training step as a joint graph and read it."""
