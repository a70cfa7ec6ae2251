"""Where the policies are plugged in: one file per model library."""
