"""What a real step takes and gives: peak, time, flops, gradients."""
