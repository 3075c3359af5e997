"""Apply, compiled: tag the joint graph, split it, order its backward, compile both halves."""
