"""Evaluation of retrieval models."""
