"""What each op is, as data, and how many operations it does."""
