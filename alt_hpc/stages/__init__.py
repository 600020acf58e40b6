"""The stages: each module's `run(folder, piece, attempt)` makes one piece. They know no cluster."""
