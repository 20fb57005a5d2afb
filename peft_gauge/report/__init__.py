"""Results as people read them. Plain records in, text out."""
