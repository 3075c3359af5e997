"""Measured rows as tables, pictures and a page."""
