"""Sweep files: one per sweep; base.py is the whole schema."""
