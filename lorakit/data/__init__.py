"""Rows of files, and the batches of tokens and labels that they become."""
