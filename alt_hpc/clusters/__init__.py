"""Clusters run a plan's jobs: `slurm` through submitit, `local` on this machine."""
