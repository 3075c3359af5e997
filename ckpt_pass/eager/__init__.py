"""Apply, eager: dispatch modes for ``torch.utils.checkpoint.checkpoint``."""
