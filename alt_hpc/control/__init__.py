"""What a person starts: runs are checked, begun, planned, followed and brought to their end."""
