"""Names of other libraries over lorakit's functions, for scripts that were written for these."""
