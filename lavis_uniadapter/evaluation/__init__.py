"""Scores and metrics of the tasks, independent of LAVIS's models, registry and configurations."""
