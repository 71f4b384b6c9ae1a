"""The experiments of the report, one file each: what it trains, evaluates and says."""
