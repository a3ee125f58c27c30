"""What a resize costs, against the bare start of the same world."""
