"""Rows of text from the hub and local files, checked and frozen; the draws of prompts."""
