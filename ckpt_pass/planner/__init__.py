"""Decide: the torch-free description of what must be decided, and what a decision costs."""
