"""From files of rows to batches of tokens and labels."""
