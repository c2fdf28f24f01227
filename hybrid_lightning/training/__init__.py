"""Trains policies: tasks, their steps and checkpoints, and the LightningModules."""
