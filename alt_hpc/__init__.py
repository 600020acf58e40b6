"""alt_hpc: align language models with textual feedback (ALT-RM) as Slurm batch jobs."""

__version__ = "0.1.0"
