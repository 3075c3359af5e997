"""Whole steps that dynamo cuts in several graphs: run on fake tensors, and planned together."""
