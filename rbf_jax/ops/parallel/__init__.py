"""The operation on many devices."""
