"""A local page over a folder of runs: curves, settings, samples, a chat, and buttons."""
