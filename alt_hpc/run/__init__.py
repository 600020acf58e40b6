"""A run on disk: where everything lies, what says that a piece is whole, what was submitted."""
