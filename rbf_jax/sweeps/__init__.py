"""Sweeps: many runs over a space of configurations, with Optuna and submitit.

Needs the packages of the extra ``sweep``.
"""
