"""Comparisons: grids of runs with everything else equal, what they show, and blind votes."""
