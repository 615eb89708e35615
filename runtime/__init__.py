"""Engines -> text: rounds of drafting and verifying, sampling, and the commands around them."""
