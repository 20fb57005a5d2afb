"""Results for people to read: plain records in, text out."""
