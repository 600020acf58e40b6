"""The stages: each module's `run(work)` makes one piece. They know no cluster."""
