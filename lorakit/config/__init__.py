"""The settings of a run and of its parts, how they are checked, and the error they raise."""
