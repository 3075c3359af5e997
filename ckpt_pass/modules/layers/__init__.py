"""The layers of a model: found by their place in the module tree, and measured."""
