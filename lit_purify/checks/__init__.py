"""Gradcheck and audit: is the robust accuracy of an evaluation to be believed?"""
