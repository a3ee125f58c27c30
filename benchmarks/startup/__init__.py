"""What a resize costs, compared with a bare start of the same ranks."""
