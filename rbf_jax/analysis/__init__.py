"""Looks at runs: reads their metrics, compares them, looks inside their models, draws figures."""
