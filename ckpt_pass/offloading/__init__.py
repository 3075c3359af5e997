"""Where values are moved to: pinned and plain host memory, a file; and how they come back."""
