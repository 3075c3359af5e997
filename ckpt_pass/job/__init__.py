"""What stands around a training step: parameters, gradients, the optimizer and what it takes."""
