"""The doors to torch's private modules, and where versions of torch differ. Decides nothing."""
