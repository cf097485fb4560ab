"""Experts in fewer bits."""
