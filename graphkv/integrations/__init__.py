"""The model libraries that policies plug into, one file each."""
