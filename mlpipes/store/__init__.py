"""The store: what every process shares. Files that survive a crash, where they lie, who may write, what was asked for."""
