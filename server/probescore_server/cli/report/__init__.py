"""Shows scored rollouts to people: as coloured tokens on a terminal, or as an HTML page."""
