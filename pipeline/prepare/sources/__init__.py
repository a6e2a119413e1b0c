"""Input formats: one file each, all giving the same canonical rows; see ``source.py`` for the interface."""
