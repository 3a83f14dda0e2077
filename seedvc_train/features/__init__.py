"""Frozen front ends: what a clip's content, style and pitch look like to the trained network."""
