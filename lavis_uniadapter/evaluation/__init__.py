"""Scores and metrics, called by the tasks and the models."""
