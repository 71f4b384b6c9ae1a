"""Attention of new queries to a cache of keys."""
