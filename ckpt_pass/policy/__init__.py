"""Call sites and how they are counted; rules about them, and those that have a name."""
