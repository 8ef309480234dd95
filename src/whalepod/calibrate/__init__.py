"""Measures the machine it runs on and writes a hardware profile that the planner takes by name."""
