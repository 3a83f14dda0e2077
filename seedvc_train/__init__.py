"""The DiT training loop of a Seed-VC voice converter, resumable bit for bit."""
