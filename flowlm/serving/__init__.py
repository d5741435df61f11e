"""Trained models behind HTTP: one worker that owns the devices, requests that share its batches, and a page."""
