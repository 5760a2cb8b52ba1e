"""What a run file may say: errors, fields, and the settings of a run and its parts."""
