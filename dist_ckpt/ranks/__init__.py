"""The ranks of a job: how they join, agree and learn of each other's failures."""
