"""What the library costs and what it gains, against torch's own means; see ``run.py``."""
