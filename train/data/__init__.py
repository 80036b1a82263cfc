"""From data files to the packed rows of each step."""
