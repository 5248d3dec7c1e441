"""Evaluates and examines finished runs."""
