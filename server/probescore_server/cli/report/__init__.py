"""What people read of scored rollouts: coloured tokens on a terminal, or a page."""
