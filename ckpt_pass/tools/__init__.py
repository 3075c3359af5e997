"""What a user calls on a whole model: plan, explain, verify, fit, sweep, compare."""
