"""Prepare data: LAVIS's annotations from published files, extracted frames, a check of files."""
