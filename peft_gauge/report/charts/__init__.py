"""Drawings: altair makes them, vl-convert renders them."""
