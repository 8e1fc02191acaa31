"""The way of a save: capture, agreement, staging, writing, commit, housekeeping."""
