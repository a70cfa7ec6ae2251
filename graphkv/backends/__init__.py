"""How an array library does what the standard lacks: one small file per library, each with one ``BACKEND`` value."""
