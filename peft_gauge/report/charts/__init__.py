"""Charts: made by altair, rendered by vl-convert."""
