"""What the figures need trained, and at which scale."""
