"""Saves and loads in motion: the only room with threads."""
