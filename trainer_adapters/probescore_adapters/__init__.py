"""From scores to what RL needs, one thin module per trainer."""
