"""Everything private in the libraries that the project leans on, one module a library; callers import it from here.

Each entry says what it is for and what holds it. `tests/test_internals.py` asks every entry in seconds; a release that
moves one fails there, under the entry's own name.
"""
