"""Configuration files: one per run; base.py is the whole schema."""
