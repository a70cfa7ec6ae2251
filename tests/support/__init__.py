"""What several tests use: backends, arrays, policies, and faults that the kit must find."""
