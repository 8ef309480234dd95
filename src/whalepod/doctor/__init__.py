"""Checks a cluster before a job does: what each rank has, what ranks have between them, and a verdict."""
