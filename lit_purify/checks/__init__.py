"""Gradcheck and audit: checks whether a robust accuracy can be trusted."""
