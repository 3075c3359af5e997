"""Checkpoint regions as they run in eager mode: hooks, dispatch modes, modules made regions."""
