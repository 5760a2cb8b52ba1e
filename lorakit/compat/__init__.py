"""The names of other libraries over lorakit's functions."""
