"""Module-level strategies: placements decide where, policies decide what, ``eager`` does it."""
