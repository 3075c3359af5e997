"""One model, trained with every way to save memory."""
