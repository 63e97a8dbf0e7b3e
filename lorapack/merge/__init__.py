"""Merge an adapter into its base, from file to file: no model code, no whole tensor in memory."""
