"""Tuning methods in plain torch, one file each. Nothing here knows LAVIS."""
