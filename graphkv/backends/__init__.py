"""Array libraries, one file each with one ``BACKEND`` value: faster forms of what the standard lacks."""
