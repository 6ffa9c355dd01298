"""Checkpoint folders: written beside, synced, renamed; verified by hashes; bounded in number."""
