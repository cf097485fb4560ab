"""Compiled code, nothing else: register tiles, jobs over them, selection, attention. Imports nothing of ours."""
