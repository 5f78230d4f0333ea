"""The follow-up experiment: is the effect of the corrections one of size, or of conditioning?"""
