"""The tests of ckpt_pass."""
