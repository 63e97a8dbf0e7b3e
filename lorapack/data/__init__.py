"""Calibration and evaluation data: rows, their columns, disjoint parts, token ids, batches."""
